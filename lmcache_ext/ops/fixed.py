"""Writes rows of known layout in a fixed number of bits for each element: fp8, int8, KIVI's 4 and 2.

Thread: both functions run in any number of threads at once, without the GIL. Owner: nothing is kept
after the call. Failure: a bad argument is a ``ValueError``; a payload of another layout, version or
length is a `FrameError`, before the row is touched. The plain twin, `fixed_numpy`, is for tests.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Literal, get_args

import numpy as np

from lmcache_ext.errors import BadPayload, LengthMismatch, UnsupportedVersion
from lmcache_ext.ops import call, native
from lmcache_ext.ops.layout import Layout, Struct

ABI = 2  # kvx_fixed_abi() in csrc/fixed.cpp

Scheme = Literal["fp8", "int8", "kivi4", "kivi2"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)  # in the order of Scheme in csrc/fixed.cpp

_NO_MEMORY = -4
REFUSALS: call.Refusals = {  # Refusal in csrc/fixed.h
    -1: (LengthMismatch, "payload of {found} bytes, rows of this layout have {expected} as {scheme}"),
    -2: (UnsupportedVersion, "payload of another version of {scheme}"),
    -3: (BadPayload, "payload of {found} bytes is of another layout or scheme than {scheme}"),
}


def available() -> bool:
    """Whether the compiled codec is here."""
    return _library() is not None


def instruction_sets() -> range:
    """What both can be told to run on here: 1 is plain C++, then AVX2, then AVX-512."""
    return range(1, _loaded().kvx_fixed_isa() + 1)


def payload_bytes(layout: Layout, scheme: Scheme) -> int:
    """The length of every payload of rows of this layout."""
    return int(_loaded().kvx_fixed_bytes(layout.struct, SCHEMES.index(scheme)))


def encode(layout: Layout, scheme: Scheme, row: memoryview, isa: int = 0) -> memoryview:
    """The payload of a row of `layout.row_bytes`.

    `isa` 0 is the best here, else one of `instruction_sets`; it does not show in the payload.
    """
    call.check_isa(isa, instruction_sets())
    source = call.row_of(layout, row)
    out = np.empty(payload_bytes(layout, scheme), dtype=np.uint8)
    arguments = (layout.struct, SCHEMES.index(scheme), source.ctypes.data, out.ctypes.data, out.size, isa)
    if _loaded().kvx_fixed_encode(*arguments) == _NO_MEMORY:
        raise MemoryError(f"no scratch to encode {layout}")
    return out.data


def decode(layout: Layout, scheme: Scheme, coded: memoryview, row: memoryview, isa: int = 0) -> None:
    """Fill the elements of a row, and nothing between them, from a payload."""
    target = call.row_of(layout, row)
    call.check_writable("row", row)
    call.check_isa(isa, instruction_sets())
    source = call.flat(coded)
    arguments = (layout.struct, SCHEMES.index(scheme), source.ctypes.data, source.size, target.ctypes.data, isa)
    result = int(_loaded().kvx_fixed_decode(*arguments))
    if result == _NO_MEMORY:
        raise MemoryError(f"no scratch to decode {source.size} bytes")
    if result < 0:
        expected = payload_bytes(layout, scheme)
        raise call.refusal(REFUSALS, result, found=source.size, expected=expected, scheme=scheme)


def _loaded() -> ctypes.CDLL:
    return call.present(_library())


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("_fixed", "kvx_fixed_abi", ABI)
    if library is not None:
        layout, pointer = ctypes.POINTER(Struct), ctypes.c_void_p
        int32, int64 = ctypes.c_int32, ctypes.c_int64
        library.kvx_fixed_bytes.argtypes = [layout, int32]
        library.kvx_fixed_encode.argtypes = [layout, int32, pointer, pointer, int64, int32]
        library.kvx_fixed_decode.argtypes = [layout, int32, pointer, int64, pointer, int32]
        for function in (library.kvx_fixed_bytes, library.kvx_fixed_encode, library.kvx_fixed_decode):
            function.restype = int64
    return library
