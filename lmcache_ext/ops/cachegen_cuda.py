"""Codes rows in a GPU's memory as `ops.cachegen` does in a host's: the same payloads, the same rows, bit for bit.

The library is optional (``python scripts/build_cuda.py``); `benchmarks/gpu/codecs.py` checks and times it.

Thread: any. Order: that of `stream`. Owner: the caller keeps tables, results, scratch, rows and payloads, all of them
in the GPU's memory, alive until the stream has passed. Failure: a bad argument is a ``ValueError`` before anything is
enqueued, a refused launch a ``RuntimeError``; what a payload is refused for is in its result (`refusal`), and its row
then is as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from lmcache_ext.errors import FrameError
from lmcache_ext.ops import native
from lmcache_ext.ops.cachegen import REFUSALS, Bins
from lmcache_ext.ops.layout import Layout, Struct
from lmcache_ext.ops.table import Bytes, Int64s

ABI = 1  # kvx_cuda_cachegen_abi() in csrc/cachegen.cu

_UNALIGNED = -(2**63)
_SCRATCH_TOO_SMALL = _UNALIGNED + 1
_LAUNCH_FAILED = _UNALIGNED + 2
_NO_ROOM = -7


class Chunk(NamedTuple):
    """Addresses of a row and its payload; how long the payload is, or may become: `ops.cachegen.bound`."""

    row_ptr: int
    payload_ptr: int
    payload_bytes: int


class Memory(NamedTuple):
    """Addresses of what a call needs: the image that `tables` made, an int64 for each chunk, scratch.

    Tables and scratch begin at multiples of 16. Chunks share scratch that is too small for all of them in turns.
    """

    tables_ptr: int
    results_ptr: int
    scratch_ptr: int
    scratch_bytes: int


def available() -> bool:
    """Whether the library was built and loads here."""
    return _library() is not None


def tables(layout: Layout, bins: Bins | None = None) -> Bytes:
    """The image that every call reads, for the caller to copy to the GPU; without bins it is for `decode` alone."""
    bins = np.ones((layout.layers, 2), dtype=np.float32) if bins is None else np.ascontiguousarray(bins)
    if bins.shape != (layout.layers, 2) or bins.dtype != np.float32 or not (bins > 0).all():
        raise ValueError(f"bins: {bins.dtype} {bins.shape}, expected positive float32 {(layout.layers, 2)}")
    size = int(_loaded().kvx_cuda_cachegen_tables_bytes(layout.struct))
    raw = np.zeros(size + 16, dtype=np.uint8)
    image = raw[-raw.ctypes.data % 16 :][:size]
    _judge(int(_loaded().kvx_cuda_cachegen_tables(layout.struct, bins.ctypes.data, image.ctypes.data)))
    return image


def scratch_bytes(layout: Layout, *, encodes: bool) -> int:
    """Of each chunk that is coded at a time."""
    return int(_loaded().kvx_cuda_cachegen_scratch_bytes(layout.struct, int(encodes)))


def encode(layout: Layout, memory: Memory, chunks: Sequence[Chunk], *, stream: int) -> None:
    """Enqueue the coding of rows; results become the lengths of payloads (`lengths`)."""
    _judge(int(_loaded().kvx_cuda_cachegen_encode(*_arguments(layout, memory, chunks), stream)))


def decode(layout: Layout, memory: Memory, chunks: Sequence[Chunk], *, stream: int) -> None:
    """Enqueue the coding of payloads back to rows; results become 0, or what `refusal` explains."""
    _judge(int(_loaded().kvx_cuda_cachegen_decode(*_arguments(layout, memory, chunks), stream)))


def lengths(results: Int64s) -> list[int | None]:
    """The lengths of payloads after `encode`; None where one would exceed its room: take half the bins there."""
    return [None if result == _NO_ROOM else int(result) for result in results]


def refusal(result: int, payload_bytes: int) -> FrameError | None:
    """Why `decode` has refused a payload, as `ops.cachegen.decode` would have said it."""
    if result == 0:
        return None
    kind, text = REFUSALS[result]
    return kind(text.format(found=payload_bytes))


def _arguments(layout: Layout, memory: Memory, chunks: Sequence[Chunk]) -> tuple[object, ...]:
    array = (_Chunk * max(1, len(chunks)))(*(_Chunk(*chunk) for chunk in chunks))
    return (
        layout.struct,
        memory.tables_ptr,
        array,
        len(chunks),
        memory.results_ptr,
        memory.scratch_ptr,
        memory.scratch_bytes,
    )


def _judge(result: int) -> None:
    if result == _UNALIGNED:
        raise ValueError("a cell or a row is not a multiple of its elements, or tables or scratch not of 16 bytes")
    if result == _SCRATCH_TOO_SMALL:
        raise ValueError("scratch: less than scratch_bytes of the layout")
    if result != 0:
        raise RuntimeError(f"a launch failed with CUDA error {result - _LAUNCH_FAILED}")


class _Chunk(ctypes.Structure):
    """`kvx::cachegen::Chunk` in csrc/cachegen_job.h."""

    _fields_ = [("row", ctypes.c_void_p), ("payload", ctypes.c_void_p), ("payload_bytes", ctypes.c_int64)]


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError(f"{native.CUDA_LIBRARY.name} is not built: run scripts/build_cuda.py")
    return library


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load_cuda("kvx_cuda_cachegen_abi", ABI)
    return None if library is None else bind(library)


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions take."""
    layout, pointer, int32, int64 = ctypes.POINTER(Struct), ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.kvx_cuda_cachegen_tables_bytes.argtypes = [layout]
    library.kvx_cuda_cachegen_scratch_bytes.argtypes = [layout, int32]
    library.kvx_cuda_cachegen_tables.argtypes = [layout, pointer, pointer]
    library.kvx_cuda_cachegen_tables_bytes.restype = library.kvx_cuda_cachegen_scratch_bytes.restype = int64
    library.kvx_cuda_cachegen_tables.restype = int64
    for function in (library.kvx_cuda_cachegen_encode, library.kvx_cuda_cachegen_decode):
        function.argtypes = [layout, pointer, pointer, int64, pointer, pointer, int64, pointer]
        function.restype = int64
    return library
