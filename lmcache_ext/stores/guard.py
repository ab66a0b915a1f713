"""The one judge of failures: a circuit breaker around any store.

    closed --- N failures or slow calls in a row ---> open --- a probe (reads), a trial (writes) ---> closed

Reads and writes have a breaker each, because a disk that is full or read-only still serves. While reads
are open every call answers at once (a miss, or StoreUnavailable for writes) and a daemon thread asks
`ping` with exponential backoff and jitter until the backend is back. While only writes are open, one
`put` is let through after each backoff as a trial; `ping` proves nothing about writing.

A call is judged when it returns: a blocking file system call cannot be interrupted, so the deadline
limits how many slow calls there are, not how long one takes. What a slow read fetched is still given.
A batch is one call: it failed where any of its objects did, once, however many those are.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lmcache_ext.errors import StoreError, StoreUnavailable
from lmcache_ext.stores.base import Store, Usage

logger = logging.getLogger("vllm.lmcache_ext.stores.guard")

T = TypeVar("T")

READ = "read"
WRITE = "write"


@dataclass(frozen=True, slots=True)
class Change:
    """One breaker opened or closed; `cause` is the last failure's class, or what ended it."""

    store: str
    side: str
    is_open: bool
    cause: str


class Breaker:
    """Counts failures in a row and backs off; pure, timed by its caller, guarded by the caller's lock."""

    def __init__(
        self, failures_to_open: int, interval_s: float, max_interval_s: float, jitter: Callable[[], float]
    ) -> None:
        self.is_open = False
        self.retry_at = 0.0
        self._failures_to_open = failures_to_open
        self._interval_s = interval_s
        self._max_interval_s = max_interval_s
        self._jitter = jitter
        self._failures = 0
        self._openings = 0
        self._on_trial = False

    def succeed(self) -> bool:
        """A call was good; whether this closed the breaker."""
        was_open = self.is_open
        self.is_open, self._failures, self._openings, self._on_trial = False, 0, 0, False
        return was_open

    def fail(self, now: float) -> bool:
        """A call failed or was slow; whether this opened the breaker.

        While open only a trial backs off further; the others began before it opened and say nothing new.
        """
        self._failures += 1
        if self.is_open:
            if self._on_trial:
                self.back_off(now)
            return False
        if self._failures < self._failures_to_open:
            return False
        self.is_open = True
        self.back_off(now)
        return True

    def back_off(self, now: float) -> None:
        """Wait before the next try: twice as long each time up to the limit, less up to half at random."""
        interval_s = min(self._interval_s * 2.0 ** min(self._openings, 32), self._max_interval_s)
        self.retry_at = now + interval_s * (1.0 - self._jitter() / 2)
        self._openings += 1
        self._on_trial = False

    def admits(self, now: float) -> bool:
        """Whether a call may pass; while open, one per backoff as a trial."""
        if not self.is_open:
            return True
        if now < self.retry_at:
            return False
        self._on_trial = True
        self.retry_at = now + self._max_interval_s
        return True


