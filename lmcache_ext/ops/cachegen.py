"""Writes rows of known layout in steps, predicted along tokens and entropy coded; `serde/README.md` has the format.

Thread: both functions run in any number of threads at once, without the GIL. Owner: nothing is kept after the call but
the shared models. Failure: a bad argument is a ``ValueError``; a payload that is not one of ours is a `FrameError`, and
what it had decoded to by then lies in the row (never beyond it). The plain twin, `cachegen_numpy`, is for tests.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt

from lmcache_ext.errors import BadPayload, TruncatedFrame, UnsupportedVersion
from lmcache_ext.ops import call, native
from lmcache_ext.ops.layout import Layout, Struct

ABI = 3  # kvx_cachegen_abi() in csrc/cachegen.cpp

Bins = npt.NDArray[np.float32]
"""(layers, 2): of keys and of values, how many steps cover eight standard deviations."""

STREAM_SYMBOLS = 1 << 15  # kStreamSymbols in csrc/cachegen.h

_SLACK_BYTES = 256  # that the encoder wants free while it works
REFUSALS: call.Refusals = {  # Refusal in csrc/cachegen.h
    -1: (TruncatedFrame, "payload of {found} bytes ends within its header or directory"),
    -2: (UnsupportedVersion, "payload of another version of cachegen"),
    -3: (BadPayload, "payload of {found} bytes is of another layout"),
    -4: (BadPayload, "payload of {found} bytes is not as long as its directory says"),
    -5: (BadPayload, "payload of {found} bytes has a layer that does not decode"),
}


def available() -> bool:
    """Whether the compiled codec is here."""
    return _library() is not None


def instruction_sets() -> range:
    """What both can be told to run on here: 1 is plain C++, then AVX2, then AVX-512."""
    return range(1, _loaded().kvx_cachegen_isa() + 1)


def stream_heads(layout: Layout) -> int:
    """How many heads share a stream in what we write: as many as have STREAM_SYMBOLS together."""
    symbols = layout.blocks * layout.tokens * max(layout.dims)
    return min(-(-STREAM_SYMBOLS // symbols), layout.heads)


def bound(layout: Layout) -> int:
    """The longest payload of rows of this layout: the row, and what tells where things are."""
    lines, streams = layout.heads * sum(layout.dims), -(-layout.heads // stream_heads(layout))
    return layout.row_bytes + 24 + layout.layers * (8 + 2 * (4 * layout.heads + 136 * streams) + 4 * lines)


def check_bins(layout: Layout, bins: Bins) -> None:
    """Raise ValueError for bins of other layers, or that are no bins."""
    if bins.shape != (layout.layers, 2) or bins.dtype != np.float32 or not (bins > 0).all():
        raise ValueError(f"bins: {bins.dtype} {bins.shape}, expected positive float32 {(layout.layers, 2)}")


def encode(layout: Layout, bins: Bins, row: memoryview, isa: int = 0) -> memoryview:
    """The payload of a row of `layout.row_bytes`; with half the bins, or less, where it would exceed `bound`.

    `isa` 0 is the best here, else one of `instruction_sets`; it does not show in the payload.
    """
    source = call.row_of(layout, row)
    call.check_isa(isa, instruction_sets())
    check_bins(layout, bins)
    out = np.empty(bound(layout) + _SLACK_BYTES, dtype=np.uint8)  # mostly untouched, so mostly no memory
    while True:
        steps = np.ascontiguousarray(bins)
        arguments = (layout.struct, steps.ctypes.data, source.ctypes.data, out.ctypes.data, out.size, isa)
        written = int(_loaded().kvx_cachegen_encode(*arguments))
        if 0 <= written <= bound(layout):
            return out[:written].copy().data  # the rest of `out` must not live as long as the payload
        bins = bins * np.float32(0.5)  # numbers that no bell fits, mostly escapes: coarser ones are fewer


def decode(layout: Layout, coded: memoryview, row: memoryview, isa: int = 0) -> None:
    """Fill the elements of a row from a payload."""
    target = call.row_of(layout, row)
    call.check_writable("row", row)
    call.check_isa(isa, instruction_sets())
    source = call.flat(coded)
    arguments = (layout.struct, source.ctypes.data, source.size, target.ctypes.data, isa)
    result = int(_loaded().kvx_cachegen_decode(*arguments))
    if result < 0:
        raise call.refusal(REFUSALS, result, found=source.size)


def _loaded() -> ctypes.CDLL:
    return call.present(_library())


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("_cachegen", "kvx_cachegen_abi", ABI)
    if library is not None:
        layout, pointer, int64 = ctypes.POINTER(Struct), ctypes.c_void_p, ctypes.c_int64
        library.kvx_cachegen_encode.argtypes = [layout, pointer, pointer, pointer, int64, ctypes.c_int32]
        library.kvx_cachegen_decode.argtypes = [layout, pointer, int64, pointer, ctypes.c_int32]
        library.kvx_cachegen_encode.restype = library.kvx_cachegen_decode.restype = int64
    return library
