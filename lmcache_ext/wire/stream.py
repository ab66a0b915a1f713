"""A byte stream cut into heads and bodies, without reading it.

The owner of the socket feeds what it received and asks for heads. A body need not pass through here: its
owner may read it from the socket straight to where it belongs, and says `landed`.

    feed(data) ─► head() ─► body_left > 0: drain(into) what came along, read the rest elsewhere, landed(n) ─► head() ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from lmcache_ext.errors import StoreUnavailable

H = TypeVar("H")


class WireError(StoreUnavailable):
    """The peer sent bytes that are no frame of this protocol. Nothing after them can be trusted."""


class Decoder(ABC, Generic[H]):
    """Heads of type H, each followed by as many body bytes as it says.

    Holds at most what one `feed` brought plus one incomplete head. Raises WireError from `head`; the
    stream is of no use afterwards.
    """

    def __init__(self) -> None:
        self.body_left = 0
        """Bytes of the last head's body that have not been drained, skipped or landed."""
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they came from the peer."""
        self._buffer += data

    @property
    def buffered_bytes(self) -> int:
        """Bytes fed and not yet given out."""
        return len(self._buffer)

    def head(self) -> H | None:
        """The next head, or None until more is fed. Only where the body of the last one is through."""
        if self.body_left:
            raise ValueError(f"{self.body_left} bytes of the last body are still to come")
        found = self._parse(self._buffer)
        if found is None:
            return None
        head, head_bytes, self.body_left = found
        del self._buffer[:head_bytes]
        return head

    def drain(self, into: memoryview) -> int:
        """Move body bytes that were fed into `into`; how many."""
        num_bytes = min(len(self._buffer), self.body_left, len(into))
        if num_bytes:
            with memoryview(self._buffer) as fed:
                into[:num_bytes] = fed[:num_bytes]
            del self._buffer[:num_bytes]
            self.body_left -= num_bytes
        return num_bytes

    def skip(self) -> int:
        """Drop body bytes that were fed; how many."""
        num_bytes = min(len(self._buffer), self.body_left)
        del self._buffer[:num_bytes]
        self.body_left -= num_bytes
        return num_bytes

    def landed(self, num_bytes: int) -> None:
        """So many body bytes were read from the peer past this decoder."""
        if self._buffer or num_bytes > self.body_left:
            raise ValueError(f"{num_bytes} bytes landed, expected at most {self.body_left} and none fed before them")
        self.body_left -= num_bytes

    def take_rest(self) -> bytes:
        """What was fed and not understood: for the decoder that takes over."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    @abstractmethod
    def _parse(self, buffer: bytearray) -> tuple[H, int, int] | None:
        """(head, its bytes, the bytes of its body), or None where `buffer` is too short for a head."""