class Guarded(Store):
    """Any store, made harmless: reads never raise a StoreError, and a dead backend costs microseconds.

    Threads:  as the store; the lock is held for counting only.
    Order:    as the store.
    Owner:    owns the store: `close` closes it, and joins the probe thread.
    Failure:  `exists`, `get_into` and `usage` answer a failure as a miss (unknown), counted by cause.
              `put` and `delete` raise StoreError, at once while open: the caller counts a drop.

    `on_event` is told of each Change from the thread that caused it, outside the lock.
    """

    def __init__(
        self,
        store: Store,
        *,
        deadline_s: float,
        failures_to_open: int = 5,
        probe_interval_s: float = 1.0,
        max_probe_interval_s: float = 60.0,
        on_event: Callable[[Change], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        closing: threading.Event | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.name = store.name
        self._store = store
        self._deadline_s = deadline_s
        self._on_event = on_event
        self._clock = clock
        self._closing = closing or threading.Event()
        self._lock = threading.Lock()
        self._reads = Breaker(failures_to_open, probe_interval_s, max_probe_interval_s, jitter)
        self._writes = Breaker(failures_to_open, probe_interval_s, max_probe_interval_s, jitter)
        self._counters: Counter[str] = Counter()
        self._probe: threading.Thread | None = None

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        found = self._read(lambda: self._store.exists(keys))
        return [False] * len(keys) if found is None else found

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        return self._read(lambda: self._store.get_into(key, parts))

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        """No outcome is a StoreError."""
        if self._rejects_reads(READ):
            return [None] * len(keys)
        started_at = self._clock()
        outcomes = self._store.get_many_into(keys, parts_per_key)
        self._judge(READ, outcomes, started_at)
        return [None if isinstance(outcome, StoreError) else outcome for outcome in outcomes]

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        started_at = self._clock()
        if not self._admits_write(started_at):
            raise StoreUnavailable(f"{self.name}: circuit open")
        try:
            self._store.put(key, parts)
        except StoreError as error:
            self._failed(WRITE, type(error).__name__, str(error))
            raise
        self._returned(WRITE, started_at)

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> list[StoreError | None]:
        """While writes are open, a batch is let through as a trial as a single `put` is."""
        started_at = self._clock()
        if not self._admits_write(started_at):
            return [StoreUnavailable(f"{self.name}: circuit open") for _ in keys]
        outcomes = self._store.put_many(keys, parts_per_key)
        self._judge(WRITE, outcomes, started_at)
        return outcomes

    def delete(self, keys: Sequence[bytes]) -> None:
        """Not judged: while writes are open (a full disk) it goes on, for it makes room."""
        if self._rejects_reads("delete"):
            raise StoreUnavailable(f"{self.name}: circuit open")
        try:
            self._store.delete(keys)
        except StoreError as error:
            self._count(f"delete.{type(error).__name__}")
            raise
        self._count("delete.ok")

    def ping(self) -> float:
        """The store's own answer, open or not; raises its StoreError."""
        return self._store.ping()

    def usage(self) -> Usage:
        if not self._rejects_reads("usage"):
            try:
                return self._store.usage()
            except StoreError as error:
                self._count(f"usage.{type(error).__name__}")
        return Usage(None, None, None)

    def counters(self) -> dict[str, int]:
        """Calls so far by `<side>.<cause>`: ok, slow, rejected, opened, closed; objects by their error's class."""
        with self._lock:
            return dict(self._counters)

    def is_open(self, side: str = READ) -> bool:
        """Whether that side (READ, WRITE) is being answered without asking the store."""
        with self._lock:
            return self._breaker(side).is_open

    def close(self) -> None:
        """Stop probing and close the store; a probe stuck in a system call is left behind (a daemon)."""
        self._closing.set()
        with self._lock:
            probe, self._probe = self._probe, None
        if probe is not None:
            probe.join(self._deadline_s)
        self._store.close()

    def _read(self, call: Callable[[], T]) -> T | None:
        """Judge one read; None where it failed or was not asked."""
        if self._rejects_reads(READ):
            return None
        started_at = self._clock()
        try:
            result = call()
        except StoreError as error:
            self._failed(READ, type(error).__name__, str(error))
            return None
        self._returned(READ, started_at)
        return result

    def _admits_write(self, now: float) -> bool:
        with self._lock:
            admits = not self._reads.is_open and self._writes.admits(now)
            if not admits:
                self._counters["write.rejected"] += 1
        return admits

    def _judge(self, side: str, outcomes: Sequence[object], started_at: float) -> None:
        """A batch, as one call, by the first failure in it."""
        failures = [outcome for outcome in outcomes if isinstance(outcome, StoreError)]
        if not failures:
            self._returned(side, started_at)
            return
        for also_failed in failures[1:]:
            self._count(f"{side}.{type(also_failed).__name__}")
        self._failed(side, type(failures[0]).__name__, str(failures[0]))

    def _rejects_reads(self, what: str) -> bool:
        if not self._reads.is_open:  # one attribute: a stale answer is as good as a call a moment earlier
            return False
        self._count(f"{what}.rejected")
        return True

    def _returned(self, side: str, started_at: float) -> None:
        took_s = self._clock() - started_at
        if took_s > self._deadline_s:
            self._failed(side, "slow", f"took {took_s:.3f} s, deadline is {self._deadline_s:.3f} s")
            return
        with self._lock:
            self._counters[f"{side}.ok"] += 1
            # A read that began before the breaker opened proves less than the probe.
            closed = (side == WRITE or not self._reads.is_open) and self._breaker(side).succeed()
            if closed:
                self._counters[f"{side}.closed"] += 1
        if closed:
            self._tell(Change(self.name, side, False, "trial"), "a trial write succeeded")

    def _failed(self, side: str, cause: str, detail: str) -> None:
        with self._lock:
            self._counters[f"{side}.{cause}"] += 1
            opened = self._breaker(side).fail(self._clock())
            if opened:
                self._counters[f"{side}.opened"] += 1
            probe = self._new_probe() if opened and side == READ else None
        if opened:
            self._tell(Change(self.name, side, True, cause), detail)
        if probe is not None:
            probe.start()

    def _new_probe(self) -> threading.Thread | None:
        if self._closing.is_set():
            return None
        self._probe = threading.Thread(target=self._probe_until_back, name=f"{self.name}-probe", daemon=True)
        return self._probe

    def _probe_until_back(self) -> None:
        """Top of the probe thread: it ends when the backend answers in time, or at `close`."""
        while True:
            with self._lock:
                wait_s = max(self._reads.retry_at - self._clock(), 0.0)
            if self._closing.wait(wait_s):
                return
            try:
                is_back = self._store.ping() <= self._deadline_s
            except StoreError:
                is_back = False
            except Exception:
                logger.exception("%s: ping failed in a way that no store should", self.name)
                is_back = False
            with self._lock:
                if is_back:
                    self._reads.succeed()
                else:
                    self._reads.back_off(self._clock())
                self._counters["read.closed" if is_back else "probe.failed"] += 1
            if is_back:
                self._tell(Change(self.name, READ, False, "probe"), "it answers again")
                return

    def _tell(self, change: Change, detail: str) -> None:
        if change.is_open:
            logger.warning("%s: %ss are off, it is retried in the background: %s", self.name, change.side, detail)
        else:
            logger.info("%s: %ss are on again: %s", self.name, change.side, detail)
        if self._on_event is not None:
            self._on_event(change)

    def _breaker(self, side: str) -> Breaker:
        return self._reads if side == READ else self._writes

    def _count(self, name: str) -> None:
        with self._lock:
            self._counters[name] += 1
