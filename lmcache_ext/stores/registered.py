"""Where the pieces of an object lie in registered memory.

Rows are registered as a whole and their bytes move without a copy. What lies elsewhere is small (a frame) and goes
through a slot of registered scratch memory. What is neither goes through the client's own buffer: see `pieces`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SLOT_BYTES = 4096
_NUM_SLOTS = 256
_MAX_PIECES = 64  # each is a transfer of its own, and the client's queue for a peer is bounded


@dataclass(slots=True)
class Pieces:
    """One object as (address, bytes) in registered memory, and what of it lies in scratch memory instead."""

    addresses: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    in_scratch: list[tuple[memoryview, memoryview]] = field(default_factory=list)  # the caller's part, its stand-in

    def add(self, address: int, num_bytes: int) -> None:
        """What adjoins the piece before it is one with it."""
        if self.addresses and self.addresses[-1] + self.sizes[-1] == address:
            self.sizes[-1] += num_bytes
        else:
            self.addresses.append(address)
            self.sizes.append(num_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    def copy_in(self) -> None:
        """Before a put: the caller's bytes into scratch memory."""
        for part, scratch in self.in_scratch:
            scratch[:] = part

    def copy_out(self) -> None:
        """After a get: scratch memory into the caller's parts."""
        for part, scratch in self.in_scratch:
            part[:] = scratch


class Memory:
    """The registered memory of one store.

    Threads:  any number, after `add_rows`.
    Owner:    of the scratch memory; of rows it knows the place only, so that they can be unmapped.
    """

    def __init__(self) -> None:
        self._scratch = np.zeros(_NUM_SLOTS * SLOT_BYTES, np.uint8)
        scratch = self._scratch.data
        self._slots = deque(scratch[at : at + SLOT_BYTES] for at in range(0, scratch.nbytes, SLOT_BYTES))
        self._rows: list[tuple[int, int]] = []

    def add_rows(self, memory: memoryview) -> None:
        array = np.asarray(memory)
        self._rows.append((address_of(array), array.nbytes))

    def regions(self) -> list[tuple[int, int]]:
        """Everything to be registered, as (address, bytes)."""
        return [(address_of(self._scratch), self._scratch.nbytes), *self._rows]

    @contextmanager
    def slot(self) -> Iterator[memoryview]:
        """Scratch memory for one object; empty where all of it is in use."""
        try:
            slot = self._slots.popleft()
        except IndexError:
            yield memoryview(b"")
            return
        try:
            yield slot
        finally:
            self._slots.append(slot)

    def pieces(self, parts: Sequence[memoryview], slot: memoryview) -> Pieces | None:
        """How these parts (bytes, not empty) lie in registered memory; None where they do not, nor fit the slot."""
        found = Pieces()
        for part in parts:
            address = address_of(np.frombuffer(part, np.uint8))
            if not self._is_registered(address, part.nbytes):
                if part.nbytes > slot.nbytes:
                    return None
                stand_in, slot = slot[: part.nbytes], slot[part.nbytes :]
                found.in_scratch.append((part, stand_in))
                address = address_of(np.frombuffer(stand_in, np.uint8))
            found.add(address, part.nbytes)
        return found if len(found.sizes) <= _MAX_PIECES else None

    def _is_registered(self, address: int, num_bytes: int) -> bool:
        return any(begin <= address and address + num_bytes <= begin + size for begin, size in self._rows)


def address_of(array: np.ndarray[Any, Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def as_bytes(parts: Sequence[memoryview], limit: int | None = None) -> list[memoryview]:
    """The parts that are not empty, as unsigned bytes; of their concatenation the first `limit`."""
    found = []
    for part in parts:
        piece = part.cast("B") if limit is None else part.cast("B")[:limit]
        limit = None if limit is None else limit - piece.nbytes
        if piece.nbytes:
            found.append(piece)
    return found
