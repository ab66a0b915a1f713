"""The contract of a way to write a row down.

Threads:  methods may be called from several threads at once; a serde holds no mutable state.
Order:    none.
Owner:    the row belongs to the caller; what `encode` returns may alias it and lives as long as it.
Failure:  `decode` raises a `FrameError` on bytes it cannot decode, before it has touched the row
          where it can tell beforehand. It never reads or writes out of bounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Serde(ABC):
    """How a row of KV becomes bytes and back. A row is one chunk of every rank, uint8, contiguous."""

    name: str
    """As in the configuration, e.g. ``naive``."""
    tag: int
    """One byte in the frame; never reused for another encoding."""
    lossless: bool

    @abstractmethod
    def encode(self, row: memoryview) -> Sequence[memoryview]:
        """The bytes to store, in order."""

    @abstractmethod
    def receive(self, row: memoryview) -> Sequence[memoryview]:
        """Where a stored payload should be read into: the row itself, or scratch of the largest size."""

    @abstractmethod
    def decode(self, received: Sequence[memoryview], stored_bytes: int, row: memoryview) -> None:
        """Fill `row` from the first `stored_bytes` of `received`.

        `received` is what `receive` gave out, or the payload in one piece that is not part of `row`.
        """
