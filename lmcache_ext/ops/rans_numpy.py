"""The plain twin of csrc/rans.h: the same models, the same streams, bit for bit. For tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Model = npt.NDArray[np.int64]
"""Frequencies (256,) that sum to TOTAL."""

LANES = 32
BITS = 12
TOTAL = 1 << BITS
LOW = 1 << 16
STATE_BYTES = 4 * LANES


def fit(counts: npt.NDArray[np.int64]) -> Model:
    """Counts (256,) of at least two symbols, scaled to a model."""
    total = int(counts.sum())
    model = (counts * (2 * TOTAL) + total) // (2 * total)
    model = np.where(counts > 0, np.clip(model, 1, TOTAL - 1), 0)
    while (rest := TOTAL - int(model.sum())) != 0:
        largest = int(model.argmax())
        model[largest] += min(rest if rest > 0 else -1, TOTAL - 1 - int(model[largest]))
    return model


def cost_256ths(frequency: int) -> int:
    """log2(TOTAL / frequency) in 1/256 bits."""
    whole = frequency.bit_length() - 1
    x, fraction = (frequency << 32) >> whole, 0
    for _ in range(8):
        x = (x >> 16) ** 2
        fraction <<= 1
        if x >= 2 << 32:
            x >>= 1
            fraction |= 1
    return BITS * 256 - (whole * 256 + fraction)


def encode(symbols: Bytes, model: Model) -> bytes:
    """The stream of symbols that all have a frequency."""
    starts = np.concatenate(([0], np.cumsum(model)[:-1]))
    states = [LOW] * LANES
    words: list[int] = []
    for i in range(len(symbols) - 1, -1, -1):
        frequency, start = int(model[symbols[i]]), int(starts[symbols[i]])
        x = states[i % LANES]
        if x >= frequency << 20:
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % LANES] = (x // frequency << BITS) + x % frequency + start
    return np.array(states, dtype="<u4").tobytes() + np.array(words[::-1], dtype="<u2").tobytes()


def decode(stream: bytes, model: Model, count: int) -> Bytes | None:
    """`count` symbols, or None where the stream does not end as it must."""
    if len(stream) < STATE_BYTES:
        return None
    symbol_of = np.repeat(np.arange(256), model)
    starts = np.concatenate(([0], np.cumsum(model)[:-1]))
    states = np.frombuffer(stream[:STATE_BYTES], dtype="<u4").tolist()
    words, position = stream[STATE_BYTES:], 0
    symbols = np.empty(count, dtype=np.uint8)
    for i in range(count):
        x = states[i % LANES]
        slot = x % TOTAL
        symbol = int(symbol_of[slot])
        x = int(model[symbol]) * (x >> BITS) + slot - int(starts[symbol])
        if x < LOW:
            if position + 2 > len(words):
                return None
            x = x << 16 | int.from_bytes(words[position : position + 2], "little")
            position += 2
        states[i % LANES] = x
        symbols[i] = symbol
    return symbols if position == len(words) and all(state == LOW for state in states) else None
