"""The plain twin of csrc/lossless.cpp: the same payloads, bit for bit. For tests, far too slow for use."""

from __future__ import annotations

import struct

import numpy as np

from lmcache_ext.errors import BadPayload, LengthMismatch, TruncatedFrame, UnsupportedVersion
from lmcache_ext.ops import rans_numpy as rans
from lmcache_ext.ops.rans_numpy import Bytes, Model

HEADER = struct.Struct("<BBHIQ")
VERSION = 1
MAX_SEGMENT = 1 << 18
RAW, CONSTANT, CODED = 0, 1, 2
WORTH = 32


def encode(raw: bytes, element_bytes: int, segment_elements: int) -> bytes:
    """The payload of a row."""
    elements = len(raw) // element_bytes
    whole = np.frombuffer(raw[: elements * element_bytes], dtype=f"<u{element_bytes}")
    directory, bodies = b"", b""
    for begin in range(0, elements, segment_elements):
        for plane in _planes(whole[begin : begin + segment_elements]):
            mode, body = _encode_plane(plane)
            directory += struct.pack("<I", mode << 30 | len(body))
            bodies += body
    head = HEADER.pack(VERSION, element_bytes, 0, segment_elements, len(raw))
    return head + directory + bodies + raw[elements * element_bytes :]


def decode(coded: bytes, raw_bytes: int) -> bytes:
    """The row of a payload. Raises the FrameErrors of `ops.lossless.decode`."""
    element_bytes, segment = _parse(coded, raw_bytes)
    elements = raw_bytes // element_bytes
    lengths = [min(segment, elements - begin) for begin in range(0, elements, segment)]
    entries = len(lengths) * element_bytes
    position = HEADER.size + 4 * entries
    if position > len(coded):
        raise TruncatedFrame("ends within its directory")
    directory = struct.unpack_from(f"<{entries}I", coded, HEADER.size)
    tail_bytes = raw_bytes % element_bytes
    if position + sum(entry & (1 << 30) - 1 for entry in directory) + tail_bytes != len(coded):
        raise BadPayload("not as long as its directory says")
    row = b""
    for i, count in enumerate(lengths):
        planes = []
        for entry in directory[i * element_bytes : (i + 1) * element_bytes]:
            body = coded[position : position + (entry & (1 << 30) - 1)]
            planes.append(_decode_plane(entry >> 30, body, count))
            position += len(body)
        row += _merge(planes)
    return row + coded[len(coded) - tail_bytes :]


def _parse(coded: bytes, raw_bytes: int) -> tuple[int, int]:
    if len(coded) < HEADER.size:
        raise TruncatedFrame("ends within its header")
    version, element_bytes, reserved, segment, length = HEADER.unpack_from(coded)
    if version != VERSION:
        raise UnsupportedVersion(f"version {version}")
    if element_bytes not in (1, 2, 4) or reserved != 0 or not 1 <= segment <= MAX_SEGMENT:
        raise BadPayload("a header that lossless does not write")
    if length != raw_bytes:
        raise LengthMismatch(f"decodes to {length} bytes, expected {raw_bytes}")
    return element_bytes, segment


def _planes(elements: np.ndarray) -> list[Bytes]:
    """Bytes of the elements, rotated left by one bit where they have more than one."""
    bits = 8 * elements.itemsize
    rotated = elements if bits == 8 else elements << 1 | elements >> bits - 1
    return list(np.ascontiguousarray(rotated).view(np.uint8).reshape(-1, elements.itemsize).T.copy())


def _merge(planes: list[Bytes]) -> bytes:
    bits = 8 * len(planes)
    rotated = np.ascontiguousarray(np.stack(planes, axis=1)).view(f"<u{len(planes)}")[:, 0]
    return (rotated if bits == 8 else rotated >> 1 | rotated << bits - 1).tobytes()


def _encode_plane(plane: Bytes) -> tuple[int, bytes]:
    counts = np.bincount(plane, minlength=256)
    present = np.flatnonzero(counts)
    if len(present) == 1:
        return CONSTANT, bytes(plane[:1])
    model = rans.fit(counts)
    bits_256ths = sum(int(counts[s]) * rans.cost_256ths(int(model[s])) for s in present)
    expected = 2 + 3 * len(present) + bits_256ths // (8 * 256) + rans.STATE_BYTES
    if expected > len(plane) - len(plane) // WORTH - 1:
        return RAW, plane.tobytes()
    table = struct.pack("<H", len(present)) + bytes(present.tolist()) + model[present].astype("<u2").tobytes()
    return CODED, table + rans.encode(plane, model)


def _decode_plane(mode: int, body: bytes, count: int) -> Bytes:
    if mode == RAW and len(body) == count:
        return np.frombuffer(body, dtype=np.uint8)
    if mode == CONSTANT and len(body) == 1:
        return np.full(count, body[0], dtype=np.uint8)
    table = _read_table(body) if mode == CODED else None
    symbols = None if table is None else rans.decode(body[table[1] :], table[0], count)
    if symbols is None:
        raise BadPayload("a plane that does not decode")
    return symbols


def _read_table(body: bytes) -> tuple[Model, int] | None:
    """The model at the beginning of a coded body and the bytes it takes, or None where it is none."""
    if len(body) < 2:
        return None
    symbols = int.from_bytes(body[:2], "little")
    end = 2 + 3 * symbols
    if not 2 <= symbols <= 256 or end > len(body):
        return None
    names = np.frombuffer(body[2 : 2 + symbols], dtype=np.uint8).astype(np.int64)
    frequencies = np.frombuffer(body[2 + symbols : end], dtype="<u2").astype(np.int64)
    if (np.diff(names) <= 0).any() or (frequencies == 0).any() or frequencies.sum() != rans.TOTAL:
        return None
    model = np.zeros(256, dtype=np.int64)
    model[names] = frequencies
    return model, end
