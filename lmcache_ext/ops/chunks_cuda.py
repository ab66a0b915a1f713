"""Chunks in a GPU's memory, which its codecs work on together; csrc/chunks.h has the other side.

Thread: any. Order: that of the stream. Owner: the caller keeps tables, results, scratch, rows and payloads, all of them
in the GPU's memory, alive until the stream has passed; arguments are read before a call returns. Failure: a bad
argument is a ``ValueError`` before anything is enqueued, a refused launch a ``RuntimeError``; a payload that is refused
has its row left as it was, and the reason in its result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmcache_ext.ops import native
from lmcache_ext.ops.layout import Struct
from lmcache_ext.ops.table import Bytes

_UNALIGNED = -(2**63)
_SCRATCH_TOO_SMALL = _UNALIGNED + 1
_LAUNCH_FAILED = _UNALIGNED + 2


class Chunk(NamedTuple):
    """Addresses of a row and its payload; how long the payload is, or may become."""

    row_ptr: int
    payload_ptr: int
    payload_bytes: int


class Memory(NamedTuple):
    """Addresses of what a call needs: the image that a codec's `tables` made, an int64 for each chunk, scratch.

    Tables and scratch begin at multiples of 16. Chunks share scratch that is too small for all of them in turns.
    """

    tables_ptr: int
    results_ptr: int
    scratch_ptr: int = 0
    scratch_bytes: int = 0


class _Chunk(ctypes.Structure):
    """`kvx::Chunk` in csrc/chunks.h."""

    _fields_ = [("row", ctypes.c_void_p), ("payload", ctypes.c_void_p), ("payload_bytes", ctypes.c_int64)]


LAYOUT = ctypes.POINTER(Struct)


def array_of(chunks: Sequence[Chunk]) -> ctypes.Array[_Chunk]:
    return (_Chunk * max(1, len(chunks)))(*(_Chunk(*chunk) for chunk in chunks))


def image(size: int) -> Bytes:
    """Zeros that begin at a multiple of 16."""
    raw = np.zeros(size + 16, dtype=np.uint8)
    return raw[-raw.ctypes.data % 16 :][:size]


def judge(result: int) -> None:
    """Turn the refusal of a call into an error."""
    if result == _UNALIGNED:
        raise ValueError("a cell or a row is not a multiple of its elements, or tables or scratch not of 16 bytes")
    if result == _SCRATCH_TOO_SMALL:
        raise ValueError("scratch: less than scratch_bytes of the layout")
    if result != 0:
        raise RuntimeError(f"a launch failed with CUDA error {result - _LAUNCH_FAILED}")


def present(library: ctypes.CDLL | None) -> ctypes.CDLL:
    if library is None:
        raise RuntimeError(f"{native.CUDA_LIBRARY.name} is not built: run scripts/build_cuda.py")
    return library
