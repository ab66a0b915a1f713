"""The frames of LMCache 0.5: 186-byte requests, 36-byte replies. README.md has the page of bytes.

One request at a time on a connection; PUT has no reply. Integers are int32, little-endian, as every
machine that ran it had them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from lmcache_ext.wire.stream import Decoder, WireError

NAME_BYTES = 150
MAX_INT32 = 2**31 - 1

_FIELDS = struct.Struct("<9i")
REQUEST_BYTES = _FIELDS.size + NAME_BYTES
REPLY_BYTES = _FIELDS.size


class Command(IntEnum):
    PUT = 1
    GET = 2
    EXIST = 3
    LIST = 4
    HEALTH = 5


_COMMANDS = frozenset(Command)

OK = 200
FAILED = 400


@dataclass(frozen=True, slots=True)
class Meta:
    """What LMCache says of a tensor; carried from PUT to GET, never looked at."""

    fmt: int
    dtype: int
    shape: tuple[int, int, int, int]
    location: int = 0


NO_META = Meta(fmt=1, dtype=2, shape=(0, 0, 0, 0))
"""In every reply that carries no object: KV_2LTD, half."""


def binary(num_bytes: int) -> Meta:
    """Of an object that is bytes and nothing more: BINARY, uint8, its length as shape."""
    return Meta(fmt=4, dtype=6, shape=(min(num_bytes, MAX_INT32), 0, 0, 0))


@dataclass(frozen=True, slots=True)
class Request:
    """`length` bytes of payload follow a PUT; it is 0 in all others."""

    command: Command
    name: str
    length: int = 0
    meta: Meta = NO_META

    def encode(self) -> bytes:
        """The 186 bytes. Raises ValueError for a name that cannot travel."""
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r} is not 1 to {NAME_BYTES} bytes of printable UTF-8")
        meta = self.meta
        head = _FIELDS.pack(self.command, self.length, meta.fmt, meta.dtype, meta.location, *meta.shape)
        return head + name_field(self.name)


@dataclass(frozen=True, slots=True)
class Reply:
    """`length` bytes of payload follow a 200 to GET or LIST."""

    code: int
    length: int = 0
    meta: Meta = NO_META

    def encode(self) -> bytes:
        """The 36 bytes; the location is last here, and fifth in a request."""
        meta = self.meta
        return _FIELDS.pack(self.code, self.length, meta.fmt, meta.dtype, *meta.shape, meta.location)


def is_name(name: str) -> bool:
    """Whether it can be a key: trailing blanks are padding, and LIST separates by newlines."""
    return 0 < len(name.encode()) <= NAME_BYTES and name.isprintable() and not name.endswith(" ")


def name_field(name: str) -> bytes:
    """A key as it travels: UTF-8, for the path of a model may be in any script, padded with blanks."""
    return name.encode().ljust(NAME_BYTES)


def parse_name(field: bytes) -> str | None:
    """The key in such a field; None where it is none."""
    try:
        name = field.rstrip(b" ").decode()
    except UnicodeDecodeError:
        return None
    return name if is_name(name) else None


class RequestDecoder(Decoder[Request]):
    """What a server reads."""

    def _parse(self, buffer: bytearray) -> tuple[Request, int, int] | None:
        if len(buffer) < REQUEST_BYTES:
            return None
        command, length, fmt, dtype, location, *shape = _FIELDS.unpack_from(buffer)
        if command not in _COMMANDS:
            raise WireError(f"read command {command}, expected 1 to {max(Command)}")
        if length < 0 or (length > 0 and command != Command.PUT):
            raise WireError(f"read length {length} in {Command(command).name}")
        field = bytes(buffer[_FIELDS.size : REQUEST_BYTES])
        name = parse_name(field)
        if name is None:
            raise WireError(
                f"read the key {field.rstrip()[:40]!r}, expected 1 to {NAME_BYTES} bytes of printable UTF-8"
            )
        a, b, c, d = shape
        return Request(Command(command), name, length, Meta(fmt, dtype, (a, b, c, d), location)), REQUEST_BYTES, length


class ReplyDecoder(Decoder[Reply]):
    """What a client reads."""

    def _parse(self, buffer: bytearray) -> tuple[Reply, int, int] | None:
        if len(buffer) < REPLY_BYTES:
            return None
        code, length, fmt, dtype, a, b, c, d, location = _FIELDS.unpack_from(buffer)
        if code not in (OK, FAILED):
            raise WireError(f"read code {code}, expected {OK} or {FAILED}")
        if length < 0 or (length > 0 and code != OK):
            raise WireError(f"read length {length} after code {code}")
        return Reply(code, length, Meta(fmt, dtype, (a, b, c, d), location)), REPLY_BYTES, length
