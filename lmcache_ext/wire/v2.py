"""Our own frames: pipelined, acknowledged, batched, authenticated. README.md has the page of bytes.

A connection begins in the old protocol and changes over after one question that an old server answers
harmlessly (`hello_request`, `speaks_v2`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from lmcache_ext.wire import lm
from lmcache_ext.wire.stream import Decoder, WireError

VERSION = 2
HELLO_NAME = "kvcf-wire@2@0@0@uint8"
_MARK = 0x4643564B  # b"KVCF"

_HEAD = struct.Struct("<BBHIQQ")
HEAD_BYTES = _HEAD.size
_REQUEST_MAGIC = 0xC2
_REPLY_MAGIC = 0xC3

MAX_KEY_BYTES = 1024
MAX_BATCH_KEYS = 4096
MAX_SMALL_BYTES = 1024**2
"""Of every body but an object: tokens, batches of keys, answers to them, statistics."""
MAX_TOKEN_BYTES = 4096
MAX_MESSAGE_BYTES = 512
MAX_OBJECT_BYTES = 2**40

_KEY_LENGTH = struct.Struct("<H")
_CAPABILITIES = struct.Struct("<QII")


class Op(IntEnum):
    HELLO = 1
    PUT = 2
    GET = 3
    EXISTS = 4
    DELETE = 5
    STATS = 6
    PING = 7


class Status(IntEnum):
    OK = 0
    MISS = 1
    FULL = 2
    REFUSED = 3
    UNAUTHORIZED = 4
    FAILED = 5


_OPS = frozenset(Op)
_STATUSES = frozenset(Status)


@dataclass(frozen=True, slots=True)
class Request:
    """`body_bytes` follow the key. `argument`: of a GET how many bytes of the object are wanted at most, of STATS 1 for
    how many objects there are of each namespace."""

    op: Op
    request_id: int
    key: bytes = b""
    body_bytes: int = 0
    argument: int = 0

    def encode(self) -> bytes:
        """Header and key. Raises ValueError where a field does not fit."""
        if len(self.key) > MAX_KEY_BYTES or not 0 <= self.body_bytes <= MAX_OBJECT_BYTES:
            raise ValueError(f"key of {len(self.key)} or body of {self.body_bytes} bytes is beyond the limits")
        return (
            _HEAD.pack(_REQUEST_MAGIC, self.op, len(self.key), self.request_id, self.body_bytes, self.argument)
            + self.key
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """`body_bytes` follow. `value`: the object's whole length after GET, how many after DELETE."""

    status: Status
    request_id: int
    body_bytes: int = 0
    value: int = 0

    def encode(self) -> bytes:
        return _HEAD.pack(_REPLY_MAGIC, self.status, 0, self.request_id, self.body_bytes, self.value)


class RequestDecoder(Decoder[Request]):
    """What a server reads. Objects longer than it wants are its own to refuse."""

    def _parse(self, buffer: bytearray) -> tuple[Request, int, int] | None:
        if len(buffer) < HEAD_BYTES:
            return None
        magic, op, key_bytes, request_id, body_bytes, argument = _HEAD.unpack_from(buffer)
        if magic != _REQUEST_MAGIC or op not in _OPS:
            raise WireError(f"read magic {magic:#04x} and operation {op}, expected {_REQUEST_MAGIC:#04x} and 1 to 7")
        _check_lengths(Op(op), key_bytes, body_bytes)
        end = HEAD_BYTES + key_bytes
        if len(buffer) < end:
            return None
        return Request(Op(op), request_id, bytes(buffer[HEAD_BYTES:end]), body_bytes, argument), end, body_bytes


