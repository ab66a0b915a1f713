"""The row as it is: no copy, no loss."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_ext.errors import LengthMismatch
from lmcache_ext.serde.base import Serde


class NaiveSerde(Serde):
    """Sockets and files read into the row and write from it."""

    name = "naive"
    tag = 0
    lossless = True

    def encode(self, row: memoryview) -> Sequence[memoryview]:
        return (row,)

    def receive(self, row: memoryview) -> Sequence[memoryview]:
        return (row,)

    def decode(self, received: Sequence[memoryview], stored_bytes: int, row: memoryview) -> None:
        if stored_bytes != row.nbytes:
            raise LengthMismatch(f"stored {stored_bytes} bytes, expected {row.nbytes}")
        if received[0] is not row:  # it was received for another serde
            row[:] = received[0][:stored_bytes]
