"""How an object lies in Redis: its key, and its parts where it is large. Bytes only.

    kv:<namespace, 32 hex>:<rest of the key, hex>              the object, or the manifest of its parts
    {kv:<namespace>:<rest>}:<generation, 32 hex>:<number>      one part

Redis and Valkey serve 16 MiB values at half the speed of 4 MiB values, so a long object is cut. All
its keys have the same hash tag, so in a cluster they share one slot: a node that is lost takes its share of the
objects, not a part of almost every one.

A manifest is 48 bytes, numbers little-endian:

    offset  0  4b 56 43 50              "KVCP"
            4  01 00                    version 1
            6  number of parts          u16
            8  generation               16 bytes, random
           24  length of the object     u64
           32  length of a part         u64; the last may be shorter
           40  XXH3-64 over bytes [0, 40) and the key, big-endian

Forty-eight bytes that are not such a manifest, of this very key, are an object. An object of 48 bytes that would be
taken for one is written in parts, as one part.
"""

from __future__ import annotations

import binascii
import os
import struct
from dataclasses import dataclass

import xxhash

from lmcache_ext.stores.base import MAX_KEY_BYTES, NAMESPACE_BYTES

MANIFEST_BYTES = 48
PART_BYTES = 2 * 1024**2
"""32 MiB over TCP, put / get GB/s by parts: none 1.1 / 0.9, 8 MiB 1.1 / 0.8, 4 MiB 1.8 / 1.4, 2 MiB 1.9 / 1.7 (Redis
7.0, two busy cores)."""

WHOLE_PARTS = 2.5
"""Objects up to so many parts long stay in one piece: a 4 MiB row has a frame before it, and one GET is one GET."""

MAX_PARTS = 2**16 - 1
NUM_SLOTS = 16384

_HEAD = struct.Struct("<4sHH16sQQ")
_MAGIC = b"KVCP"
_VERSION = 1


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
        """Redis' keys of the parts of the object under `key` (ours)."""
        head = b"{%b}:%b:" % (redis_key(key), self.generation.hex().encode())
        return [head + b"%d" % index for index in range(self.num_parts)]

    def encode(self, key: bytes) -> bytes:
        """The 48 bytes."""
        head = _HEAD.pack(_MAGIC, _VERSION, self.num_parts, self.generation, self.num_bytes, self.part_bytes)
        return head + _checksum(head, key)


def new_manifest(num_bytes: int, part_bytes: int = PART_BYTES) -> Manifest:
    """A manifest of a new generation; parts are longer than asked where there would be too many."""
    return Manifest(os.urandom(16), num_bytes, max(part_bytes, -(-num_bytes // MAX_PARTS)))


def parse_manifest(data: bytes, key: bytes) -> Manifest | None:
    """The manifest, or None where the bytes are not one of this key."""
    if len(data) != MANIFEST_BYTES or data[40:] != _checksum(data[:40], key):
        return None
    magic, version, num_parts, generation, num_bytes, part_bytes = _HEAD.unpack(data[:40])
    if magic != _MAGIC or version != _VERSION or not part_bytes:
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
