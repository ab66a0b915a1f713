"""Codes rows in a GPU's memory as `ops.cachegen` does in a host's: the same payloads, the same rows, bit for bit.

The library is optional (``python scripts/build_cuda.py``); `benchmarks/gpu/codecs.py` checks and times it.

The contract is that of `ops.chunks_cuda`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np

from lmcache_ext.errors import FrameError
from lmcache_ext.ops import call, native
from lmcache_ext.ops.cachegen import REFUSALS, Bins, check_bins
from lmcache_ext.ops.chunks_cuda import LAYOUT, Chunk, Memory, array_of, image, judge, present
from lmcache_ext.ops.layout import Layout
from lmcache_ext.ops.table import Bytes, Int64s

ABI = 1  # kvx_cuda_cachegen_abi() in csrc/cachegen.cu

_NO_ROOM = -7


def available() -> bool:
    """Whether the library was built and loads here."""
    return _library() is not None


def tables(layout: Layout, bins: Bins | None = None) -> Bytes:
    """The image that every call reads, for the caller to copy to the GPU; without bins it is for `decode` alone."""
    bins = np.ones((layout.layers, 2), dtype=np.float32) if bins is None else np.ascontiguousarray(bins)
    check_bins(layout, bins)
    filled = image(int(_loaded().kvx_cuda_cachegen_tables_bytes(layout.struct)))
    judge(int(_loaded().kvx_cuda_cachegen_tables(layout.struct, bins.ctypes.data, filled.ctypes.data)))
    return filled


def scratch_bytes(layout: Layout, *, encodes: bool) -> int:
    """Of each chunk that is coded at a time."""
    return int(_loaded().kvx_cuda_cachegen_scratch_bytes(layout.struct, int(encodes)))


def encode(layout: Layout, memory: Memory, chunks: Sequence[Chunk], *, stream: int) -> None:
    """Enqueue the coding of rows, each with room for `ops.cachegen.bound`; results become the `lengths` of payloads."""
    judge(int(_loaded().kvx_cuda_cachegen_encode(*_arguments(layout, memory, chunks), stream)))


def decode(layout: Layout, memory: Memory, chunks: Sequence[Chunk], *, stream: int) -> None:
    """Enqueue the coding of payloads back to rows; results become 0, or what `refusal` explains."""
    judge(int(_loaded().kvx_cuda_cachegen_decode(*_arguments(layout, memory, chunks), stream)))


def lengths(results: Int64s) -> list[int | None]:
    """The lengths of payloads after `encode`; None where one would exceed its room: take half the bins there."""
    return [None if result == _NO_ROOM else int(result) for result in results]


def refusal(result: int, payload_bytes: int) -> FrameError | None:
    """Why `decode` has refused a payload, as `ops.cachegen.decode` would have said it."""
    if result == 0:
        return None
    return call.refusal(REFUSALS, result, found=payload_bytes)


def _arguments(layout: Layout, memory: Memory, chunks: Sequence[Chunk]) -> tuple[object, ...]:
    tables_ptr, results_ptr, *scratch = memory
    return (layout.struct, tables_ptr, array_of(chunks), len(chunks), results_ptr, *scratch)


def _loaded() -> ctypes.CDLL:
    return present(_library())


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load_cuda("kvx_cuda_cachegen_abi", ABI)
    return None if library is None else bind(library)


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions take."""
    layout, pointer, int32, int64 = LAYOUT, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.kvx_cuda_cachegen_tables_bytes.argtypes = [layout]
    library.kvx_cuda_cachegen_scratch_bytes.argtypes = [layout, int32]
    library.kvx_cuda_cachegen_tables.argtypes = [layout, pointer, pointer]
    library.kvx_cuda_cachegen_tables_bytes.restype = library.kvx_cuda_cachegen_scratch_bytes.restype = int64
    library.kvx_cuda_cachegen_tables.restype = int64
    for function in (library.kvx_cuda_cachegen_encode, library.kvx_cuda_cachegen_decode):
        function.argtypes = [layout, pointer, pointer, int64, pointer, pointer, int64, pointer]
        function.restype = int64
    return library
