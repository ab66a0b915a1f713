"""The CUDA page copier without a GPU: its device code lane by lane on the host, its build, its refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.ops import pages_cuda, pages_numpy
from lmcache_ext.ops.table import PageTable
from tests.device import aligned, page_kernels

UNALIGNED = -(2**63)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The Python face on kernels that were built for the host."""
    with page_kernels():
        yield


def run(way, table, block_ids, rows, offsets):
    return pages_cuda.copy_pages(way, table, block_ids, rows.ctypes.data, rows.size, offsets, stream=0)


@st.composite
def cases(draw):
    """Tensors of one pool, blocks and offsets, all in multiples of 16 bytes; some beyond what one launch takes."""
    num_blocks, num_tensors = draw(st.sampled_from([(1, 1), (5, 3), (9, 2), (3, 130), (1100, 1)]))
    shapes, end = [], 0
    for _ in range(num_tensors):
        page = 16 * draw(st.sampled_from([1, 2, 7, 256, 257, 600]) if num_blocks * num_tensors < 100 else st.just(2))
        stride = page + 16 * draw(st.sampled_from([0, 0, 1]))
        shapes.append((end, num_blocks, stride, page))
        end += num_blocks * stride
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    block_bytes = sum(shape[3] for shape in shapes)
    chosen = rng.permutation(num_blocks)[: draw(st.integers(0, num_blocks))].astype(np.int64)
    offsets = 16 + rng.permutation(len(chosen)).astype(np.int64) * block_bytes
    return shapes, end, chosen, offsets, 32 + len(chosen) * block_bytes


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans(), st.integers(0, 2**32))
def test_every_lane_together_does_what_the_twin_does(case, gathers, seed):
    shapes, pool_bytes, block_ids, offsets, rows_bytes = case
    pools, rows = [aligned(pool_bytes, seed) for _ in range(2)], [aligned(rows_bytes, seed + 1) for _ in range(2)]
    tables = [PageTable.of((pool.ctypes.data + start, *rest) for start, *rest in shapes) for pool in pools]
    twin = pages_numpy.gather_pages if gathers else pages_numpy.scatter_pages
    expected = twin(tables[0], block_ids, rows[0], offsets)
    assert run("gather" if gathers else "scatter", tables[1], block_ids, rows[1], offsets) == expected
    np.testing.assert_array_equal(pools[0], pools[1])
    np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("shape", "offset", "refusal"),
    [
        ((8, 4, 32, 32), 0, "multiple of 16"),
        ((0, 4, 40, 32), 0, "multiple of 16"),
        ((0, 4, 32, 24), 0, "multiple of 16"),
        ((0, 4, 32, 32), 8, "multiple of 16"),
        ((0, 4, 32, 32), 112, "block or tensor 0 is outside"),
        ((0, 1, 32, 32), 0, "block or tensor 0 is outside"),
    ],
)
def test_what_is_unaligned_or_outside_is_refused_before_a_byte_moves(shape, offset, refusal):
    pool, rows = aligned(256, 0), aligned(128, 1)
    before = rows.copy()
    table = PageTable.of([(pool.ctypes.data + shape[0], *shape[1:])])
    with pytest.raises(ValueError, match=refusal):
        run("gather", table, np.array([1]), rows, np.array([offset]))
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("shape", [(8, 4, 48, 32), (0, 4, 40, 32), (0, 4, 48, 24)])
def test_table_that_would_be_refused_is_known_beforehand(shape):
    pool = aligned(256, 0)
    pages_cuda.check_table(PageTable.of([(pool.ctypes.data, 4, 48, 32)]))
    table = PageTable.of([(pool.ctypes.data, 4, 48, 32), (pool.ctypes.data + shape[0], *shape[1:])])
    with pytest.raises(ValueError, match=rf"tensor 1: pages of {shape[3]} bytes .* multiples of 16"):
        pages_cuda.check_table(table)


def test_refusals_are_told_apart():
    assert pages_cuda.judge(4096) == 4096
    with pytest.raises(ValueError, match="multiple of 16"):
        pages_cuda.judge(UNALIGNED)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        pages_cuda.judge(UNALIGNED + 1 + 700)
    with pytest.raises(ValueError, match="block or tensor 3"):
        pages_cuda.judge(-4)
