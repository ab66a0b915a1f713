"""The connection of a client that has no deadlines: made when first needed, made again when lost, asked with one.

Mooncake's client takes 4 s to notice that a master is gone (it tries three times), and setting it up takes as long;
InfiniStore's waits for ever. Nobody waits for that: calls that touch no caller's memory run on threads of the session,
and their caller leaves at the deadline. Calls that do touch it run in the caller's thread, on a client that has just
answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from lmcache_ext.errors import StoreError, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.jobs import JobPool


class Closable(Protocol):
    """A connected client."""

    def close(self, timeout_s: float) -> None:
        """Let the calls in it end, up to a deadline, and disconnect; raises nothing."""


T = TypeVar("T")
C = TypeVar("C", bound=Closable)

_NUM_THREADS = 8
_MAX_QUEUED = 64
_PAUSE_S = 0.5  # between two attempts to set up a client
_CLOSE_S = 5.0
_RETIRE_S = 120.0  # twice the longest that a transfer is stuck


class Session(Generic[C]):
    """At most one open client.

    Threads:  any number.
    Order:    none between calls.
    Owner:    of the client and of the threads.
    Failure:  StoreTimeout at the deadline, or whatever the call raises. A failed set-up is tried again by the next
              call, at most every half second.
    """

    def __init__(self, name: str, connect: Callable[[], C]) -> None:
        self._name = name
        self._connect = connect
        self._threads = JobPool(_NUM_THREADS, max_queued=_MAX_QUEUED, name=name)
        self._opening = threading.Lock()
        self._client: C | None = None
        self._failure = ""
        self._retry_at = 0.0
        self._closed = False

    def ask(self, timeout_s: float, call: Callable[[C], T]) -> T:
        """What `call` returns, if in time. It may go on after a StoreTimeout, so it must own what it touches."""
        answer: Future[T] = Future()
        if not self._threads.submit(self._answer, answer, call):
            raise StoreTimeout(f"{self._name}: {_MAX_QUEUED} calls are waiting for the client already")
        try:
            return answer.result(max(timeout_s, 0.0))
        except TimeoutError:
            answer.cancel()
            raise StoreTimeout(f"{self._name}: no answer within {timeout_s:.3f} s") from None

    def warm(self) -> None:
        """Begin to connect, and wait for nothing."""
        self._threads.submit(self._answer, Future(), lambda client: client)

    def retire(self, client: C) -> None:
        """Close a client that is lost, or may still write into memory it was given; when it returns it cannot."""
        with self._opening:
            if self._client is client:
                self._client = None
        client.close(_RETIRE_S)

    def close(self) -> None:
        self._closed = True
        self._threads.close(_CLOSE_S)
        client, self._client = self._client, None
        if client is not None:
            client.close(_CLOSE_S)

    def _answer(self, answer: Future[T], call: Callable[[C], T]) -> None:
        """In a thread of the session."""
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(call(self._open()))
        except StoreError as error:
            answer.set_exception(error)

    def _open(self) -> C:
        with self._opening:
            if self._client is not None:
                return self._client
            if time.monotonic() < self._retry_at:
                raise StoreUnavailable(self._failure)
            try:
                self._client = self._connect()
            except StoreError as error:
                self._failure, self._retry_at = str(error), time.monotonic() + _PAUSE_S
                raise
            if self._closed:  # meanwhile
                self._client.close(_CLOSE_S)
                raise StoreUnavailable(f"{self._name}: closed")
            return self._client
