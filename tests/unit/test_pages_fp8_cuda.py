"""The CUDA copier of rows of eight bits without a GPU: its device code lane by lane on the host, against the twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.ops import pages_fp8, pages_fp8_cuda, pages_fp8_numpy
from lmcache_ext.ops.layout import DTYPES
from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.table import PageTable
from tests.device import aligned, page_kernels
from tests.unit.test_pages_fp8 import Case, cases, elements_like

KINDS = ["any bits", "numbers", "small", "zero"]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The Python face on kernels that were built for the host."""
    with page_kernels():
        yield


@st.composite
def wide_cases(draw) -> Case:
    """Everything a multiple of 16 bytes; planes of less than a round of a warp, of one, and of more."""
    dtype = draw(st.sampled_from(DTYPES))
    heads, runs, heads_first = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16, 17])), draw(st.booleans())
    k_run, v_run = (8 * draw(st.sampled_from([1, 2, 9, 16, 33])) for _ in range(2))
    shape, num_blocks = PageShape(dtype, heads, runs, k_run, v_run, heads_first), draw(st.integers(1, 3))
    tensors, end = [], 0
    for _ in range(draw(st.integers(1, 2))):
        page_bytes, gap = shape.page_bytes * draw(st.integers(1, 2)), draw(st.sampled_from([0, 16, 48]))
        tensors.append((end, num_blocks, page_bytes + gap, page_bytes))
        end += num_blocks * (page_bytes + gap)
    block_bytes = sum(shape.row_bytes(tensor[3]) for tensor in tensors)
    block_ids = draw(st.permutations(range(num_blocks)))[: draw(st.integers(0, num_blocks))]
    lead, rng = draw(st.sampled_from([0, 16, 64])), np.random.default_rng(draw(st.integers(0, 2**32)))
    pool = elements_like(draw(st.sampled_from(KINDS)), end, rng)
    rows = rng.integers(0, 256, lead + len(block_ids) * block_bytes + 16, dtype=np.uint8)
    offsets = lead + rng.permutation(len(block_ids)).astype(np.int64) * block_bytes
    return Case(shape, pool, tensors, np.array(block_ids, dtype=np.int64), rows, offsets)


def copied(content: np.ndarray, *, odd: int) -> np.ndarray:
    """The same bytes, from an address that is `odd` beyond a multiple of 16."""
    held = aligned(content.size + odd)[odd:]
    held[:] = content
    return held


def check(case: Case, way: str, *, odd: int) -> None:
    """Every byte of tensors and rows is as the twin leaves it, those that are none of a copy's business too."""
    results = []
    for native in (False, True):
        pool, rows = copied(case.pool, odd=odd), copied(case.rows, odd=odd)
        table = case.table(pool)
        if native:
            place = (rows.ctypes.data, rows.size, case.offsets)
            moved = pages_fp8_cuda.copy_pages(way, case.shape, table, case.block_ids, *place, stream=0)
        else:
            twin = pages_fp8_numpy.gather_pages if way == "gather" else pages_fp8_numpy.scatter_pages
            moved = twin(case.shape, table, case.block_ids, rows, case.offsets)
        results.append((moved, pool, rows))
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_array_equal(results[0][2], results[1][2])


@pytest.mark.parametrize("way", ["gather", "scatter"])
@settings(max_examples=40, deadline=None)
@given(case=wide_cases(), odd=st.sampled_from([0, 0, 8]))
def test_every_lane_together_does_what_the_twin_does_16_bytes_at_a_time_or_not(way, case, odd):
    check(case, way, odd=odd)


@pytest.mark.parametrize("way", ["gather", "scatter"])
@settings(max_examples=40, deadline=None)
@given(case=cases(), odd=st.integers(0, 15))
def test_every_lane_together_does_what_the_twin_does_wherever_things_lie(way, case, odd):
    check(case, way, odd=odd)


