"""RESP2, the protocol of Redis and Valkey: commands to bytes, bytes to replies. No I/O.

A command is an array of bulk strings; a reply is one of

    +text\\r\\n            bytes
    -CODE text\\r\\n       ErrorReply
    :number\\r\\n          int
    $length\\r\\n...\\r\\n   bytes, or None for length -1
    *count\\r\\n...        list, or None for count -1

The connection is asked for RESP2 (no HELLO), so anything else is not a reply. What the other side says about lengths
is believed only within the limits below. https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from lmcache_ext.errors import StoreUnavailable

MAX_LINE_BYTES = 8192
"""Of a text, an error or a length; redis-server itself allows 64 KiB, and sends a few hundred bytes."""

MAX_REPLY_BYTES = 1024**2
"""Of a reply that is read whole, such as INFO or CLUSTER SLOTS. Payloads do not go this way."""

MAX_BULK_BYTES = 2**40
"""Of a payload: redis-server's own limit is 512 MiB unless configured."""

MAX_DEPTH = 8
"""Of arrays in arrays; CLUSTER SLOTS has four."""

_NUMBER = re.compile(rb"-?[0-9]{1,19}")


class ErrorReply(NamedTuple):
    """The server understood and said no; `text` begins with an upper-case code."""

    text: str

    @property
    def code(self) -> str:
        """`NOAUTH` of `NOAUTH Authentication required.`"""
        return self.text.partition(" ")[0]


class Incomplete:
    """More bytes are needed."""


INCOMPLETE: Final = Incomplete()

Reply: TypeAlias = "bytes | int | ErrorReply | list[Reply] | None"
Argument: TypeAlias = "bytes | int | Sequence[memoryview]"
"""Of a command; a sequence of views of bytes is one bulk string, which is their concatenation."""


def encode(arguments: Sequence[Argument]) -> list[bytes | memoryview]:
    """The command as buffers to send in order; views are passed on, not copied."""
    buffers: list[bytes | memoryview] = []
    small = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        if isinstance(argument, int):
            argument = b"%d" % argument
        if isinstance(argument, bytes):
            small.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
            continue
        small.append(b"$%d\r\n" % sum(map(len, argument)))
        buffers += [b"".join(small), *argument]
        small = [b"\r\n"]
    buffers.append(b"".join(small))
    return buffers


