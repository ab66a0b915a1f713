"""The plain twin of csrc/cachegen.cpp and csrc/models.h: the same payloads and rows, bit for bit. For tests."""

from __future__ import annotations

import struct
from bisect import bisect_right
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache_ext.errors import BadPayload, TruncatedFrame, UnsupportedVersion
from lmcache_ext.ops import rans_numpy as rans
from lmcache_ext.ops.cachegen import Bins, bound, stream_heads
from lmcache_ext.ops.fixed_numpy import Floats, load_plane, store_plane
from lmcache_ext.ops.layout import Int32s, Layout
from lmcache_ext.ops.rans_numpy import Model

HEADER = struct.Struct("<BBHHHIIII")
VERSION, ONE_STREAM_VERSION = 2, 1
CLASSES = 32
REACH, ESCAPE = 127, 255
DELTA = 0x80
FARTHEST = 1 << 20
SPREAD = np.float32(8)

# fmt: off
FALL = (
    121, 13104, 360200, 3751106, 19666268, 63464312, 145315154, 261044606, 395007542, 529428476, 651257337, 753969162,
    836230973, 899760092, 947573834, 982908970, 1008687096, 1027321989, 1040706261, 1050275481, 1057095000, 1061943836,
    1065385899, 1067826536, 1069555701, 1070780095, 1071646719, 1072259937, 1072693760, 1073000625, 1073217664,
    1073371160,
)
UP_TO = (
    161285, 191801, 228091, 271248, 322570, 383602, 456183, 542496, 645140, 767205, 912365, 1084991, 1290279, 1534409,
    1824730, 2169982, 2580559, 3068819, 3649461, 4339965, 5161117, 6137637, 7298922, 8679930, 10322234, 12275274,
    14597844, 17359859, 20644468, 24550549, 29195687,
)
# fmt: on


class Part(NamedTuple):
    """One layer's keys or its values, and how many of its heads share a stream."""

    layer: int
    places: Int32s
    stream_heads: int


def encode(layout: Layout, bins: Bins, row: bytes) -> bytes:
    """The payload of a row."""
    flat, parts = np.frombuffer(row, dtype=np.uint8), _parts(layout, stream_heads(layout))
    while True:
        bodies = [_encode_part(layout, part, flat, bins.reshape(-1)[i]) for i, part in enumerate(parts)]
        payload = (
            _header(layout, VERSION, stream_heads(layout))
            + b"".join(struct.pack("<I", len(body)) for body in bodies)
            + b"".join(bodies)
        )
        if len(payload) <= bound(layout):
            return payload
        bins = bins * np.float32(0.5)


def decode(layout: Layout, coded: bytes, row: bytearray) -> None:
    """Fill the elements of a row. Raises the FrameErrors of `ops.cachegen.decode`."""
    at = HEADER.size + 8 * layout.layers
    if len(coded) < at:
        raise TruncatedFrame("ends within its directory")
    if coded[0] not in (VERSION, ONE_STREAM_VERSION):
        raise UnsupportedVersion(f"version {coded[0]}")
    heads = HEADER.unpack_from(coded)[-1]
    sound = 1 <= heads <= layout.heads if coded[0] == VERSION else heads == 0
    if not sound or coded[: HEADER.size] != _header(layout, coded[0], heads):
        raise BadPayload("of another layout")
    lengths = struct.unpack_from(f"<{2 * layout.layers}I", coded, HEADER.size)
    if at + sum(lengths) != len(coded):
        raise BadPayload("not as long as its directory says")
    flat = np.frombuffer(row, dtype=np.uint8)
    for part, length in zip(_parts(layout, heads or layout.heads), lengths, strict=True):
        if not _decode_part(layout, part, coded[at : at + length], flat):
            raise BadPayload("a layer that does not decode")
        at += length


@cache
def models() -> tuple[Model, ...]:
    return tuple(_fit_class(k) for k in range(CLASSES))


def _fit_class(k: int) -> Model:
    weights = [0] * (REACH + 1)
    for curve, share in ((k, 49), (min(k + 4, CLASSES - 1), 1)):
        weight, factor, square = 1 << 30, FALL[curve], FALL[curve] ** 2 >> 30
        for j in range(REACH + 1):
            weights[j] += weight * share
            weight, factor = weight * factor >> 30, factor * square >> 30
    counts = np.zeros(256, dtype=np.int64)
    counts[ESCAPE] = 1
    for j, weight in enumerate(weights):
        counts[[REACH + j, REACH - j]] = weight * 16384 // weights[0]
    return rans.fit(counts)


def _header(layout: Layout, version: int, heads: int) -> bytes:
    return HEADER.pack(version, 0, layout.tokens, *layout.dims, layout.layers, layout.heads, layout.blocks, heads)


