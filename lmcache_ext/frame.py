"""The 64 bytes before every stored object.

An object is a header of FRAME_BYTES followed by the payload, the row as a serde encoded it. Integers
are little-endian; the three digests are byte strings, XXH3 ones in their canonical (big-endian) form,
the one `xxhsum` prints.

    offset size  field
         0    4  magic          b"KVCF"
         4    2  version        u16 = 1
         6    1  serde tag      u8, 0 = naive
         7    1  flags          u8 = 0
         8   16  namespace      of model, weights, layout and chunking (`lmcache_ext.namespace`)
        24    8  key digest     XXH3-64 of the whole key
        32    8  raw length     u64, bytes after decoding: the length of the row
        40    8  stored length  u64, bytes of payload that follow the header
        48   16  checksum       XXH3-128 over header[0:48], the whole key, the payload

A writer MUST set version to 1 and flags to 0, and MUST compute the checksum over the exact payload that
follows. It MAY leave payload and raw lengths unequal (a compressing serde does).

A reader MUST refuse another magic, another version, and any flag: a flag is a promise that it cannot
keep. It MUST NOT allocate by a length found in a header; it compares that length with what it already
holds. It MUST compare namespace and key before the lengths, and the lengths before the checksum, so that
each lie is told by its own name. It MUST NOT use one byte of the payload before the checksum agreed. It
MUST treat every FrameError as a miss, and MAY delete the object.

The checksum finds accidents: torn writes, flipped bits, files put in each other's place. It is not a
signature; who may write to a store may put anything into it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from lmcache_ext.errors import (
    BadMagic,
    ChecksumMismatch,
    ForeignKey,
    ForeignNamespace,
    LengthMismatch,
    OversizedFrame,
    TruncatedFrame,
    UnsupportedVersion,
)

MAGIC = b"KVCF"
VERSION = 1
FRAME_BYTES = 64
NAMESPACE_BYTES = 16
"""The same number as in `lmcache_ext.stores.base`, which this module may not import."""

_HEAD = struct.Struct("<4sHBB16s8sQQ")
_MAX_LENGTH = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says of its object; nothing in it is believed before `verify`."""

    version: int
    serde_tag: int
    namespace: bytes
    key_digest: bytes
    raw_length: int
    stored_length: int
    checksum: bytes


def encode(
    *, namespace: bytes, key: bytes, serde_tag: int, raw_length: int, payload_parts: Sequence[memoryview]
) -> bytes:
    """The header for a payload scattered over `payload_parts` (contiguous byte views), read once.

    Hashing releases the interpreter lock. Raises ValueError where a field does not fit its place.
    """
    if len(namespace) != NAMESPACE_BYTES:
        raise ValueError(f"namespace has {len(namespace)} bytes, expected {NAMESPACE_BYTES}")
    if not 0 <= serde_tag <= 255 or not 0 <= raw_length <= _MAX_LENGTH:
        raise ValueError(f"serde tag {serde_tag} or raw length {raw_length} does not fit its field")
    stored_length = sum(part.nbytes for part in payload_parts)
    head = _HEAD.pack(MAGIC, VERSION, serde_tag, 0, namespace, key_digest(key), raw_length, stored_length)
    return head + _checksum(head, key, payload_parts, stored_length)


def parse(header: bytes | memoryview) -> Header:
    """Read the first FRAME_BYTES of an object. Raises TruncatedFrame, BadMagic, UnsupportedVersion."""
    view = memoryview(header).cast("B")
    if len(view) < FRAME_BYTES:
        raise TruncatedFrame(f"read {len(view)} bytes of a header, expected {FRAME_BYTES}")
    magic, version, serde_tag, flags, namespace, digest, raw_length, stored_length = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise BadMagic(f"read magic {magic!r}, expected {MAGIC!r}")
    if version != VERSION or flags != 0:
        raise UnsupportedVersion(f"read version {version} with flags {flags:#04x}, expected {VERSION} with 0x00")
    checksum = bytes(view[_HEAD.size : FRAME_BYTES])
    return Header(version, serde_tag, namespace, digest, raw_length, stored_length, checksum)


def verify(
    header: Header,
    *,
    namespace: bytes,
    key: bytes,
    payload_parts: Sequence[memoryview],
    object_length: int,
    raw_length: int | None = None,
) -> None:
    """Judge an object that a store scattered into `payload_parts`; returns only if it is the right one.

    The payload lies at the beginning of `payload_parts`; what follows it there is not looked at.
    `object_length` is the whole object's, header included; `raw_length` the row's, where the caller
    knows it. Raises, in this order, ForeignNamespace, ForeignKey, TruncatedFrame, OversizedFrame,
    LengthMismatch, ChecksumMismatch.
    """
    if header.namespace != namespace:
        raise ForeignNamespace(f"read namespace {header.namespace.hex()}, expected {namespace.hex()}")
    digest = key_digest(key)
    if header.key_digest != digest:
        raise ForeignKey(f"read key digest {header.key_digest.hex()}, expected {digest.hex()}")
    _verify_lengths(header, object_length, sum(part.nbytes for part in payload_parts), raw_length)
    head = _HEAD.pack(
        MAGIC, header.version, header.serde_tag, 0, namespace, digest, header.raw_length, header.stored_length
    )
    checksum = _checksum(head, key, payload_parts, header.stored_length)
    if header.checksum != checksum:
        raise ChecksumMismatch(f"read checksum {header.checksum.hex()}, computed {checksum.hex()}")


def key_digest(key: bytes) -> bytes:
    """The 8 bytes by which a header names its key."""
    return xxhash.xxh3_64_digest(key)


def _verify_lengths(header: Header, object_length: int, room: int, raw_length: int | None) -> None:
    claimed = FRAME_BYTES + header.stored_length
    if object_length < claimed:
        raise TruncatedFrame(f"object has {object_length} bytes, its header says {claimed}")
    if object_length > claimed:
        raise OversizedFrame(f"object has {object_length} bytes, its header says {claimed}")
    if header.stored_length > room:
        raise OversizedFrame(f"payload has {header.stored_length} bytes, the buffers hold {room}")
    if raw_length is not None and header.raw_length != raw_length:
        raise LengthMismatch(f"payload decodes to {header.raw_length} bytes, the row has {raw_length}")


def _checksum(head: bytes, key: bytes, payload_parts: Sequence[memoryview], num_bytes: int) -> bytes:
    """XXH3-128 over the head, the key and the first `num_bytes` of the parts."""
    hasher = xxhash.xxh3_128(head)
    hasher.update(key)
    for part in payload_parts:
        if num_bytes < part.nbytes:
            part = part.cast("B")[:num_bytes]
        hasher.update(part)
        num_bytes -= part.nbytes
    return hasher.digest()