class Decoder:
    """Bytes in, replies out.

    Threads:  one at a time.
    Order:    replies come in the order of their bytes; how the bytes were cut does not matter.
    Owner:    what is fed is copied; what `take` gives is the caller's.
    Failure:  StoreUnavailable for anything that is not RESP2 or beyond a limit; the decoder is useless afterwards.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> None:
        """Append what was received."""
        self._buffer += data

    def __len__(self) -> int:
        """How many bytes were fed and not used yet."""
        return len(self._buffer)

    def peek(self, size: int) -> bytes:
        """Up to `size` raw bytes, which stay."""
        return bytes(self._buffer[:size])

    def may_become(self, start: bytes) -> bool:
        """Whether it is the beginning of `start`, and not all of it yet."""
        return len(self._buffer) < len(start) and start.startswith(self._buffer)

    def skip(self, start: bytes, unlike: bytes = b"") -> bool:
        """Use up `start`, if that is what comes next and what follows is not, or might yet be, `unlike`."""
        if not self._buffer.startswith(start) or len(self._buffer) < len(start) + len(unlike):
            return False
        if unlike and self._buffer.startswith(unlike, len(start)):
            return False
        del self._buffer[: len(start)]
        return True

    def take_into(self, view: memoryview) -> int:
        """Move raw bytes to `view`, the beginning of a payload whose length was just read; how many."""
        size = min(len(self._buffer), len(view))
        with memoryview(self._buffer) as fed:
            view[:size] = fed[:size]
        del self._buffer[:size]
        return size

    def reply(self) -> Reply | Incomplete:
        """One whole reply."""
        found = self._parse(0, 0)
        if isinstance(found, Incomplete):
            if len(self._buffer) > MAX_REPLY_BYTES:
                raise StoreUnavailable(f"a reply of more than {MAX_REPLY_BYTES} bytes")
            return found
        value, end = found
        del self._buffer[:end]
        return value

    def bulk_length(self) -> int | ErrorReply | Incomplete | None:
        """The length before a payload, which is left to `take_into` (and the socket); None where there is none."""
        line = self._line(0)
        if isinstance(line, Incomplete):
            return line
        kind, text, end = line
        if kind not in b"$-":
            raise StoreUnavailable(f"expected a bulk string, got {_shown(kind + text)}")
        del self._buffer[:end]
        return ErrorReply(_readable(text)) if kind == b"-" else _length(text, MAX_BULK_BYTES)

    def _parse(self, at: int, depth: int) -> tuple[Reply, int] | Incomplete:
        line = self._line(at)
        if isinstance(line, Incomplete):
            return line
        kind, text, at = line
        if kind == b"+":
            return text, at
        if kind == b"-":
            return ErrorReply(_readable(text)), at
        if kind == b":":
            return _number(text), at
        if kind == b"$":
            return self._bulk(_length(text, MAX_REPLY_BYTES), at)
        if kind == b"*":
            return self._array(_length(text, MAX_REPLY_BYTES // 4), at, depth + 1)
        raise StoreUnavailable(f"not a reply: {_shown(kind + text)}")

    def _line(self, at: int) -> tuple[bytes, bytes, int] | Incomplete:
        """Kind, text and the position after the line."""
        end = self._buffer.find(b"\r\n", at, at + MAX_LINE_BYTES)
        if end > at:
            return bytes(self._buffer[at : at + 1]), bytes(self._buffer[at + 1 : end]), end + 2
        if end == at:
            raise StoreUnavailable("not a reply: an empty line")
        if len(self._buffer) > at and self._buffer[at] not in b"+-:$*":
            raise StoreUnavailable(f"not a reply: {_shown(bytes(self._buffer[at : at + 40]))}")
        if len(self._buffer) - at >= MAX_LINE_BYTES:
            raise StoreUnavailable(f"a line of more than {MAX_LINE_BYTES} bytes")
        return INCOMPLETE

    def _bulk(self, length: int | None, at: int) -> tuple[bytes | None, int] | Incomplete:
        if length is None:
            return None, at
        end = at + length
        if len(self._buffer) < end + 2:
            return INCOMPLETE
        check_end(bytes(self._buffer[end : end + 2]))
        return bytes(self._buffer[at:end]), end + 2

    def _array(self, count: int | None, at: int, depth: int) -> tuple[Reply, int] | Incomplete:
        if count is None:
            return None, at
        if depth > MAX_DEPTH:
            raise StoreUnavailable(f"arrays in arrays, more than {MAX_DEPTH} deep")
        items: list[Reply] = []
        for _ in range(count):
            found = self._parse(at, depth)
            if isinstance(found, Incomplete):
                return found
            item, at = found
            items.append(item)
        return items, at


def check_end(data: bytes | memoryview) -> None:
    """What follows a payload must be a line end. Raises StoreUnavailable."""
    if data != b"\r\n":
        raise StoreUnavailable(f"a payload of another length than told: {_shown(bytes(data))} after it")


def _number(text: bytes) -> int:
    if not _NUMBER.fullmatch(text):
        raise StoreUnavailable(f"not a number: {_shown(text)}")
    return int(text)


def _length(text: bytes, limit: int) -> int | None:
    number = _number(text)
    if number == -1:
        return None
    if not 0 <= number <= limit:
        raise StoreUnavailable(f"a length of {number}, expected 0 to {limit}")
    return number


def _readable(text: bytes) -> str:
    return text.decode("ascii", "backslashreplace")


def _shown(data: bytes) -> str:
    return repr(data[:40])
