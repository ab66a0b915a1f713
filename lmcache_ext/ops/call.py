"""What calls of the compiled codecs have in common: buffers become arrays, refusals become errors."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from lmcache_ext.errors import FrameError
from lmcache_ext.ops.layout import Layout
from lmcache_ext.ops.table import Bytes

Refusals = Mapping[int, tuple[type[FrameError], str]]
"""By what a codec returns: the error, and its message with the names of numbers in braces."""


def flat(view: memoryview) -> Bytes:
    """The bytes of a buffer."""
    return np.frombuffer(view.cast("B"), dtype=np.uint8) if view.nbytes else np.empty(0, dtype=np.uint8)


def row_of(layout: Layout, row: memoryview) -> Bytes:
    """The bytes of a row, which must have the layout's length."""
    if row.nbytes != layout.row_bytes:
        raise ValueError(f"row: {row.nbytes} bytes, the layout is of {layout.row_bytes}")
    return flat(row)


def check_writable(name: str, view: memoryview) -> None:
    if view.readonly:
        raise ValueError(f"{name}: read-only, expected a writable buffer to decode into")


def check_isa(isa: int, known: range) -> None:
    """0 is the best here, else one of those that are known."""
    if isa != 0 and isa not in known:
        raise ValueError(f"isa {isa}: this machine has {list(known)}")


def refusal(refusals: Refusals, result: int, **numbers: object) -> FrameError:
    """What a payload was refused for."""
    kind, text = refusals[result]
    return kind(text.format(**numbers))


def present(library: ctypes.CDLL | None) -> ctypes.CDLL:
    if library is None:
        raise RuntimeError("the compiled codec is missing: this package was installed without a C++ compiler")
    return library