def _parts(layout: Layout, heads: int) -> list[Part]:
    indices = (layout.k_index, layout.v_index)
    return [Part(layer, index, heads) for layer in range(layout.layers) for index in indices]


def _streams(layout: Layout, part: Part) -> list[range]:
    """The heads of each stream."""
    firsts = range(0, layout.heads, part.stream_heads)
    return [range(first, min(first + part.stream_heads, layout.heads)) for first in firsts]


def _load_head(layout: Layout, part: Part, head: int, flat: npt.NDArray[np.uint8]) -> Floats:
    cells = layout.cells[part.layer, head].tolist()
    return np.concatenate([load_plane(layout, flat, cell, part.places) for cell in cells])


def _deviation(x: Floats) -> np.float32:
    tokens, dim = x.shape
    mean, square, total = np.zeros(dim, np.float32), np.zeros(dim, np.float32), np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for vector in x:
            mean += vector
        mean /= np.float32(tokens)
        for vector in x:
            square += (vector - mean) * (vector - mean)
        for value in square:
            total += value
    total = total if np.isfinite(total) else np.float32(0)
    return np.float32(np.sqrt(total / np.float32(tokens * dim)))


def _quantise(x: Floats, step: np.float32) -> npt.NDArray[np.int64]:
    inverse = np.float32(1) / step if step > 2.0**-120 else np.float32(0)
    with np.errstate(over="ignore"):
        return np.rint(np.clip(x * inverse, -FARTHEST, FARTHEST)).astype(np.int64)


