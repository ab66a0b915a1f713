"""Codes rows in a GPU's memory as `ops.fixed` does in a host's: the same payloads, the same rows, bit for bit.

The library is optional (``python scripts/build_cuda.py``); `benchmarks/gpu/codecs.py` checks and times it.
The contract is that of `ops.chunks_cuda`; no scratch is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

from lmcache_ext.errors import FrameError
from lmcache_ext.ops import call, fixed, native
from lmcache_ext.ops.chunks_cuda import LAYOUT, Chunk, Memory, array_of, image, judge, present
from lmcache_ext.ops.fixed import SCHEMES, Scheme
from lmcache_ext.ops.layout import Layout
from lmcache_ext.ops.table import Bytes

ABI = 1  # kvx_cuda_fixed_abi() in csrc/fixed.cu


def available() -> bool:
    """Whether the library was built and loads here."""
    return _library() is not None


def tables(layout: Layout) -> Bytes:
    """The image that every call reads, for the caller to copy to the GPU."""
    filled = image(int(_loaded().kvx_cuda_fixed_tables_bytes(layout.struct)))
    judge(int(_loaded().kvx_cuda_fixed_tables(layout.struct, filled.ctypes.data)))
    return filled


def encode(layout: Layout, scheme: Scheme, memory: Memory, chunks: Sequence[Chunk], *, stream: int) -> None:
    """Enqueue the coding of rows; payloads have `ops.fixed.payload_bytes`, and that is what results become."""
    arguments = _arguments(layout, scheme, memory, chunks)
    judge(int(_loaded().kvx_cuda_fixed_encode(*arguments, stream)))


def decode(layout: Layout, scheme: Scheme, memory: Memory, chunks: Sequence[Chunk], *, stream: int) -> None:
    """Enqueue the coding of payloads back to rows; results become 0, or what `refusal` explains."""
    arguments = _arguments(layout, scheme, memory, chunks)
    judge(int(_loaded().kvx_cuda_fixed_decode(*arguments, stream)))


def refusal(layout: Layout, scheme: Scheme, result: int, payload_bytes: int) -> FrameError | None:
    """Why a payload was refused, as `ops.fixed.decode` would have said it."""
    if result >= 0:
        return None
    expected = fixed.payload_bytes(layout, scheme)
    return call.refusal(fixed.REFUSALS, result, found=payload_bytes, expected=expected, scheme=scheme)


def _arguments(layout: Layout, scheme: Scheme, memory: Memory, chunks: Sequence[Chunk]) -> tuple[object, ...]:
    given = (array_of(chunks), len(chunks), memory.results_ptr)
    return (layout.struct, SCHEMES.index(scheme), memory.tables_ptr, *given)


def _loaded() -> ctypes.CDLL:
    return present(_library())


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load_cuda("kvx_cuda_fixed_abi", ABI)
    return None if library is None else bind(library)


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions take."""
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.kvx_cuda_fixed_tables_bytes.argtypes = [LAYOUT]
    library.kvx_cuda_fixed_tables.argtypes = [LAYOUT, pointer]
    library.kvx_cuda_fixed_tables_bytes.restype = library.kvx_cuda_fixed_tables.restype = int64
    for function in (library.kvx_cuda_fixed_encode, library.kvx_cuda_fixed_decode):
        function.argtypes = [LAYOUT, int32, pointer, pointer, int64, pointer, pointer]
        function.restype = int64
    return library