@pytest.mark.parametrize("way", ["gather", "scatter"])
@pytest.mark.parametrize(("num_blocks", "num_tensors"), [(1100, 1), (2, 130)])
def test_more_blocks_or_tensors_than_one_launch_takes(way, num_blocks, num_tensors):
    shape, rng = PageShape("bfloat16", heads=1, runs=1, k_run=8, v_run=8, heads_first=True), np.random.default_rng(0)
    size = num_blocks * shape.page_bytes
    tensors = [(j * size, num_blocks, shape.page_bytes, shape.page_bytes) for j in range(num_tensors)]
    block_bytes = num_tensors * shape.part_bytes
    rows = rng.integers(0, 256, num_blocks * block_bytes, dtype=np.uint8)
    offsets = rng.permutation(num_blocks).astype(np.int64) * block_bytes
    pool = elements_like("numbers", num_tensors * size, rng)
    check(Case(shape, pool, tensors, rng.permutation(num_blocks), rows, offsets), way, odd=0)


def test_what_a_gpu_wrote_a_host_restores():
    shape = PageShape("float16", heads=2, runs=16, k_run=64, v_run=64, heads_first=False)
    pages = [copied(elements_like("any bits", shape.page_bytes, np.random.default_rng(1)), odd=0) for _ in range(2)]
    tables = [PageTable.of([(page.ctypes.data, 1, page.size, page.size)]) for page in pages]
    rows, first = aligned(shape.part_bytes), np.zeros(1, dtype=np.int64)
    place = (rows.ctypes.data, rows.size, first)
    assert pages_fp8_cuda.copy_pages("gather", shape, tables[0], first, *place, stream=0) == shape.part_bytes
    pages_fp8.scatter_pages(shape, tables[0], first, rows, first)
    pages_fp8_cuda.copy_pages("scatter", shape, tables[1], first, *place, stream=0)
    np.testing.assert_array_equal(*pages)
    assert pages[0].any()


class TestRefusal:
    """Each comes before a byte has moved."""

    SHAPE = PageShape("bfloat16", heads=1, runs=4, k_run=8, v_run=8, heads_first=True)

    def copy(self, *, block=0, offset=0, page_bytes=None, num_ctas=16):
        pool, rows = aligned(4 * self.SHAPE.page_bytes, 0), aligned(2 * self.SHAPE.part_bytes, 1)
        before = rows.copy()
        table = PageTable.of([(pool.ctypes.data, 2, 2 * self.SHAPE.page_bytes, page_bytes or self.SHAPE.page_bytes)])
        ids, offsets = np.array([1, block], dtype=np.int64), np.array([0, offset], dtype=np.int64)
        place = (rows.ctypes.data, rows.size, offsets)
        try:
            pages_fp8_cuda.copy_pages("gather", self.SHAPE, table, ids, *place, stream=0, num_ctas=num_ctas)
        finally:
            np.testing.assert_array_equal(rows, before)

    @pytest.mark.parametrize("block", [-1, 2])
    def test_of_a_block_that_is_not_there(self, block):
        with pytest.raises(ValueError, match="block or tensor 1 is outside"):
            self.copy(block=block)

    @pytest.mark.parametrize("offset", [-16, 129])
    def test_of_a_part_that_is_not_all_in_the_rows(self, offset):
        with pytest.raises(ValueError, match="block or tensor 1 is outside"):
            self.copy(offset=offset)

    def test_of_a_tensor_that_holds_no_whole_pages(self):
        with pytest.raises(ValueError, match="129 bytes are no whole number of pages of 128 bytes"):
            self.copy(page_bytes=129)

    def test_of_no_threads(self):
        with pytest.raises(ValueError, match="0 blocks of threads"):
            self.copy(num_ctas=0)


def test_without_the_library_the_face_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(pages_fp8_cuda, "_library", lambda: None)
    assert not pages_fp8_cuda.available()
    with pytest.raises(RuntimeError, match=r"scripts/build_cuda\.py"):
        TestRefusal().copy()
