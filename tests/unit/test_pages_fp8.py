"""Pages to rows of eight bits and back: compiled and plain twin bit for bit, how far off, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_ext.ops import fixed, fixed_numpy, pages_fp8, pages_fp8_numpy
from lmcache_ext.ops.layout import DTYPES, Layout
from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.table import PageTable

if not pages_fp8.available():
    pytest.skip("no compiler was there when the package was installed", allow_module_level=True)

WAYS = [
    pytest.param(pages_fp8.gather_pages, pages_fp8_numpy.gather_pages, id="gather"),
    pytest.param(pages_fp8.scatter_pages, pages_fp8_numpy.scatter_pages, id="scatter"),
]


@dataclass
class Case:
    """Tensors of a pool of bytes, of one or more layers' pages each, and blocks to copy."""

    shape: PageShape
    pool: np.ndarray
    tensors: list[tuple[int, int, int, int]]  # start in pool, num_blocks, stride, page_bytes
    block_ids: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray

    def table(self, pool):
        return PageTable.of((pool.ctypes.data + start, *rest) for start, *rest in self.tensors)


@st.composite
def shapes(draw):
    """Small ones of every form; now and then one whose runs are long enough to be streamed, and cut."""
    dtype, heads_first = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    heads, runs = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    run = st.one_of(st.integers(1, 70), st.sampled_from([4096, 4097, 9000]))
    return PageShape(dtype, heads, runs, draw(run), draw(st.integers(1, 70)), heads_first)


@st.composite
def cases(draw) -> Case:
    shape, num_blocks = draw(shapes()), draw(st.integers(1, 4))
    tensors, end = [], draw(st.integers(0, 70))  # any alignment
    for _ in range(draw(st.integers(1, 2))):
        page_bytes, gap = shape.page_bytes * draw(st.integers(1, 2)), draw(st.sampled_from([0, 0, 1, 33]))
        tensors.append((end, num_blocks, page_bytes + gap, page_bytes))
        end += num_blocks * (page_bytes + gap)
    block_bytes = sum(shape.row_bytes(tensor[3]) for tensor in tensors)
    block_ids = draw(st.lists(st.integers(0, num_blocks - 1), unique=True, max_size=num_blocks))
    places = draw(st.permutations(range(len(block_ids) + 1)))[: len(block_ids)]
    lead = draw(st.integers(0, 65))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Case(
        shape,
        elements_like(draw(st.sampled_from(["any bits", "numbers", "small", "zero"])), end, rng),
        tensors,
        np.array(block_ids, dtype=np.int64),
        rng.integers(0, 256, lead + (len(block_ids) + 1) * block_bytes, dtype=np.uint8),
        np.array([lead + place * block_bytes for place in places], dtype=np.int64),
    )


