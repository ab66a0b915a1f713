"""Makes bytes of floating-point KV smaller, bit for bit; `serde/README.md` has the format.

Thread: both functions run in any number of threads at once, without the GIL. Owner: nothing is kept
after the call. Failure: a bad argument is a ``ValueError``; a payload that is not one of ours is a
`FrameError`, and what it had decoded to by then lies in ``raw`` (never beyond it).

Unlike the page copier this has no fallback: its plain twin, `lossless_numpy`, is for tests, and a
thousand times too slow for anything else.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt

from lmcache_ext.errors import BadPayload, LengthMismatch, TruncatedFrame, UnsupportedVersion
from lmcache_ext.ops import call, native

ABI = 2  # kvx_lossless_abi() in csrc/lossless.cpp
SEGMENT_ELEMENTS = 1 << 16
ELEMENT_BYTES = (1, 2, 4)

_NO_MEMORY = -7
_REFUSALS: call.Refusals = {
    -1: (TruncatedFrame, "payload of {coded} bytes ends within its header or directory"),
    -2: (UnsupportedVersion, "payload of another version of lossless"),
    -3: (BadPayload, "payload of {coded} bytes has a header that lossless does not write"),
    -4: (LengthMismatch, "payload does not decode to {raw} bytes, the length of the row"),
    -5: (BadPayload, "payload of {coded} bytes is not as long as its directory says"),
    -6: (BadPayload, "payload of {coded} bytes has a plane that does not decode"),
}

Bytes = npt.NDArray[np.uint8]


def available() -> bool:
    """Whether the compiled codec is here."""
    return _library() is not None


def instruction_sets() -> range:
    """What both can be told to run on here: 1 is plain C++, then AVX2, then AVX-512."""
    return range(1, _loaded().kvx_lossless_isa() + 1)


def bound(raw_bytes: int, element_bytes: int, segment_elements: int = SEGMENT_ELEMENTS) -> int:
    """The longest payload of a row: its own length and a directory."""
    segments = -(-(raw_bytes // element_bytes) // segment_elements)
    return 16 + 4 * segments * element_bytes + raw_bytes


def encode(raw: memoryview, element_bytes: int, segment_elements: int = SEGMENT_ELEMENTS, isa: int = 0) -> memoryview:
    """The payload of a row of elements of 1, 2 or 4 bytes.

    `isa` 0 is the best this machine has, else one of `instruction_sets`; it does not show in the payload.
    """
    call.check_isa(isa, instruction_sets())
    if element_bytes not in ELEMENT_BYTES or not 1 <= segment_elements <= 1 << 18:
        raise ValueError(f"{element_bytes} bytes per element, {segment_elements} elements per segment: out of range")
    flat = call.flat(raw)
    out = np.empty(bound(flat.size, element_bytes, segment_elements), dtype=np.uint8)
    pointers = (flat.ctypes.data, flat.size, element_bytes, segment_elements, out.ctypes.data, out.size, isa)
    written = int(_loaded().kvx_lossless_encode(*pointers))
    if written == _NO_MEMORY:
        raise MemoryError(f"no scratch to encode {flat.size} bytes")
    if written < 0:
        raise AssertionError(f"lossless encoder refused its own arguments: {written}")
    return out.data[:written]


def decode(coded: memoryview, raw: memoryview, isa: int = 0) -> None:
    """Fill `raw` from a payload."""
    source, target = call.flat(coded), call.flat(raw)
    call.check_writable("raw", raw)
    call.check_isa(isa, instruction_sets())
    pointers = (source.ctypes.data, source.size, target.ctypes.data, target.size, isa)
    result = int(_loaded().kvx_lossless_decode(*pointers))
    if result == _NO_MEMORY:
        raise MemoryError(f"no scratch to decode {source.size} bytes")
    if result < 0:
        raise call.refusal(_REFUSALS, result, coded=source.size, raw=target.size)


def _loaded() -> ctypes.CDLL:
    return call.present(_library())


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("_lossless", "kvx_lossless_abi", ABI)
    if library is not None:
        pointer, int64 = ctypes.c_void_p, ctypes.c_int64
        library.kvx_lossless_encode.argtypes = [pointer, int64, int64, int64, pointer, int64, ctypes.c_int32]
        library.kvx_lossless_encode.restype = int64
        library.kvx_lossless_decode.argtypes = [pointer, int64, pointer, int64, ctypes.c_int32]
        library.kvx_lossless_decode.restype = int64
    return library
