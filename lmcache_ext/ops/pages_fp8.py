"""Copies KV pages between vLLM's paged tensors and rows that hold a byte for each element (e4m3).

The same as `ops.pages`, for pages of known shape: a page is quantised on its way into the row and restored on its way
back. Each head's keys of a block have a scale, and its values another. What is not a finite number counts as 0 and
spoils no neighbour; the format is in serde/README.md.

Thread, order, owner, failure: as for `ops.pages`. There is nothing here without the compiled library (`available`): its
plain twin, `pages_fp8_numpy`, is for tests.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from lmcache_ext.ops import native
from lmcache_ext.ops.page_shape import PageShape, Struct
from lmcache_ext.ops.pages import check_arguments, judge
from lmcache_ext.ops.table import Bytes, Int64s, PageTable

ABI = 1  # kvx_fp8_abi() in csrc/pages_fp8.cpp


def available() -> bool:
    """Whether the compiled copier is here."""
    return _library() is not None


def gather_pages(
    shape: PageShape, table: PageTable, block_ids: Int64s, rows: Bytes | memoryview, row_offsets: Int64s
) -> int:
    """Quantise block ``block_ids[i]`` into byte ``row_offsets[i]`` of ``rows``; return bytes of rows written.

    Arguments as for `ops.pages.gather_pages`; a block takes ``shape.block_bytes(table)``. Raises ``ValueError``.
    """
    flat = check_arguments(block_ids, rows, row_offsets)
    if not flat.flags.writeable:
        raise ValueError("rows: read-only, expected a writable buffer to gather into")
    return _call(_loaded().kvx_fp8_gather_pages, shape, table, block_ids, flat, row_offsets)


def scatter_pages(
    shape: PageShape, table: PageTable, block_ids: Int64s, rows: Bytes | memoryview, row_offsets: Int64s
) -> int:
    """Restore block ``block_ids[i]`` from byte ``row_offsets[i]`` of ``rows``; return bytes of rows read."""
    flat = check_arguments(block_ids, rows, row_offsets)
    return _call(_loaded().kvx_fp8_scatter_pages, shape, table, block_ids, flat, row_offsets)


def _call(
    function: Any,  # noqa: ANN401  ctypes' function pointers have no public type
    shape: PageShape,
    table: PageTable,
    block_ids: Int64s,
    rows: Bytes,
    row_offsets: Int64s,
) -> int:
    block_bytes = shape.block_bytes(table)
    tables = (table.layout.ctypes.data, len(table.tensors), block_ids.ctypes.data, row_offsets.ctypes.data)
    result = int(function(shape.struct, *tables, block_ids.size, rows.ctypes.data, rows.size))
    return judge(result, table, block_ids, rows, row_offsets, block_bytes=block_bytes)


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the compiled copier is missing: this package was installed without a C++ compiler")
    return library


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("_pages_fp8", "kvx_fp8_abi", ABI)
    if library is not None:
        pointer, int64 = ctypes.c_void_p, ctypes.c_int64
        for function in (library.kvx_fp8_gather_pages, library.kvx_fp8_scatter_pages):
            shape = ctypes.POINTER(Struct)
            function.argtypes = [shape, pointer, ctypes.c_int32, pointer, pointer, int64, pointer, int64]
            function.restype = int64
    return library