def elements_like(kind, num_bytes, rng):
    """Bytes that are infinities, no numbers and denormals among others; numbers of bfloat16; mostly zeros; or zeros."""
    if kind == "any bits":
        return rng.integers(0, 256, num_bytes, dtype=np.uint8)
    numbers = rng.normal(size=num_bytes // 2 + 1) * (1e-37 if kind == "small" else 1)
    found = fixed_numpy.to_bfloat16(numbers.astype(np.float32)).view(np.uint8)[:num_bytes].copy()
    return found * np.uint8(kind != "zero")


@pytest.mark.parametrize(("native", "twin"), WAYS)
@given(case=cases())
def test_compiled_copier_and_its_twin_leave_the_same_bytes_everywhere(native, twin, case):
    results = []
    for copy in (native, twin):
        pool, rows = case.pool.copy(), case.rows.copy()
        results.append((copy(case.shape, case.table(pool), case.block_ids, rows, case.offsets), pool, rows))
    assert results[0][0] == results[1][0] == len(case.block_ids) * case.shape.block_bytes(case.table(case.pool))
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_array_equal(results[0][2], results[1][2])


@given(case=cases())
def test_no_byte_outside_the_pages_and_their_parts_is_touched(case):
    pool, rows = case.pool.copy(), case.rows.copy()
    block_bytes = case.shape.block_bytes(case.table(pool))
    pages_fp8.gather_pages(case.shape, case.table(pool), case.block_ids, rows, case.offsets)
    np.testing.assert_array_equal(pool, case.pool)
    outside = np.ones(rows.size, dtype=bool)
    for offset in case.offsets:
        outside[offset : offset + block_bytes] = False
    np.testing.assert_array_equal(rows[outside], case.rows[outside])

    pages_fp8.scatter_pages(case.shape, case.table(pool), case.block_ids, rows, case.offsets)
    outside = np.ones(pool.size, dtype=bool)
    for start, _, stride, page_bytes in case.tensors:
        for block_id in case.block_ids:
            outside[start + block_id * stride :][:page_bytes] = False
    np.testing.assert_array_equal(pool[outside], case.pool[outside])


def there_and_back(shape, page):
    """What a page comes back as, and its part of a row."""
    part, back = np.full(shape.part_bytes, 0xAA, dtype=np.uint8), np.zeros_like(page)
    for copy, target in ((pages_fp8.gather_pages, page), (pages_fp8.scatter_pages, back)):
        table = PageTable.of([(target.ctypes.data, 1, target.nbytes, target.nbytes)])
        copy(shape, table, np.zeros(1, dtype=np.int64), part, np.zeros(1, dtype=np.int64))
    return back, part


def bfloat16(values):
    return fixed_numpy.to_bfloat16(np.asarray(values, dtype=np.float32).reshape(-1)).view(np.uint8)


def floats(page):
    return fixed_numpy.from_bfloat16(page.view("<u2"))


def test_a_part_is_scales_and_then_codes_in_the_pages_own_order():
    shape = PageShape("bfloat16", heads=2, runs=2, k_run=2, v_run=1, heads_first=False)
    #        token 0: head 0   head 1            token 1: head 0   head 1
    values = [448, -224, 7, 0.0, 4.48, 0, 1, 2, -3.5, 0.0, -2.24, 0]
    back, part = there_and_back(shape, bfloat16(values))
    scales = [1, 7 / 448, np.float32(4.46875) / np.float32(448), 0]  # 4.48 in bfloat16 is 4.46875
    assert part[:16].tobytes() == np.array(scales, dtype="<f4").tobytes()
    assert not part[16:64].any()
    codes = [0x7E, 0xF6, 0x7E, 0x00, 0x7E, 0x00, 0x38, 0x40, 0xF6, 0x00, 0xF6, 0x00]
    assert part[64 : 64 + len(codes)].tolist() == codes
    assert not part[64 + len(codes) :].any()
    assert part.size == 128
    np.testing.assert_allclose(floats(back), values, rtol=2**-8)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_no_finite_number_is_nought_and_spoils_no_neighbour(poison):
    shape = PageShape("bfloat16", heads=1, runs=16, k_run=64, v_run=64, heads_first=True)
    values = np.random.default_rng(0).normal(size=shape.elements).astype(np.float32)
    clean = values.copy()
    values[[5, 700]], clean[[5, 700]] = poison, 0
    found, expected = (
        floats(there_and_back(shape, bfloat16(values))[0]),
        floats(there_and_back(shape, bfloat16(clean))[0]),
    )
    np.testing.assert_array_equal(found, expected)
    assert np.count_nonzero(found) >= shape.elements - 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_a_sixteenth_of_an_element_and_a_2_to_the_18th_of_the_largest(dtype):
    shape = PageShape(dtype, heads=3, runs=16, k_run=64, v_run=64, heads_first=True)
    values = np.random.default_rng(1).normal(size=shape.elements).astype(np.float32)
    page = bfloat16(values) if dtype == "bfloat16" else values.astype("<f4" if dtype == "float32" else "<f2").view("u1")
    back, _ = there_and_back(shape, np.ascontiguousarray(page))
    exact, found = (pages_fp8_numpy._floats(shape, each) for each in (page, back))
    bound = np.abs(exact) / 16 + np.abs(exact).max() / 448 * 2**-10
    assert (np.abs(found - exact) <= bound * 1.01).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_come_back_as_those_that_the_serde_of_the_same_name_writes(dtype):
    """One kind of fp8, wherever it is: so the accuracy measured for one is that of the other."""
    shape = PageShape(dtype, heads=2, runs=16, k_run=32, v_run=48, heads_first=True)
    page = elements_like("any bits", shape.page_bytes, np.random.default_rng(2))
    index = np.arange(16 * 80, dtype=np.int32).reshape(16, 80)
    cells = np.arange(2, dtype=np.int64).reshape(1, 2, 1) * (shape.page_bytes // 2)
    halves = [np.ascontiguousarray(index[:, part]) for part in (slice(0, 32), slice(32, 80))]
    layout = Layout(shape.page_bytes, dtype, cells, *halves)
    row = bytearray(shape.page_bytes)
    fixed.decode(layout, "fp8", fixed.encode(layout, "fp8", memoryview(page.tobytes())), memoryview(row))
    assert there_and_back(shape, page)[0].tobytes() == bytes(row)


def test_any_bytes_in_a_row_are_finite_numbers_in_the_pages():
    shape = PageShape("float32", heads=2, runs=4, k_run=8, v_run=8, heads_first=True)
    rows = np.random.default_rng(3).integers(0, 256, shape.part_bytes, dtype=np.uint8)
    rows[:8].view("<f4")[:] = np.nan, np.inf
    page = np.full(shape.page_bytes, 0xFF, dtype=np.uint8)
    table = PageTable.of([(page.ctypes.data, 1, page.nbytes, page.nbytes)])
    pages_fp8.scatter_pages(shape, table, np.zeros(1, dtype=np.int64), rows, np.zeros(1, dtype=np.int64))
    assert np.isfinite(page.view("<f4")).all()


class TestRefusal:
    SHAPE = PageShape("bfloat16", heads=1, runs=4, k_run=8, v_run=8, heads_first=True)

    def copy(self, *, block=0, offset=0, page_bytes=None, rows=None):
        pool = np.zeros(4 * self.SHAPE.page_bytes, dtype=np.uint8)
        page_bytes = page_bytes or self.SHAPE.page_bytes
        table = PageTable.of([(pool.ctypes.data, 2, 2 * self.SHAPE.page_bytes, page_bytes)])
        rows = np.full(2 * self.SHAPE.part_bytes, 7, dtype=np.uint8) if rows is None else rows
        ids, offsets = np.array([1, block], dtype=np.int64), np.array([0, offset], dtype=np.int64)
        try:
            pages_fp8.gather_pages(self.SHAPE, table, ids, rows, offsets)
        finally:
            assert (rows == 7).all()

    def test_of_a_block_that_is_not_there_comes_before_a_byte_has_moved(self):
        with pytest.raises(ValueError, match=r"block_ids\[1\]: block 2 is outside \[0, 2\)"):
            self.copy(block=2)

    def test_of_a_row_that_is_too_short_names_what_a_part_takes(self):
        with pytest.raises(ValueError, match=r"row_offsets\[1\]: bytes \[129, 257\) are outside rows of \[0, 256\)"):
            self.copy(offset=129)

    def test_of_half_a_page_names_both_numbers(self):
        with pytest.raises(ValueError, match="192 bytes are no whole number of pages of 128 bytes"):
            self.copy(page_bytes=192)

    def test_of_rows_that_cannot_be_written(self):
        with pytest.raises(ValueError, match="read-only"):
            self.copy(rows=np.frombuffer(bytes([7] * 1024), dtype=np.uint8))

    @pytest.mark.parametrize("numbers", [(0, 1, 1, 1), (1, 1, 0, 1), (1 << 16, 1 << 10, 16, 16)])
    def test_of_a_shape_that_cannot_be(self, numbers):
        with pytest.raises(ValueError, match="heads, runs, k_run, v_run"):
            PageShape("bfloat16", *numbers, heads_first=True)
