"""Connections to one server: a bounded number, checked out for one call, never reused in doubt."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lmcache_ext.errors import StoreError, StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.resp_wire import Deadline, Wire

Dial = Callable[[Deadline], Wire]
"""Opens a connection that is ready for commands. Raises StoreError."""


class Turns:
    """A semaphore whose waiters get their turn in the order they came: a busy thread cannot starve another."""

    def __init__(self, num_free: int) -> None:
        self._lock = threading.Lock()
        self._num_free = num_free
        self._waiting: deque[threading.Event] = deque()

    def acquire(self, timeout_s: float) -> bool:
        """Wait at most so long; whether it was granted."""
        with self._lock:
            if self._num_free:
                self._num_free -= 1
                return True
            turn = threading.Event()
            self._waiting.append(turn)
        if turn.wait(timeout_s):
            return True
        with self._lock:
            if turn.is_set():  # granted between the two lines above
                return True
            self._waiting.remove(turn)
        return False

    def release(self) -> None:
        """Hand on to the first who waits."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._num_free += 1


class Pool:
    """Connections to one server.

    Threads:  any number; the lock is held for bookkeeping only.
    Order:    the connection used last is used next, so that few are open where few are needed.
    Owner:    of all connections; a checked-out one is the caller's until its `with` ends.
    Failure:  StoreTimeout where all are busy until the deadline; otherwise what `dial` raises. After an error the
              connection is closed, and so are the idle ones: what happened to one has mostly happened to all.
    """

    def __init__(self, label: str, dial: Dial, num_connections: int) -> None:
        self.label = label
        self._dial = dial
        self._num_connections = num_connections
        self._free = Turns(num_connections)
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._closed = False

    @contextmanager
    def connection(self, deadline: Deadline) -> Iterator[Wire]:
        """A connection; waits for one until the deadline."""
        if not self._free.acquire(deadline.left_s()):
            message = f"all {self._num_connections} connections are busy for {deadline.timeout_s:.3g} s"
            raise StoreTimeout(f"{self.label}: {message}")
        try:
            with self._lent(self._open(deadline)) as wire:
                yield wire
        finally:
            self._free.release()

    def close_idle(self) -> None:
        """Close what nobody uses now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def close(self) -> None:
        """Close everything; a connection in use is closed when its call ends. May be called twice."""
        self._closed = True
        self.close_idle()

    @contextmanager
    def _lent(self, wire: Wire) -> Iterator[Wire]:
        try:
            yield wire
        except BaseException as error:
            if isinstance(error, StoreFull) and wire.is_clean:
                self._give_back(wire)
                raise
            wire.close()
            if isinstance(error, StoreError):
                self.close_idle()
            raise
        self._give_back(wire)

    def _open(self, deadline: Deadline) -> Wire:
        """An idle connection that still stands, or a new one."""
        if self._closed:
            raise StoreUnavailable(f"{self.label}: the store is closed")
        return self._idle_one() or self._dial(deadline)

    def _idle_one(self) -> Wire | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                wire = self._idle.pop()
            if wire.is_alive():
                return wire
            wire.close()

    def _give_back(self, wire: Wire) -> None:
        with self._lock:
            keep = wire.is_clean and not self._closed
            if keep:
                self._idle.append(wire)
        if not keep:
            wire.close()
