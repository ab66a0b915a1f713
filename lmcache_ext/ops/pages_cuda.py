"""Copies KV pages between vLLM's paged tensors on a GPU and rows, in one launch; the twin of `ops.pages`.

The library is optional and built by hand (``python scripts/build_cuda.py``). vLLM's own copier is the default on CUDA:
until `benchmarks/gpu/pages.py` has measured this one faster it only runs where it is asked for (`offload.cuda_copier`).

Thread: any. Order: that of `stream`. Owner: the caller keeps tensors and rows alive until the stream has
passed; the tables are read before a call returns. Failure: a bad argument is a ``ValueError`` before
anything is enqueued, a refused launch a ``RuntimeError``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal

from lmcache_ext.ops import native
from lmcache_ext.ops.table import Int64s, PageTable

Way = Literal["gather", "scatter"]

ABI = 1  # kvx_cuda_abi() in csrc/pages.cu
DEFAULT_CTAS = 16  # blocks of 256 threads: enough in flight for PCIe 5, an eighth of an H100's multiprocessors

_VECTOR_BYTES = 16  # of a lane at once; csrc/pages_transfer.h
_UNALIGNED = -(2**63)
_LAUNCH_FAILED = _UNALIGNED + 1
_MOST_ERROR = 1 << 16


def available() -> bool:
    """Whether the library was built and loads here."""
    return _library() is not None


def copy_pages(
    way: Way,
    table: PageTable,
    block_ids: Int64s,
    rows_ptr: int,
    rows_bytes: int,
    row_offsets: Int64s,
    *,
    stream: int,
    num_ctas: int = DEFAULT_CTAS,
) -> int:
    """Enqueue the copy of block ``block_ids[i]`` to or from byte ``row_offsets[i]`` of rows; return its bytes.

    `rows_ptr` is an address that the GPU can use: pinned host memory, or its own. `stream` is a
    ``cudaStream_t``. Every address, stride, page and offset must be a multiple of 16.
    """
    library = _library()
    if library is None:
        raise RuntimeError(f"{native.CUDA_LIBRARY.name} is not built: run scripts/build_cuda.py")
    if block_ids.shape != row_offsets.shape or num_ctas < 1:
        raise ValueError(f"{block_ids.shape} block_ids, {row_offsets.shape} row_offsets, {num_ctas} blocks of threads")
    function = library.kvx_cuda_gather_pages if way == "gather" else library.kvx_cuda_scatter_pages
    tables = (table.layout.ctypes.data, len(table.tensors), block_ids.ctypes.data, row_offsets.ctypes.data)
    return judge(int(function(*tables, block_ids.size, rows_ptr, rows_bytes, num_ctas, stream)))


def check_table(table: PageTable) -> None:
    """Raise ValueError where the kernels take none of its pages."""
    for index, tensor in enumerate(table.tensors):
        if any(number % _VECTOR_BYTES for number in (tensor.data_ptr, tensor.block_stride_bytes, tensor.page_bytes)):
            raise ValueError(
                f"tensor {index}: pages of {tensor.page_bytes} bytes every {tensor.block_stride_bytes} bytes "
                f"from {tensor.data_ptr:#x} on: not all are multiples of {_VECTOR_BYTES}"
            )


def judge(result: int) -> int:
    """Pass bytes on; turn a refusal into an error."""
    if result >= 0:
        return result
    if result == _UNALIGNED:
        raise ValueError("an address, a stride, a page or an offset is not a multiple of 16 bytes")
    if result < _LAUNCH_FAILED + _MOST_ERROR:
        raise RuntimeError(f"the launch failed with CUDA error {result - _LAUNCH_FAILED}")
    raise ValueError(f"block or tensor {-result - 1} is outside its tensor or the rows")


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load_cuda("kvx_cuda_abi", ABI)
    if library is None:
        return None
    pointer = ctypes.c_void_p
    library.kvx_cuda_copy_batch.argtypes = [pointer, pointer, pointer, ctypes.c_size_t, pointer]
    return bind(library)


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what gather and scatter take."""
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for function in (library.kvx_cuda_gather_pages, library.kvx_cuda_scatter_pages):
        function.argtypes = [pointer, int32, pointer, pointer, int64, pointer, int64, int32, pointer]
        function.restype = int64
    return library
