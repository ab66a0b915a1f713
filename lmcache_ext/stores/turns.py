"""Readers and writers of the same key take turns; those of different keys never wait."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lmcache_ext.errors import StoreTimeout


class Turns:
    """For backends that replace an object by removing it first: readers in this process never see it gone.

    Threads:  any number.
    Order:    a waiting writer goes before readers that come later.
    Owner:    of keys under way only.
    Failure:  StoreTimeout where a turn does not come in time.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: Counter[bytes] = Counter()
        self._writers: set[bytes] = set()

    @contextmanager
    def reading(self, keys: Sequence[bytes], timeout_s: float) -> Iterator[None]:
        """Nobody writes these keys meanwhile."""
        with self._changed:
            self._wait(lambda: self._writers.isdisjoint(keys), timeout_s)
            self._readers.update(keys)
        try:
            yield
        finally:
            with self._changed:
                self._readers.subtract(keys)
                self._readers = +self._readers
                self._changed.notify_all()

    @contextmanager
    def writing(self, keys: Sequence[bytes], timeout_s: float) -> Iterator[None]:
        """Nobody else reads or writes these keys meanwhile."""
        with self._changed:
            self._wait(lambda: self._writers.isdisjoint(keys), timeout_s)
            self._writers.update(keys)
        try:
            with self._changed:
                self._wait(lambda: not any(key in self._readers for key in keys), timeout_s)
            yield
        finally:
            with self._changed:
                self._writers.difference_update(keys)
                self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        if not self._changed.wait_for(condition, max(timeout_s, 0.0)):
            raise StoreTimeout(f"the key was in use for {timeout_s:.3f} s")