class ReplyDecoder(Decoder[Reply]):
    """What a client reads. It knows better than the frame how long a body may be."""

    def _parse(self, buffer: bytearray) -> tuple[Reply, int, int] | None:
        if len(buffer) < HEAD_BYTES:
            return None
        magic, status, zero, request_id, body_bytes, value = _HEAD.unpack_from(buffer)
        if magic != _REPLY_MAGIC or zero != 0 or status not in _STATUSES:
            raise WireError(f"read magic {magic:#04x} and status {status}, expected {_REPLY_MAGIC:#04x} and 0 to 5")
        if body_bytes > MAX_OBJECT_BYTES:
            raise WireError(f"read a body of {body_bytes} bytes, at most {MAX_OBJECT_BYTES} are sent")
        return Reply(Status(status), request_id, body_bytes, value), HEAD_BYTES, body_bytes


def _check_lengths(op: Op, key_bytes: int, body_bytes: int) -> None:
    has_key = op in (Op.PUT, Op.GET)
    if key_bytes > MAX_KEY_BYTES or has_key != (key_bytes > 0):
        raise WireError(f"read {op.name} with a key of {key_bytes} bytes")
    limits = {
        Op.PUT: MAX_OBJECT_BYTES,
        Op.HELLO: MAX_TOKEN_BYTES,
        Op.EXISTS: MAX_SMALL_BYTES,
        Op.DELETE: MAX_SMALL_BYTES,
    }
    if body_bytes > limits.get(op, 0):
        raise WireError(f"read {op.name} with a body of {body_bytes} bytes, at most {limits.get(op, 0)} are read")


def encode_keys(keys: Sequence[bytes]) -> bytes:
    """The body of EXISTS and DELETE."""
    return b"".join(_KEY_LENGTH.pack(len(key)) + key for key in keys)


def decode_keys(body: bytes | bytearray | memoryview) -> list[bytes]:
    """The keys of a batch. Raises WireError."""
    data = bytes(body)
    keys: list[bytes] = []
    at = 0
    while at < len(data):
        if at + 2 > len(data) or len(keys) == MAX_BATCH_KEYS:
            raise WireError(f"a batch of {len(keys)} keys has {len(data) - at} bytes left over")
        (length,) = _KEY_LENGTH.unpack_from(data, at)
        at += 2 + length
        if not 0 < length <= MAX_KEY_BYTES or at > len(data):
            raise WireError(f"a key of {length} bytes ends {at - len(data)} bytes behind its batch")
        keys.append(data[at - length : at])
    return keys


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server says of itself in its answer to HELLO."""

    max_object_bytes: int
    max_batch_keys: int
    max_in_flight: int

    def encode(self) -> bytes:
        return _CAPABILITIES.pack(self.max_object_bytes, self.max_batch_keys, self.max_in_flight)

    @classmethod
    def decode(cls, body: bytes) -> Capabilities:
        """Later versions may say more after these 16 bytes. Raises WireError."""
        if len(body) < _CAPABILITIES.size:
            raise WireError(f"read {len(body)} bytes of capabilities, expected {_CAPABILITIES.size}")
        max_object_bytes, max_batch_keys, max_in_flight = _CAPABILITIES.unpack_from(body)
        if not 0 < max_batch_keys <= MAX_BATCH_KEYS:
            raise WireError(f"read a batch of {max_batch_keys} keys, expected 1 to {MAX_BATCH_KEYS}")
        return cls(max_object_bytes, max_batch_keys, max_in_flight)


def hello_request() -> lm.Request:
    """The question in the old protocol: HEALTH of a well-formed key that names our version."""
    return lm.Request(lm.Command.HEALTH, HELLO_NAME)


def hello_reply() -> lm.Reply:
    """Our answer; an old server leaves these fields 0. From its next byte on, the connection speaks v2."""
    return lm.Reply(lm.OK, meta=lm.Meta(fmt=1, dtype=2, shape=(_MARK, VERSION, 0, 0)))


def speaks_v2(reply: lm.Reply) -> bool:
    """Whether the server that answered `hello_request` changed over."""
    return reply.code == lm.OK and reply.meta.shape[:2] == (_MARK, VERSION)
