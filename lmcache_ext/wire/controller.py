"""What an engine and the controller say to each other. README.md has the page of bytes and the operations.

A message is a JSON object, for what may grow, and a body, for keys. Fields that a reader does not know it skips;
the version changes only where an old reader would misunderstand.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import override

from lmcache_ext.wire.stream import Decoder, WireError

VERSION = 1
MAGIC = b"KVCC"
ZEROMQ = b"\xff\x00\x00\x00\x00\x00\x00"
"""What a ZeroMQ socket begins with, before it has read anything: then a length, which is small, and the byte 0x7F."""

_HEAD = struct.Struct("<4sBBHI")
HEAD_BYTES = _HEAD.size
MAX_FIELD_BYTES = 2**16 - 1
MAX_BODY_BYTES = 1024**2
MAX_NAME_CHARS = 256
"""Of instance ids, addresses and every other text."""

T = TypeVar("T", int, float, str, bool)


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `body` is keys as `wire.v2.encode_keys` writes them, or nothing."""

    fields: Mapping[str, Any]
    body: bytes = b""

    @property
    def op(self) -> str:
        """What is asked; "" in an answer."""
        return self.get("op", str, "")

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A field of that type. Raises WireError where it is of another, or missing and without a default."""
        value = self.fields.get(name, default)
        if value is None and default is None:
            raise WireError(f"{name} is missing")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise WireError(f"{name} is {type(value).__name__}, expected {kind.__name__}")
        if isinstance(value, str) and len(value) > MAX_NAME_CHARS:
            raise WireError(f"{name} has {len(value)} characters, at most {MAX_NAME_CHARS} are read")
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            raise WireError(f"{name} has half of a surrogate pair, which is no text")  # JSON can write it, UTF-8 cannot
        return value


def encode(fields: Mapping[str, Any], body: bytes = b"") -> bytes:
    """Raises ValueError where the message is beyond the limits."""
    text = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_FIELD_BYTES or len(body) > MAX_BODY_BYTES:
        raise ValueError(f"{len(text)} bytes of fields or a body of {len(body)} bytes is beyond the limits")
    return _HEAD.pack(MAGIC, VERSION, 0, len(text), len(body)) + text + body


class MessageDecoder(Decoder[Message]):
    """Messages out of a stream of bytes: heads whose body is part of them, so none is left to drain."""

    @override
    def _parse(self, buffer: bytearray) -> tuple[Message, int, int] | None:
        if not MAGIC.startswith(buffer[: len(MAGIC)]):  # at once: who speaks another protocol may wait for an answer
            raise WireError(_what_came(buffer))
        if len(buffer) < HEAD_BYTES:
            return None
        magic, version, zero, field_bytes, body_bytes = _HEAD.unpack_from(buffer)
        if version != VERSION or zero:
            raise WireError(f"read magic {magic!r} and version {version}, expected {MAGIC!r} and {VERSION}")
        if body_bytes > MAX_BODY_BYTES:
            raise WireError(f"read a body of {body_bytes} bytes, at most {MAX_BODY_BYTES} are sent")
        end = HEAD_BYTES + field_bytes
        if len(buffer) < end + body_bytes:
            return None
        fields = _fields(bytes(buffer[HEAD_BYTES:end]))
        return Message(fields, bytes(buffer[end : end + body_bytes])), end + body_bytes, 0


def _what_came(begin: bytearray) -> str:
    if begin.startswith(ZEROMQ[: len(begin)]):
        return "read ZeroMQ's greeting: LMCache's workers and controllers speak it, and no engine or controller here"
    return f"read {bytes(begin[: len(MAGIC)])!r}, expected {MAGIC!r}"


def _fields(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{len(text)} bytes of fields are not JSON: {str(error)[:100]}") from error
    if not isinstance(fields, dict):
        raise WireError(f"fields are {type(fields).__name__}, expected an object")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
