"""How an object lies in Redis: its key, and its parts where it is large. Bytes only.

    kv:<namespace, 32 hex>:<rest of the key, hex>              the object, or a manifest and the object's first part
    {kv:<namespace>:<rest>}:<generation, 32 hex>:<number>      each other part, from number 1

Redis and Valkey serve 16 MiB values at half the speed of 1 MiB values, and Redis those of 1 MiB at two thirds of the
speed of 256 KiB, so a long object is cut. All
its keys have the same hash tag, so in a cluster they share one slot: a node that is lost takes its share of the
objects, not a part of almost every one.

A manifest is 48 bytes, numbers little-endian:

    offset  0  4b 56 43 50              "KVCP"
            4  02 00                    version 2
            6  number of parts          u16, the first included
            8  generation               16 bytes, random
           24  length of the object     u64
           32  length of a part         u64; the last may be shorter
           40  XXH3-64 over bytes [0, 40) and the key, big-endian

A value that does not begin with such a manifest, of this very key, is an object. An object that does is written as the
parts of another.
"""

from __future__ import annotations

import binascii
import os
import struct
from dataclasses import dataclass

import xxhash

from lmcache_ext.stores.base import MAX_KEY_BYTES, NAMESPACE_BYTES

MANIFEST_BYTES = 48
PART_BYTES = 256 * 1024
"""So that a few are under way in what a new connection may have under way (`resp_wire.AHEAD_BYTES`). Larger ones are
slower both ways, also where they are read by GETRANGE, 256 KiB at a time: nothing is gained by asking less often, and
Redis takes fresh memory from the kernel more often to put them in (benchmarks/RESULTS.md)."""

WHOLE_PARTS = 1.25
"""Objects up to so many parts long stay in one piece: a 256 KiB row has a frame before it."""

MAX_PARTS = 2**16 - 1
NUM_SLOTS = 16384

_HEAD = struct.Struct("<4sHH16sQQ")
MAGIC = b"KVCP"
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """Which parts an object has."""

    generation: bytes
    num_bytes: int
    part_bytes: int

    @property
    def num_parts(self) -> int:
        return -(-self.num_bytes // self.part_bytes)

    def length_of(self, index: int) -> int:
        """Bytes of part `index`."""
        return min(self.part_bytes, self.num_bytes - index * self.part_bytes)

    def part_keys(self, key: bytes) -> list[bytes]:
        """Redis' keys of the parts of the object under `key` (ours), from part 1: the first is with the manifest."""
        head = b"{%b}:%b:" % (redis_key(key), self.generation.hex().encode())
        return [head + b"%d" % index for index in range(1, self.num_parts)]

    def encode(self, key: bytes) -> bytes:
        """The 48 bytes."""
        head = _HEAD.pack(MAGIC, _VERSION, self.num_parts, self.generation, self.num_bytes, self.part_bytes)
        return head + _checksum(head, key)


def new_manifest(num_bytes: int, part_bytes: int = PART_BYTES) -> Manifest:
    """A manifest of a new generation.

    Parts are of one size, about `part_bytes`, so that a row of 2 MiB and its frame are two and not three; longer where
    there would be too many.
    """
    num_parts = max(1, -(-(num_bytes - int((WHOLE_PARTS - 1) * part_bytes)) // part_bytes))
    return Manifest(os.urandom(16), num_bytes, max(1, -(-num_bytes // min(num_parts, MAX_PARTS))))


def parse_manifest(data: bytes, key: bytes) -> Manifest | None:
    """The manifest that a value begins with, or None where it does not begin with one of this key."""
    if len(data) < MANIFEST_BYTES or not data.startswith(MAGIC):
        return None
    _, version, num_parts, generation, num_bytes, part_bytes = _HEAD.unpack_from(data)
    if version != _VERSION or not part_bytes or data[40:MANIFEST_BYTES] != _checksum(data[:40], key):
        return None
    manifest = Manifest(generation, num_bytes, part_bytes)
    return manifest if manifest.num_parts == num_parts else None


def redis_key(key: bytes) -> bytes:
    """The name of the object in Redis: readable, one to one, without braces."""
    if not NAMESPACE_BYTES < len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"key has {len(key)} bytes, expected {NAMESPACE_BYTES + 1} to {MAX_KEY_BYTES}")
    return f"kv:{key[:NAMESPACE_BYTES].hex()}:{key[NAMESPACE_BYTES:].hex()}".encode()


def slot_of(key: bytes) -> int:
    """The cluster slot of an object and of its parts (CRC16-XMODEM)."""
    return binascii.crc_hqx(redis_key(key), 0) % NUM_SLOTS


def _checksum(head: bytes, key: bytes) -> bytes:
    return xxhash.xxh3_64_digest(head + key)
