"""What host memory holds now, under the keys that all engines share: told by the scheduler, read by other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vllm.v1.kv_offload.base import OffloadKey

from lmcache_ext.offload.lookups import far_key

MAX_PENDING = 65536
"""Changes that wait for the controller; beyond them it is told everything anew."""


class Changes(NamedTuple):
    """Keys that came and keys that went since the last time; where `is_lost`, everything must be told anew."""

    added: list[bytes]
    dropped: list[bytes]
    is_lost: bool


class Place(NamedTuple):
    """Where a chunk is. Another place, or the same one taken anew, is not equal."""

    row: int
    stamp: int


class Holdings:
    """Keys of chunks that are whole in host memory, each with its row.

    Threads:  `add`, `remove` and `clear` in the scheduler's; everything else in any.
    Order:    a chunk is removed before its row is given to another, so whoever reads a row and finds the
              chunk in the same place afterwards has read that chunk.
    Owner:    of nothing but the names.
    Failure:  none; changes that nobody takes are bounded by MAX_PENDING.

    `changed` is called in the scheduler's thread when there is something to take that was not there before.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._far_keys: dict[OffloadKey, bytes] = {}
        self._places: dict[bytes, Place] = {}
        self._stamp = 0
        self._pending: dict[bytes, bool] = {}  # far key -> whether it is here now
        self._is_lost = False

    def __len__(self) -> int:
        return len(self._places)

    def add(self, chunks: Iterable[tuple[OffloadKey, int]], adapter: str | None) -> None:
        """Chunks (key, row) are whole. Those of an adapter that cannot be identified are nobody else's business."""
        if adapter == "":
            return
        with self._lock:
            for key, row in chunks:
                name = self._far_keys[key] = far_key(key, adapter)
                self._stamp += 1
                self._places[name] = Place(row, self._stamp)
                self._pending[name] = True
            self._bound()
        self._changed()

    def remove(self, keys: Iterable[OffloadKey]) -> None:
        """The chunks are gone, or about to be overwritten."""
        with self._lock:
            for key in keys:
                name = self._far_keys.pop(key, None)
                if name is not None:
                    del self._places[name]
                    self._pending[name] = False
            self._bound()
        self._changed()

    def clear(self) -> None:
        """Host memory is empty."""
        with self._lock:
            self._far_keys.clear()
            self._places.clear()
            self._pending.clear()
            self._is_lost = True
        self._changed()

    def take(self, max_keys: int) -> Changes:
        """Up to `max_keys` changes, the oldest first."""
        with self._lock:
            names = [name for name, _ in zip(self._pending, range(max_keys), strict=False)]
            states = [(name, self._pending.pop(name)) for name in names]
            return Changes([n for n, here in states if here], [n for n, here in states if not here], self._is_lost)

    def snapshot(self) -> list[bytes]:
        """All keys; changes until now are part of it."""
        with self._lock:
            self._pending.clear()
            self._is_lost = False
            return list(self._places)

    def place(self, name: bytes) -> Place | None:
        """Where a chunk is now."""
        with self._lock:
            return self._places.get(name)

    def _bound(self) -> None:
        if len(self._pending) > MAX_PENDING:
            self._pending.clear()
            self._is_lost = True
