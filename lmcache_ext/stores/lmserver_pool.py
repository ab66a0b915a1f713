"""The connections to one cache server: few, reused, and never one that is in doubt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lmcache_ext.errors import StoreTimeout, StoreUnavailable
from lmcache_ext.stores.lmserver_link import Answered, Link
from lmcache_ext.stores.pace import Floor, Pace


class Pool:
    """Links made by `connect(timeout_s)`, at most `max_links` at a time.

    Threads:  any number; one that finds all links taken waits for one within its own deadline.
    Order:    the link used last is used next: a burst leaves cold ones behind, and they cost nothing.
    Owner:    of all links; a link is closed where its exchange did not end in good order.
    Failure:  StoreTimeout, StoreUnavailable, or what `connect` and the exchange raise. Nothing is retried, but
              a link that the server closed while it lay idle is found out before it is used.
    """

    def __init__(self, connect: Callable[[float], Link], max_links: int, *, name: str) -> None:
        self._connect = connect
        self._name = name
        self._free = threading.BoundedSemaphore(max_links)
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._closed = False

    @contextmanager
    def link(self, timeout_s: float, floor: Floor | None = None) -> Iterator[Link]:
        """A link for one exchange that ends within `timeout_s`, waiting and connecting included.

        With `floor` the server's answers must keep coming, too.
        """
        deadline = time.monotonic() + timeout_s
        if not self._free.acquire(timeout=timeout_s):
            raise StoreTimeout(f"{self._name}: no connection became free within {timeout_s:.3f} s")
        try:
            link = self._take() or self._connect(max(deadline - time.monotonic(), 0.001))
            try:
                link.line.begin(deadline - time.monotonic(), Pace(floor) if floor else None)
                yield link
            except Answered as answered:
                self._give_back(link)
                raise answered.error from None
            except BaseException:
                link.line.close()
                raise
            self._give_back(link)
        finally:
            self._free.release()

    def close(self) -> None:
        """Close what lies idle; a link in use is closed when its exchange ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for link in idle:
            link.line.close()

    def _take(self) -> Link | None:
        while True:
            with self._lock:
                if self._closed:
                    raise StoreUnavailable(f"{self._name}: closed")
                if not self._idle:
                    return None
                link = self._idle.pop()
            if link.line.is_quiet():
                return link
            link.line.close()

    def _give_back(self, link: Link) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(link)
                return
        link.line.close()
