"""Copies KV pages between vLLM's paged tensors on a GPU and rows that hold a byte for each element (e4m3).

The same rows as `ops.pages_fp8` writes, bit for bit, quantised and restored on the way: half of the bytes of 16-bit KV
cross the bus. The library is optional (``python scripts/build_cuda.py``). `benchmarks/gpu/pages_fp8.py` checks and
times it on a GPU, which has not been done yet. `offload.cuda_copier` uses it.

Thread, order, owner, failure: as for `ops.pages_cuda`.
"""

from __future__ import annotations

import ctypes
from functools import cache

from lmcache_ext.ops import native
from lmcache_ext.ops.chunks_cuda import present
from lmcache_ext.ops.page_shape import PageShape, Struct
from lmcache_ext.ops.pages_cuda import DEFAULT_CTAS, Way, judge
from lmcache_ext.ops.table import Int64s, PageTable

ABI = 1  # kvx_cuda_fp8_abi() in csrc/pages_fp8.cu


def available() -> bool:
    """Whether the library was built and loads here."""
    return _library() is not None


def copy_pages(
    way: Way,
    shape: PageShape,
    table: PageTable,
    block_ids: Int64s,
    rows_ptr: int,
    rows_bytes: int,
    row_offsets: Int64s,
    *,
    stream: int,
    num_ctas: int = DEFAULT_CTAS,
) -> int:
    """Enqueue the copy of block ``block_ids[i]`` to or from byte ``row_offsets[i]`` of rows; return bytes of rows.

    Arguments as for `ops.pages_cuda.copy_pages`; a block takes ``shape.block_bytes(table)``. Where an address, a
    stride, an offset or a run is not a multiple of 16 bytes, elements are copied one by one, which is slow.
    """
    library = present(_library())
    if block_ids.shape != row_offsets.shape or num_ctas < 1:
        raise ValueError(f"{block_ids.shape} block_ids, {row_offsets.shape} row_offsets, {num_ctas} blocks of threads")
    shape.block_bytes(table)  # refuses tensors that hold no whole pages, by name of the numbers
    function = library.kvx_cuda_fp8_gather_pages if way == "gather" else library.kvx_cuda_fp8_scatter_pages
    tables = (table.layout.ctypes.data, len(table.tensors), block_ids.ctypes.data, row_offsets.ctypes.data)
    return judge(int(function(shape.struct, *tables, block_ids.size, rows_ptr, rows_bytes, num_ctas, stream)))


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load_cuda("kvx_cuda_fp8_abi", ABI)
    return None if library is None else bind(library)


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions take."""
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for function in (library.kvx_cuda_fp8_gather_pages, library.kvx_cuda_fp8_scatter_pages):
        shape = ctypes.POINTER(Struct)
        function.argtypes = [shape, pointer, int32, pointer, pointer, int64, pointer, int64, int32, pointer]
        function.restype = int64
    return library
