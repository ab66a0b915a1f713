"""From token ids to the keys of chunks, as vLLM's block hashes make them: what `/lookup` by tokens needs.

vLLM hashes (hash of the block before, token ids, what else decides the block) as CBOR, or as a pickle, under
SHA-256. Both are written here byte for byte for the one shape that plain text prompts have: 32 bytes, integers,
nothing else. Nothing is ever read in either format. An engine sends along what it makes of one known block
(`probe`): where ours differs, or the algorithm is another, lookups by tokens are not offered for it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROBE_TOKENS = (1, 2, 3)
MAX_TOKEN = 2**31 - 1
_GROUP = (0).to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class Hashing:
    """How an engine hashes: equal ones give equal keys for equal tokens."""

    algorithm: str
    none_hash: bytes
    tokens_per_hash: int
    hashes_per_chunk: int

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """The keys of all whole chunks, each of the chunk and everything before it."""
        block_hash, found = self.none_hash, []
        step = self.tokens_per_hash
        for number in range(1, len(tokens) // step + 1):
            block_hash = _block_hash(self.algorithm, block_hash, tokens[(number - 1) * step : number * step])
            if number % self.hashes_per_chunk == 0:
                found.append(block_hash + _GROUP)
        return found


def read_hashing(said: Mapping[str, Any]) -> Hashing | None:
    """What an engine said of its hashing, where ours agrees with it."""
    try:
        none_hash, probe = bytes.fromhex(said["none_hash"]), bytes.fromhex(said["probe"])
        algorithm, per_hash, per_chunk = said["algorithm"], said["tokens_per_hash"], said["hashes_per_chunk"]
    except (KeyError, TypeError, ValueError):
        return None
    sizes = (per_hash, per_chunk)
    if not isinstance(algorithm, str) or algorithm not in _ENCODERS:
        return None
    if not all(isinstance(size, int) and 0 < size < 2**24 for size in sizes):
        return None
    if len(none_hash) != 32 or _block_hash(algorithm, none_hash, PROBE_TOKENS) != probe:
        return None
    return Hashing(algorithm, none_hash, per_hash, per_chunk)


def _block_hash(algorithm: str, before: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(_ENCODERS[algorithm](before, tokens)).digest()


def _cbor(before: bytes, tokens: Sequence[int]) -> bytes:
    """RFC 8949, canonical: array(3), bytes(32), array(n) of integers, null."""
    items = b"".join(_cbor_head(0x00, token) for token in tokens)
    return b"\x83" + _cbor_head(0x40, len(before)) + before + _cbor_head(0x80, len(tokens)) + items + b"\xf6"


def _cbor_head(kind: int, value: int) -> bytes:
    if value < 24:
        return bytes((kind | value,))
    for code, size in ((24, 1), (25, 2), (26, 4)):
        if value < 1 << 8 * size:
            return bytes((kind | code,)) + value.to_bytes(size, "big")
    return bytes((kind | 27,)) + value.to_bytes(8, "big")


def _pickle(before: bytes, tokens: Sequence[int]) -> bytes:
    """Protocol 5, one frame: SHORT_BINBYTES, the integers, a tuple of them, NONE, TUPLE3; each object memoized."""
    items = b"".join(_pickle_int(token) for token in tokens)
    if len(tokens) <= 3:
        inner = items + (b")", b"\x85\x94", b"\x86\x94", b"\x87\x94")[len(tokens)]
    else:
        inner = b"(" + items + b"t\x94"
    frame = b"C" + bytes((len(before),)) + before + b"\x94" + inner + b"N\x87\x94."
    return b"\x80\x05\x95" + struct.pack("<Q", len(frame)) + frame


def _pickle_int(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    return b"J" + value.to_bytes(4, "little")


_ENCODERS: Mapping[str, Callable[[bytes, Sequence[int]], bytes]] = {"sha256_cbor": _cbor, "sha256": _pickle}
