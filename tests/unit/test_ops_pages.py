"""The page copier: the compiled library and its NumPy twin, held against each other bit for bit."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_ext.ops import pages, pages_numpy
from lmcache_ext.ops.pages import PageTable, gather_pages, scatter_pages

FUNCTIONS = [
    pytest.param(gather_pages, scatter_pages, id="chosen"),
    pytest.param(pages_numpy.gather_pages, pages_numpy.scatter_pages, id="numpy"),
]


@dataclass
class Case:
    """Tensors side by side in one pool of random bytes, and a list of blocks to copy."""

    pool: np.ndarray  # uint8, every tensor's bytes and the gaps between them
    shapes: list[tuple[int, int, int, int]]  # start in pool, num_blocks, stride, page_bytes
    block_ids: np.ndarray
    rows: np.ndarray
    row_offsets: np.ndarray

    def table(self, pool: np.ndarray) -> PageTable:
        return PageTable.of((pool.ctypes.data + start, *rest) for start, *rest in self.shapes)

    def spans(self):
        """Yield (slice of pool, slice of rows) of every page, in the order of copying."""
        for block_id, offset in zip(self.block_ids.tolist(), self.row_offsets.tolist(), strict=True):
            for start, _, stride, page_bytes in self.shapes:
                first = start + block_id * stride
                yield slice(first, first + page_bytes), slice(offset, offset + page_bytes)
                offset += page_bytes


@st.composite
def cases(draw) -> Case:
    num_blocks = draw(st.integers(1, 6))
    # 9000 passes the size from which the library streams, 1-200 tries every alignment
    page_bytes = st.one_of(st.integers(1, 200), st.integers(4000, 9000))
    shapes, end = [], draw(st.integers(0, 70))
    for _ in range(draw(st.integers(1, 4))):
        size, gap = draw(page_bytes), draw(st.sampled_from([0, 0, 1, 33]))
        shapes.append((end, num_blocks, size + gap, size))
        end += num_blocks * (size + gap) + draw(st.sampled_from([0, 0, 5]))
    if draw(st.booleans()):  # all layers of a block together, so that pages join into one run
        stride = sum(shape[3] for shape in shapes)
        starts = np.cumsum([0] + [shape[3] for shape in shapes[:-1]]).tolist()
        shapes = [(start, num_blocks, stride, shape[3]) for start, shape in zip(starts, shapes, strict=True)]
    block_ids = draw(st.lists(st.integers(0, num_blocks - 1), unique=True, max_size=num_blocks))
    block_bytes = sum(shape[3] for shape in shapes)
    lead = draw(st.integers(0, 65))
    places = draw(st.permutations(range(len(block_ids) + 1)))[: len(block_ids)]
    offsets = [lead + place * block_bytes for place in places]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return Case(
        pool=rng.integers(0, 256, max(end, 1), dtype=np.uint8),
        shapes=shapes,
        block_ids=np.array(block_ids, dtype=np.int64),
        rows=rng.integers(0, 256, lead + (len(block_ids) + 1) * block_bytes, dtype=np.uint8),
        row_offsets=np.array(offsets, dtype=np.int64),
    )


def small_case() -> tuple[PageTable, np.ndarray, np.ndarray]:
    """Two tensors of 4 blocks of 16 bytes; returns (table, pool, rows for 4 blocks)."""
    pool = np.arange(128, dtype=np.uint8)
    table = PageTable.of([(pool.ctypes.data, 4, 16, 16), (pool.ctypes.data + 64, 4, 16, 16)])
    return table, pool, np.full(128, 255, dtype=np.uint8)


def int64s(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_this_checkout_runs_the_compiled_copier():
    if pages.backend() == "numpy":
        pytest.skip("no compiler was there when the package was installed")
    assert pages.backend() == "native"


@pytest.mark.parametrize(("gather", "_scatter"), FUNCTIONS)
@given(case=cases())
def test_gather_fills_its_rows_and_touches_nothing_else(gather, _scatter, case):
    expected, pool, rows = case.rows.copy(), case.pool.copy(), case.rows.copy()
    for in_pool, in_row in case.spans():
        expected[in_row] = pool[in_pool]
    copied = gather(case.table(pool), case.block_ids, rows, case.row_offsets)
    assert copied == sum(in_row.stop - in_row.start for _, in_row in case.spans())
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(pool, case.pool)


@pytest.mark.parametrize(("_gather", "scatter"), FUNCTIONS)
@given(case=cases())
def test_scatter_fills_its_pages_and_touches_nothing_else(_gather, scatter, case):
    expected, pool, rows = case.pool.copy(), case.pool.copy(), case.rows.copy()
    for in_pool, in_row in case.spans():
        expected[in_pool] = rows[in_row]
    copied = scatter(case.table(pool), case.block_ids, rows, case.row_offsets)
    assert copied == sum(in_row.stop - in_row.start for _, in_row in case.spans())
    np.testing.assert_array_equal(pool, expected)
    np.testing.assert_array_equal(rows, case.rows)


@given(case=cases())
def test_scatter_brings_back_what_gather_took(case):
    pool, rows = case.pool.copy(), case.rows.copy()
    gather_pages(case.table(pool), case.block_ids, rows, case.row_offsets)
    for in_pool, _ in case.spans():
        pool[in_pool] = 0
    scatter_pages(case.table(pool), case.block_ids, rows, case.row_offsets)
    np.testing.assert_array_equal(pool, case.pool)


@pytest.mark.parametrize("block_id", [-1, 4, 2**62, -(2**63)])
@pytest.mark.parametrize("copy", [gather_pages, scatter_pages])
def test_block_outside_the_table_is_refused_and_nothing_is_copied(copy, block_id):
    table, pool, rows = small_case()
    with pytest.raises(ValueError, match=rf"block_ids\[1\]: block {block_id} is outside \[0, 4\)"):
        copy(table, int64s(0, block_id), rows, int64s(0, 32))
    assert (rows == 255).all()
    np.testing.assert_array_equal(pool, np.arange(128, dtype=np.uint8))


@pytest.mark.parametrize("offset", [-1, 97, 128, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("copy", [gather_pages, scatter_pages])
def test_offset_outside_the_rows_is_refused_and_nothing_is_copied(copy, offset):
    table, pool, rows = small_case()
    with pytest.raises(ValueError, match=rf"row_offsets\[1\]: bytes \[{offset}, .* outside rows of \[0, 128\)"):
        copy(table, int64s(0, 1), rows, int64s(0, offset))
    assert (rows == 255).all()
    np.testing.assert_array_equal(pool, np.arange(128, dtype=np.uint8))


@pytest.mark.parametrize(("gather", "scatter"), FUNCTIONS[1:])
def test_twin_numbers_the_first_bad_block_as_the_library_does(gather, scatter):
    table, _, rows = small_case()
    assert gather(table, int64s(0, 9, 9), rows, int64s(0, 0, 0)) == -2
    assert scatter(table, int64s(3, 0), rows, int64s(97, 0)) == -1


def test_the_smallest_tensor_bounds_the_block_ids():
    pool, rows = np.zeros(96, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    table = PageTable.of([(pool.ctypes.data, 4, 16, 16), (pool.ctypes.data + 64, 2, 16, 16)])
    with pytest.raises(ValueError, match=r"block 2 is outside \[0, 2\)"):
        gather_pages(table, int64s(2), rows, int64s(0))


@pytest.mark.parametrize("rows", [np.zeros(8, dtype=np.uint8), memoryview(bytearray(0))], ids=["array", "empty view"])
def test_no_blocks_copy_no_bytes(rows):
    table, _, _ = small_case()
    assert gather_pages(table, int64s(), rows, int64s()) == 0
    assert scatter_pages(table, int64s(), rows, int64s()) == 0


def test_rows_may_be_a_two_dimensional_memoryview():
    table, pool, rows = small_case()
    view = memoryview(rows).cast("B", (4, 32))
    assert gather_pages(table, int64s(2), view, int64s(32)) == 32
    np.testing.assert_array_equal(rows[32:64], np.concatenate([pool[32:48], pool[96:112]]))


def test_a_view_given_as_rows_can_be_released_afterwards():
    table, _, _ = small_case()
    region = bytearray(128)
    with memoryview(region) as view:
        gather_pages(table, int64s(0), view, int64s(0))
    region.clear()  # BufferError if a copy had kept a view on it


@pytest.mark.parametrize(
    ("block_ids", "rows", "row_offsets", "message"),
    [
        (np.zeros(1, np.int32), np.zeros(64, np.uint8), int64s(0), r"block_ids: dtype is int32, expected int64"),
        (int64s(0), np.zeros(64, np.uint8), np.zeros(1, np.uint64), r"row_offsets: dtype is uint64, expected int64"),
        (int64s(0), np.zeros(64, np.int8), int64s(0), r"rows: dtype is int8, expected uint8"),
        (int64s(0), np.zeros((2, 32), np.uint8), int64s(0), r"rows: has 2 axes \(shape \(2, 32\)\), expected 1"),
        (int64s(0, 1, 2, 3)[::2], np.zeros(64, np.uint8), int64s(0, 0), r"block_ids: axis 0 has a stride of 16 bytes"),
        (int64s(0), np.zeros(128, np.uint8)[::2], int64s(0), r"rows: axis 0 has a stride of 2 bytes, expected 1"),
        (int64s(0, 1), np.zeros(64, np.uint8), int64s(0), r"axis 0 \(num_blocks\) has 1 entries, block_ids has 2"),
        (int64s(0), memoryview(bytearray(64))[::2], int64s(0), r"rows: memoryview .* is not contiguous"),
    ],
)
def test_wrong_arrays_are_refused_by_name(block_ids, rows, row_offsets, message):
    table, _, _ = small_case()
    with pytest.raises(ValueError, match=message):
        gather_pages(table, block_ids, rows, row_offsets)


def test_read_only_rows_can_be_scattered_from_but_not_gathered_into():
    table, _, _ = small_case()
    rows = bytes(32)
    assert scatter_pages(table, int64s(0), memoryview(rows), int64s(0)) == 32
    with pytest.raises(ValueError, match="rows: read-only"):
        gather_pages(table, int64s(0), memoryview(rows), int64s(0))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ((0, 4, 16, 16), "tensor 1: data_ptr is 0"),
        ((4096, 0, 16, 16), "tensor 1: 0 blocks of 16 bytes"),
        ((4096, 4, 16, 0), "tensor 1: 4 blocks of 0 bytes"),
        ((4096, 4, -16, 16), "tensor 1: 4 blocks with a stride of -16 bytes"),
        ((4096, 4, 2**62, 16), "tensor 1: 4 blocks with a stride of 4611686018427387904 bytes"),
        ((4096, 4, 15, 16), "tensor 1: a page of 16 bytes does not fit the block stride of 15 bytes"),
    ],
)
def test_impossible_tensors_are_refused_by_number(tensor, message):
    with pytest.raises(ValueError, match=message):
        PageTable.of([(4096, 4, 16, 16), tensor])


def test_a_table_needs_a_tensor():
    with pytest.raises(ValueError, match="0 given"):
        PageTable.of([])


def test_two_threads_copy_at_once():
    num_blocks, page_bytes = 64, 20_000
    pools = [np.random.default_rng(seed).integers(0, 256, num_blocks * page_bytes, dtype=np.uint8) for seed in (1, 2)]
    rows = np.zeros(2 * num_blocks * page_bytes, dtype=np.uint8)
    back = [np.zeros_like(pool) for pool in pools]
    start = threading.Barrier(2)

    def there_and_back(index: int) -> None:
        block_ids = np.random.default_rng(index).permutation(num_blocks).astype(np.int64)
        offsets = (np.arange(num_blocks, dtype=np.int64) * 2 + index) * page_bytes  # interleaved with the other
        start.wait()
        for _ in range(20):
            gather_pages(
                PageTable.of([(pools[index].ctypes.data, num_blocks, page_bytes, page_bytes)]), block_ids, rows, offsets
            )
            scatter_pages(
                PageTable.of([(back[index].ctypes.data, num_blocks, page_bytes, page_bytes)]), block_ids, rows, offsets
            )

    threads = [threading.Thread(target=there_and_back, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pool, copy in zip(pools, back, strict=True):
        np.testing.assert_array_equal(copy, pool)
