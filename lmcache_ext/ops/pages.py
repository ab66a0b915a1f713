"""Copies KV pages between vLLM's paged tensors and rows of host memory.

A row holds the pages of one or more blocks side by side; for each block, one page
of every tensor in the table's order::

    rows  | ........ | t0 | t1 | t2 | t0 | t1 | t2 | ........ |
                     ^ row_offsets[0]   ^ row_offsets[1]

Thread: both functions may run in any number of threads at once, on different
bytes; the compiled one runs without the GIL. Order: blocks are copied in the order
given; where two name the same bytes, the later wins. Owner: nothing is kept after
the call. Failure: a bad argument raises before a single byte has moved.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np

from lmcache_ext.ops import native, pages_numpy
from lmcache_ext.ops.table import Bytes, Int64s, PageTable, PageTensor

__all__ = ["PageTable", "PageTensor", "backend", "check_arguments", "gather_pages", "judge", "scatter_pages"]

ABI = 1  # kvx_abi() in csrc/pages.cpp

Copy = Callable[[PageTable, Int64s, Bytes, Int64s], int]


def gather_pages(table: PageTable, block_ids: Int64s, rows: Bytes | memoryview, row_offsets: Int64s) -> int:
    """Copy pages into ``rows``: block ``block_ids[i]`` to byte ``row_offsets[i]``; return bytes copied.

    ``block_ids`` and ``row_offsets``: int64 ``(num_blocks,)``. ``rows``: uint8
    ``(rows_bytes,)`` or a contiguous memoryview, writable. Raises ``ValueError``.
    """
    flat = check_arguments(block_ids, rows, row_offsets)
    if not flat.flags.writeable:
        raise ValueError("rows: read-only, expected a writable buffer to gather into")
    return judge(_gather()(table, block_ids, flat, row_offsets), table, block_ids, flat, row_offsets)


def scatter_pages(table: PageTable, block_ids: Int64s, rows: Bytes | memoryview, row_offsets: Int64s) -> int:
    """Copy bytes ``row_offsets[i]`` of ``rows`` to the pages of block ``block_ids[i]``; return bytes copied.

    Arguments as for ``gather_pages``; ``rows`` may be read-only. Raises ``ValueError``.
    """
    flat = check_arguments(block_ids, rows, row_offsets)
    return judge(_scatter()(table, block_ids, flat, row_offsets), table, block_ids, flat, row_offsets)


def backend() -> Literal["native", "numpy"]:
    """Which copier runs here; the caller logs it once."""
    return "numpy" if _library() is None else "native"


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled copier; None where it was not built, does not load, or is of another ABI."""
    return native.load("_pages", "kvx_abi", ABI)


@cache
def _gather() -> Copy:
    library = _library()
    return pages_numpy.gather_pages if library is None else _native(library.kvx_gather_pages)


@cache
def _scatter() -> Copy:
    library = _library()
    return pages_numpy.scatter_pages if library is None else _native(library.kvx_scatter_pages)


def _native(function: Any) -> Copy:  # noqa: ANN401  ctypes' function pointers have no public type
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, ctypes.c_int32, pointer, pointer, int64, pointer, int64]
    function.restype = int64

    def copy(table: PageTable, block_ids: Int64s, rows: Bytes, row_offsets: Int64s) -> int:
        return int(
            function(
                table.layout.ctypes.data,
                len(table.tensors),
                block_ids.ctypes.data,
                row_offsets.ctypes.data,
                block_ids.size,
                rows.ctypes.data,
                rows.size,
            )
        )

    return copy


def check_arguments(block_ids: Int64s, rows: Bytes | memoryview, row_offsets: Int64s) -> Bytes:
    """Check what the arrays are, and return ``rows`` as a flat view."""
    _check_array("block_ids", block_ids, np.int64)
    _check_array("row_offsets", row_offsets, np.int64)
    if block_ids.size != row_offsets.size:
        raise ValueError(
            f"row_offsets: axis 0 (num_blocks) has {row_offsets.size} entries, block_ids has {block_ids.size}"
        )
    if isinstance(rows, memoryview):
        if not rows.c_contiguous:
            raise ValueError(f"rows: memoryview with strides {rows.strides} of shape {rows.shape} is not contiguous")
        # NumPy cannot cast an empty view, and an empty view has nothing to cast
        return np.frombuffer(rows.cast("B"), dtype=np.uint8) if rows.nbytes else np.empty(0, dtype=np.uint8)
    _check_array("rows", rows, np.uint8)
    return rows


def _check_array(name: str, array: np.ndarray[Any, Any], dtype: type[np.generic]) -> None:
    if array.dtype != dtype:
        raise ValueError(f"{name}: dtype is {array.dtype}, expected {np.dtype(dtype)}")
    if array.ndim != 1:
        raise ValueError(f"{name}: has {array.ndim} axes (shape {array.shape}), expected 1")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: axis 0 has a stride of {array.strides[0]} bytes, expected {array.itemsize}")


def judge(
    result: int,
    table: PageTable,
    block_ids: Int64s,
    rows: Bytes,
    row_offsets: Int64s,
    *,
    block_bytes: int | None = None,
) -> int:
    """Pass bytes copied on; turn a violation into an error that names both numbers.

    `block_bytes` is what a block takes in a row, where that is not its pages as they are.
    """
    if result >= 0:
        return result
    block_bytes = table.block_bytes if block_bytes is None else block_bytes
    index = -result - 1
    if index >= block_ids.size:
        raise ValueError(f"tensor {index - block_ids.size}: {table.tensors[index - block_ids.size]} is out of range")
    if not 0 <= block_ids[index] < table.num_blocks:
        raise ValueError(f"block_ids[{index}]: block {block_ids[index]} is outside [0, {table.num_blocks})")
    start = int(row_offsets[index])
    raise ValueError(
        f"row_offsets[{index}]: bytes [{start}, {start + block_bytes}) are outside rows of [0, {rows.size})"
    )
