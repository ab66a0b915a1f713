"""The plain twin of csrc/fixed.cpp and csrc/elements.h: the same payloads and rows, bit for bit. For tests."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lmcache_ext.errors import BadPayload, LengthMismatch, UnsupportedVersion
from lmcache_ext.ops.fixed import SCHEMES, Scheme
from lmcache_ext.ops.layout import ELEMENT_BYTES, Int32s, Layout
from lmcache_ext.ops.table import Bytes

Floats = npt.NDArray[np.float32]

HEADER = struct.Struct("<BBHHHQ")
VERSION = 1
GROUP = 32


def encode(layout: Layout, scheme: Scheme, row: bytes) -> bytes:
    """The payload of a row."""
    payload = _header(layout, scheme)
    flat = np.frombuffer(row, dtype=np.uint8)
    for cell in layout.cells.reshape(-1).tolist():
        for keys, index in ((True, layout.k_index), (False, layout.v_index)):
            payload += _encode_plane(scheme, keys, load_plane(layout, flat, cell, index))
    return payload


def decode(layout: Layout, scheme: Scheme, coded: bytes, row: bytearray) -> None:
    """Fill the elements of a row. Raises the FrameErrors of `ops.fixed.decode`."""
    planes = [(True, layout.k_index), (False, layout.v_index)]
    lengths = [len(_encode_plane(scheme, keys, np.zeros(index.shape, np.float32))) for keys, index in planes]
    if len(coded) != HEADER.size + layout.cells.size * sum(lengths):
        raise LengthMismatch(f"payload of {len(coded)} bytes")
    if coded[0] != VERSION:
        raise UnsupportedVersion(f"version {coded[0]}")
    if coded[: HEADER.size] != _header(layout, scheme):
        raise BadPayload("payload of another layout")
    flat, at = np.frombuffer(row, dtype=np.uint8), HEADER.size
    for cell in layout.cells.reshape(-1).tolist():
        for (keys, index), length in zip(planes, lengths, strict=True):
            store_plane(layout, flat, cell, index, _decode_plane(scheme, keys, index.shape, coded[at : at + length]))
            at += length


def load_plane(layout: Layout, row: Bytes, cell: int, index: Int32s) -> Floats:
    """Elements as float32 (tokens, dim); what is no finite number is 0."""
    raw = row[_places(layout, cell, index)]
    if layout.dtype == "bfloat16":
        values = (raw.view("<u2").astype("<u4") << 16).view("<f4")
    else:
        values = raw.view("<f4" if layout.dtype == "float32" else "<f2").astype(np.float32)
    values = values[..., 0]
    return np.where(np.isfinite(values), values, np.float32(0))


def store_plane(layout: Layout, row: Bytes, cell: int, index: Int32s, values: Floats) -> None:
    """Round float32 (tokens, dim) to the row's dtype, in place."""
    if layout.dtype == "float32":
        raw = values.astype("<f4")
    elif layout.dtype == "bfloat16":
        raw = to_bfloat16(values)
    else:
        raw = np.clip(values, -65504, 65504).astype("<f2")
    row[_places(layout, cell, index)] = np.ascontiguousarray(raw)[..., None].view(np.uint8)


def to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return rounded


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype("<u4") << 16).view("<f4")


def _places(layout: Layout, cell: int, index: Int32s) -> npt.NDArray[np.int64]:
    size = ELEMENT_BYTES[layout.dtype]
    return cell + index.astype(np.int64)[..., None] * size + np.arange(size)


def _header(layout: Layout, scheme: Scheme) -> bytes:
    return HEADER.pack(VERSION, SCHEMES.index(scheme), layout.tokens, *layout.dims, layout.cells.size)


def _encode_plane(scheme: Scheme, keys: bool, x: Floats) -> bytes:
    if scheme in ("fp8", "int8"):
        scale = np.float32(np.abs(x).max()) / np.float32(448 if scheme == "fp8" else 127)
        inverse = np.float32(1) / scale if scale > 2.0**-120 else np.float32(0)
        y = (x * inverse).reshape(-1)
        codes = to_e4m3(y) if scheme == "fp8" else np.rint(y).astype(np.int8).view(np.uint8)
        return np.float32(scale if inverse > 0 else 0).tobytes() + codes.tobytes()
    return b"".join(_encode_group(group, _bits(scheme)) for group in _groups(keys, x))


def _decode_plane(scheme: Scheme, keys: bool, shape: tuple[int, ...], coded: bytes) -> Floats:
    x = np.zeros(shape, dtype=np.float32)
    if scheme in ("fp8", "int8"):
        scale = _tame(np.frombuffer(coded[:4], dtype="<f4"))
        codes = np.frombuffer(coded[4:], dtype=np.uint8)
        y = from_e4m3(codes) if scheme == "fp8" else codes.view(np.int8).astype(np.float32)
        with np.errstate(over="ignore"):
            x[...] = _tame(y * scale).reshape(shape)
        return x
    at = 0
    for group in _groups(keys, x):
        length = 4 + (len(group) * _bits(scheme) + 7) // 8
        _decode_group(coded[at : at + length], _bits(scheme), group)
        at += length
    return x


def _bits(scheme: Scheme) -> int:
    return 4 if scheme == "kivi4" else 2


def _tame(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.float32(0))


def _groups(keys: bool, x: Floats) -> Iterator[Floats]:
    """Views of up to GROUP elements: of a key's channel along tokens, of a value's token along channels."""
    for line in x.T if keys else x:
        for begin in range(0, len(line), GROUP):
            yield line[begin : begin + GROUP]


def _encode_group(x: Floats, bits: int) -> bytes:
    levels = np.float32((1 << bits) - 1)
    ends = np.array([x.min(), x.max() / levels - x.min() / levels], dtype=np.float32)
    stored = to_bfloat16(ends + np.float32(0))  # -0 becomes 0
    zero, width = from_bfloat16(stored)
    inverse = np.float32(1) / width if width > 2.0**-120 else np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (x - zero) * inverse
        y = np.rint(np.where(scaled > 0, np.minimum(scaled, levels), 0)).astype(np.uint8)
    packed = np.zeros((len(x) * bits + 7) // 8, dtype=np.uint8)
    places = np.arange(len(x)) * bits
    np.bitwise_or.at(packed, places // 8, (y << (places % 8)).astype(np.uint8))
    return stored.tobytes() + packed.tobytes()


def _decode_group(coded: bytes, bits: int, x: Floats) -> None:
    zero, width = _tame(from_bfloat16(np.frombuffer(coded[:4], dtype="<u2")))
    places = np.arange(len(x)) * bits
    levels = np.frombuffer(coded[4:], dtype=np.uint8)[places // 8] >> (places % 8) & ((1 << bits) - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        x[:] = _tame(zero + levels.astype(np.float32) * width)


_E4M3 = np.array([(m / 8 * 2.0**-6) if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)])


def from_e4m3(codes: Bytes) -> Floats:
    magnitudes = _E4M3[codes & 0x7F].astype(np.float32)
    return np.where(codes & 0x80, -magnitudes, magnitudes)


def to_e4m3(x: Floats) -> Bytes:
    """To the nearest, ties to the even code, saturating at 448."""
    magnitude = np.minimum(np.abs(x).astype(np.float64), 448.0)
    above = np.searchsorted(_E4M3[:127], magnitude)  # the first code that is not less
    below = np.maximum(above - 1, 0)
    up, down = _E4M3[above] - magnitude, magnitude - _E4M3[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    signed: Bytes = (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)
    return signed