def _predict(q: npt.NDArray[np.int64]) -> tuple[int, int, npt.NDArray[np.int64]]:
    """A line's byte, its mean and its residuals."""
    tokens, total = len(q), int(q.sum())
    # rounded as C++ divides: towards zero
    magnitude = (2 * abs(total) + tokens) // (2 * tokens)
    mean = max(-(1 << 15), min((1 << 15) - 1, magnitude if total >= 0 else -magnitude))
    from_mean = q - mean
    from_last = np.concatenate((from_mean[:1], np.diff(q)))
    delta = int(np.abs(from_last).sum()) < int(np.abs(from_mean).sum())
    residuals = from_last if delta else from_mean
    k = bisect_right(UP_TO, (int(np.abs(residuals).sum()) << 20) // tokens)
    return k | (DELTA if delta else 0), mean, residuals


def _order(kinds: list[int]) -> list[int]:
    return sorted(range(len(kinds)), key=lambda d: kinds[d] & ~DELTA)


def _encode_part(layout: Layout, part: Part, flat: npt.NDArray[np.uint8], bins: np.float32) -> bytes:
    steps, kinds, means, streams, sizes = [], [], [], [], b""
    escapes: list[int] = []
    for heads in _streams(layout, part):
        coded: list[tuple[int, npt.NDArray[np.uint8]]] = []
        before = len(escapes)
        for head in heads:
            step, lines = _encode_head(layout, part, head, flat, bins)
            for d in _order([kind for kind, _, _ in lines]):
                kind, _, residuals = lines[d]
                fits = (np.abs(residuals) <= REACH) & (models()[kind & ~DELTA][np.clip(residuals + REACH, 0, 254)] > 0)
                coded.append((kind & ~DELTA, np.where(fits, residuals + REACH, ESCAPE).astype(np.uint8)))
                escapes += residuals[~fits].tolist()
            steps.append(step)
            kinds += [kind for kind, _, _ in lines]
            means += [mean for _, mean, _ in lines]
        streams.append(_encode_stream(coded))
        sizes += struct.pack("<II", len(escapes) - before, len(streams[-1]))
    head_bytes = np.array(steps, dtype="<f4").tobytes() + bytes(kinds) + np.array(means, dtype="<i2").tobytes()
    return head_bytes + sizes + b"".join(streams) + np.array(escapes, dtype="<i4").tobytes()


def _encode_head(
    layout: Layout, part: Part, head: int, flat: npt.NDArray[np.uint8], bins: np.float32
) -> tuple[np.float32, list[tuple[int, int, npt.NDArray[np.int64]]]]:
    """The step of a head, and its lines as `_predict` has them."""
    x = _load_head(layout, part, head, flat)
    spread = _deviation(x)
    step = spread * (SPREAD / bins) if spread > 2.0**-100 else np.float32(0)
    return step, [_predict(line) for line in _quantise(x, step).T]


def _encode_stream(coded: list[tuple[int, npt.NDArray[np.uint8]]]) -> bytes:
    states, words = [rans.LOW] * rans.LANES, []
    for k, symbols in reversed(coded):
        starts = np.concatenate(([0], np.cumsum(models()[k])[:-1]))
        for i in range(len(symbols) - 1, -1, -1):
            frequency, x = int(models()[k][symbols[i]]), states[i % rans.LANES]
            if x >= frequency << 20:
                words.append(x & 0xFFFF)
                x >>= 16
            states[i % rans.LANES] = (x // frequency << rans.BITS) + x % frequency + int(starts[symbols[i]])
    return np.array(states, dtype="<u4").tobytes() + np.array(words[::-1], dtype="<u2").tobytes()


class _Stream:
    """Words and lanes of a part, read line by line."""

    def __init__(self, stream: bytes) -> None:
        self.states = np.frombuffer(stream[: rans.STATE_BYTES], dtype="<u4").tolist()
        self.words = stream[rans.STATE_BYTES :]

    def line(self, k: int, count: int) -> npt.NDArray[np.uint8] | None:
        model = models()[k]
        symbol_of, starts = np.repeat(np.arange(256), model), np.concatenate(([0], np.cumsum(model)[:-1]))
        symbols = np.empty(count, dtype=np.uint8)
        for i in range(count):
            x = self.states[i % rans.LANES]
            symbols[i] = symbol = int(symbol_of[x % rans.TOTAL])
            x = int(model[symbol]) * (x >> rans.BITS) + x % rans.TOTAL - int(starts[symbol])
            if x < rans.LOW:
                if len(self.words) < 2:
                    return None
                x, self.words = x << 16 | int.from_bytes(self.words[:2], "little"), self.words[2:]
            self.states[i % rans.LANES] = x
        return symbols

    def at_end(self) -> bool:
        return not self.words and all(state == rans.LOW for state in self.states)


def _decode_part(layout: Layout, part: Part, body: bytes, flat: npt.NDArray[np.uint8]) -> bool:
    streams = _streams(layout, part)
    lines = layout.heads * part.places.shape[1]
    fixed = 4 * layout.heads + 3 * lines + 8 * len(streams)
    if len(body) < fixed:
        return False
    kinds = body[4 * layout.heads :][:lines]
    sizes = struct.unpack_from(f"<{2 * len(streams)}I", body, fixed - 8 * len(streams))
    if fixed + sum(sizes[1::2]) + 4 * sum(sizes[::2]) != len(body):
        return False
    if any(kind & ~DELTA >= CLASSES for kind in kinds):
        return False
    at, escapes_at = fixed, fixed + sum(sizes[1::2])
    for heads, count, length in zip(streams, sizes[::2], sizes[1::2], strict=True):
        if length < rans.STATE_BYTES:
            return False
        escapes = np.frombuffer(body[escapes_at : escapes_at + 4 * count], dtype="<i4").tolist()
        if not _decode_stream(layout, part, heads, body, _Stream(body[at : at + length]), escapes, flat):
            return False
        at, escapes_at = at + length, escapes_at + 4 * count
    return True


def _decode_stream(
    layout: Layout,
    part: Part,
    heads: range,
    body: bytes,
    stream: _Stream,
    escapes: list[int],
    flat: npt.NDArray[np.uint8],
) -> bool:
    dim, tokens = part.places.shape[1], layout.blocks * layout.tokens
    steps = np.frombuffer(body[: 4 * layout.heads], dtype="<f4")
    kinds = body[4 * layout.heads :][: layout.heads * dim]
    means = np.frombuffer(body[4 * layout.heads + len(kinds) :][: 2 * len(kinds)], dtype="<i2").tolist()
    for head in heads:
        q, own = np.empty((tokens, dim), dtype=np.int64), list(kinds[head * dim : (head + 1) * dim])
        for d in _order(own):
            symbols = stream.line(own[d] & ~DELTA, tokens)
            if symbols is None or (symbols == ESCAPE).sum() > len(escapes):
                return False
            residuals = symbols.astype(np.int64) - REACH
            residuals[symbols == ESCAPE] = [escapes.pop(0) for _ in range(int((symbols == ESCAPE).sum()))]
            mean = means[head * dim + d]
            q[:, d] = mean + (np.cumsum(residuals) if own[d] & DELTA else residuals)
        _store_head(layout, part, head, q, steps[head], flat)
    return stream.at_end() and not escapes


def _store_head(
    layout: Layout, part: Part, head: int, q: npt.NDArray[np.int64], step: np.float32, flat: npt.NDArray[np.uint8]
) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        x = q.astype(np.int32).astype(np.float32) * (step if np.isfinite(step) else np.float32(0))
    x = np.where(np.isfinite(x), x, np.float32(0))
    for block, cell in enumerate(layout.cells[part.layer, head].tolist()):
        store_plane(layout, flat, cell, part.places, x[block * layout.tokens : (block + 1) * layout.tokens])
