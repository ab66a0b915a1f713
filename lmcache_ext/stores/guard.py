"""The one judge of failures: a circuit breaker around any store.

    closed --- N failures or slow calls in a row ---> open --- a probe (reads), a trial (writes) ---> closed

Reads and writes have a breaker each, because a disk that is full or read-only still serves. While reads
are open every call answers at once (a miss, or StoreUnavailable for writes) and a daemon thread asks
`ping`, with exponential backoff and jitter, and then repeats the read that failed last, until both are
answered in time: a backend that trickles, or lacks a node, may answer `ping`. While only writes are open,
one `put` is let through after each backoff as a trial; `ping` proves nothing about writing.

Failures are in a row among calls of one kind: an `exists` that works says nothing about fetching. A read
that failed late counts once per second that somebody waited for it, so a few long waits are enough; two that
stopped in the middle (StoreStalled) are enough, too. A batch is one call: it failed where any of its objects
did, once, however many those are.

A call is judged when it returns, but a blocking file system call may never: a read past its deadline is
counted as it runs, whenever somebody asks `is_open`. What a slow read fetched is still given.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lmcache_ext.errors import StoreError, StoreStalled, StoreUnavailable
from lmcache_ext.stores.base import Store, Survey, Usage

logger = logging.getLogger("vllm.lmcache_ext.stores.guard")

READ = "read"
WRITE = "write"
EXISTS, GET, PUT = "exists", "get", "put"  # kinds of calls

_SECONDS_PER_FAILURE = 1.0


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
        self._failures: Counter[str] = Counter()
        self._openings = 0
        self._on_trial = False

    @property
    def half(self) -> int:
        """So many failures, twice, open it."""
        return -(-self._failures_to_open // 2)

    def follow(self, other: Breaker) -> None:
        """Take over the thresholds of another."""
        self._failures_to_open = other._failures_to_open
        self._interval_s, self._max_interval_s = other._interval_s, other._max_interval_s

    def succeed(self, kind: str = "") -> bool:
        """A call was good, which ends the row of failures of its kind; whether this closed the breaker."""
        if not self.is_open:
            self._failures.pop(kind, None)
            return False
        self._failures.clear()
        self.is_open, self._openings, self._on_trial = False, 0, False
        return True

    def fail(self, now: float, kind: str = "", *, times: int = 1) -> bool:
        """A call failed or was slow, as bad as so many; whether this opened the breaker.

        While open only a trial backs off further; the others began before it opened and say nothing new.
        """
        if self.is_open:
            if self._on_trial:
                self.back_off(now)
            return False
        self._failures[kind] += times
        if self._failures[kind] < self._failures_to_open:
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


@dataclass(slots=True, eq=False)
class _Call:
    """A call of the store; `charged` is how many failures it was counted as while it ran."""

    side: str
    kind: str
    started_at: float
    deadline_s: float
    keys: Sequence[bytes]
    num_bytes: int = 0
    """Of a fetch: the room for its first key."""
    charged: int = 0
    failures: list[StoreError] = field(default_factory=list)
    """At its end, of a batch one per object that failed."""

    def cost(self, now: float) -> int:
        """As how many failures it counts, if it is one. Nobody waits for writes."""
        return max(1, int((now - self.started_at) / _SECONDS_PER_FAILURE)) if self.side == READ else 1


class Guarded(Store):
    """Any store, made harmless: reads never raise a StoreError, and a dead backend costs microseconds.

    Threads:  as the store; the lock is held for counting only.
    Order:    as the store.
    Owner:    owns the store: `close` closes it, and joins the probe thread.
    Failure:  `exists`, `get_into` and `usage` answer a failure as a miss (unknown), counted by cause.
              `put` and `delete` raise StoreError, at once while open: the caller counts a drop.

    `lookup_deadline_s` is that of `exists` and `ping`, by default `deadline_s`, which is that of all others.
    `on_event` is told of each Change from the thread that caused it, outside the lock.
    """

    def __init__(
        self,
        store: Store,
        *,
        deadline_s: float,
        lookup_deadline_s: float | None = None,
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
        self._lookup_deadline_s = deadline_s if lookup_deadline_s is None else lookup_deadline_s
        self._on_event = on_event
        self._clock = clock
        self._closing = closing or threading.Event()
        self._lock = threading.Lock()
        self._reads = Breaker(failures_to_open, probe_interval_s, max_probe_interval_s, jitter)
        self._writes = Breaker(failures_to_open, probe_interval_s, max_probe_interval_s, jitter)
        self._counters: Counter[str] = Counter()
        self._running: set[_Call] = set()
        self._probe: threading.Thread | None = None

    def register(self, memory: memoryview) -> None:
        self._store.register(memory)

    def follow(self, other: Guarded) -> None:
        """Take over the deadlines and thresholds of another; what is open stays so until its next try."""
        with self._lock:
            self._deadline_s, self._lookup_deadline_s = other._deadline_s, other._lookup_deadline_s
            self._reads.follow(other._reads)
            self._writes.follow(other._writes)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        if self._rejects_reads(READ):
            return [False] * len(keys)
        try:
            with self._call(READ, EXISTS, keys):
                return self._store.exists(keys)
        except StoreError:
            return [False] * len(keys)

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        if self._rejects_reads(READ):
            return None
        try:
            with self._call(READ, GET, [key], _num_bytes(parts)):
                return self._store.get_into(key, parts)
        except StoreError:
            return None

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        """No outcome is a StoreError."""
        if self._rejects_reads(READ):
            return [None] * len(keys)
        with self._call(READ, GET, keys, _num_bytes(parts_per_key[0]) if keys else 0) as call:
            outcomes = self._store.get_many_into(keys, parts_per_key)
            call.failures = [outcome for outcome in outcomes if isinstance(outcome, StoreError)]
            if call.failures:
                first = outcomes.index(call.failures[0])
                call.keys, call.num_bytes = keys[first:], _num_bytes(parts_per_key[first])
        return [None if isinstance(outcome, StoreError) else outcome for outcome in outcomes]

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        if not self._admits_write():
            raise StoreUnavailable(f"{self.name}: circuit open")
        with self._call(WRITE, PUT, [key]):
            self._store.put(key, parts)

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> list[StoreError | None]:
        """While writes are open, a batch is let through as a trial as a single `put` is."""
        if not self._admits_write():
            return [StoreUnavailable(f"{self.name}: circuit open") for _ in keys]
        with self._call(WRITE, PUT, keys) as call:
            outcomes = self._store.put_many(keys, parts_per_key)
            call.failures = [outcome for outcome in outcomes if outcome is not None]
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

    def survey(self) -> list[Survey]:
        """The store's own answer, open or not."""
        return self._store.survey()

    def counters(self) -> dict[str, int]:
        """Calls so far by `<side>.<cause>`: ok, slow, rejected, opened, closed; objects by their error's class.

        A read that was past its deadline while it ran is `overdue` then, and what became of it at its end.
        """
        with self._lock:
            return dict(self._counters + Counter(self._store.failures()))

    def is_open(self, side: str = READ) -> bool:
        """Whether that side (READ, WRITE) is being answered without asking the store."""
        if self._running:
            self._charge_overdue()
        return self._breaker(side).is_open

    def close(self) -> None:
        """Stop probing and close the store; a probe stuck in a system call is left behind (a daemon)."""
        self._closing.set()
        with self._lock:
            probe, self._probe = self._probe, None
        if probe is not None:
            probe.join(self._lookup_deadline_s)
        self._store.close()

    @contextmanager
    def _call(self, side: str, kind: str, keys: Sequence[bytes], num_bytes: int = 0) -> Iterator[_Call]:
        """Around a call of the store: it is known while it runs, and judged at its end."""
        deadline_s = self._lookup_deadline_s if kind == EXISTS else self._deadline_s
        call = _Call(side, kind, self._clock(), deadline_s, keys, num_bytes)
        with self._lock:
            self._running.add(call)
        try:
            yield call
        except StoreError as error:
            call.failures = [error]
            self._judge(call)
            raise
        else:
            self._judge(call)
        finally:
            with self._lock:
                self._running.discard(call)

    def _admits_write(self) -> bool:
        with self._lock:
            admits = not self._reads.is_open and self._writes.admits(self._clock())
            if not admits:
                self._counters["write.rejected"] += 1
        return admits

    def _judge(self, call: _Call) -> None:
        """A call that ended; a batch by the first failure in it."""
        if not call.failures:
            self._returned(call)
            return
        for also_failed in call.failures[1:]:
            self._count(f"{call.side}.{type(also_failed).__name__}")
        self._failed(call, type(call.failures[0]).__name__, str(call.failures[0]))

    def _rejects_reads(self, what: str) -> bool:
        if not self._reads.is_open:  # one attribute: a stale answer is as good as a call a moment earlier
            return False
        self._count(f"{what}.rejected")
        return True

    def _returned(self, call: _Call) -> None:
        side, took_s = call.side, self._clock() - call.started_at
        if took_s > call.deadline_s:
            self._failed(call, "slow", f"{call.kind} took {took_s:.3f} s, deadline is {call.deadline_s:.3f} s")
            return
        with self._lock:
            self._counters[f"{side}.ok"] += 1
            # A read that began before the breaker opened proves less than the probe.
            closed = (side == WRITE or not self._reads.is_open) and self._breaker(side).succeed(call.kind)
            if closed:
                self._counters[f"{side}.closed"] += 1
        if closed:
            self._tell(Change(self.name, side, False, "trial"), "a trial write succeeded")

    def _charge_overdue(self) -> None:
        """Count the reads that are past their deadline and still run, each as often as it has come to cost."""
        now = self._clock()
        with self._lock:
            late = [call for call in self._running if call.side == READ and now - call.started_at > call.deadline_s]
        for call in late:
            if call.charged < call.cost(now):
                late_s = now - call.started_at
                self._failed(
                    call, "overdue", f"{call.kind} runs for {late_s:.3f} s, deadline is {call.deadline_s:.3f} s"
                )

    def _failed(self, call: _Call, cause: str, detail: str) -> None:
        side = call.side
        with self._lock:
            if cause != "overdue" or not call.charged:
                self._counters[f"{side}.{cause}"] += 1
            now = self._clock()
            cost = max(call.cost(now), self._breaker(side).half if cause == StoreStalled.__name__ else 0)
            times, call.charged = cost - call.charged, cost
            opened = times > 0 and self._breaker(side).fail(now, call.kind, times=times)
            if opened:
                self._counters[f"{side}.opened"] += 1
            probe = self._new_probe(call, cause) if opened and side == READ else None
        if opened:
            self._tell(Change(self.name, side, True, cause), detail)
        if probe is not None:
            probe.start()

    def _new_probe(self, failed: _Call, cause: str) -> threading.Thread | None:
        if self._closing.is_set():
            return None
        args = (self._repeat(failed, cause), failed.deadline_s)
        self._probe = threading.Thread(target=self._probe_until_back, args=args, name=f"{self.name}-probe", daemon=True)
        return self._probe

    def _repeat(self, failed: _Call, cause: str) -> Callable[[], object]:
        """What was asked, once more; a fetch into memory that nobody looks at. A miss by then is an answer too.

        A fetch that was refused is looked up only: one object may be beyond repair, and must not keep reads off.
        """
        store, keys, num_bytes = self._store, list(failed.keys), failed.num_bytes  # not the call: it holds buffers
        if failed.kind == GET and cause != StoreUnavailable.__name__:
            return lambda: store.get_into(keys[0], (memoryview(bytearray(num_bytes)),))
        return lambda: store.exists(keys)

    def _probe_until_back(self, again: Callable[[], object], deadline_s: float) -> None:
        """Top of the probe thread: it ends when the backend answers in time, or at `close`."""
        while True:
            with self._lock:
                wait_s = max(self._reads.retry_at - self._clock(), 0.0)
            if self._closing.wait(wait_s):
                return
            is_back = self._is_back(again, deadline_s)
            with self._lock:
                if is_back:
                    self._reads.succeed()
                else:
                    self._reads.back_off(self._clock())
                self._counters["read.closed" if is_back else "probe.failed"] += 1
            if is_back:
                self._tell(Change(self.name, READ, False, "probe"), "it answers again")
                return

    def _is_back(self, again: Callable[[], object], deadline_s: float) -> bool:
        """Whether `ping`, and what failed, are answered in time now."""
        try:
            return self._in_time(self._store.ping, self._lookup_deadline_s) and self._in_time(again, deadline_s)
        except StoreError:
            return False
        except Exception:
            logger.exception("%s: a probe failed in a way that no store should", self.name)
            return False

    def _in_time(self, call: Callable[[], object], deadline_s: float) -> bool:
        started_at = self._clock()
        call()
        return self._clock() - started_at <= deadline_s

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


def only_failures(counters: Mapping[str, int]) -> dict[str, int]:
    """What `Guarded.counters` has of failed calls."""
    return {cause: count for cause, count in counters.items() if not cause.endswith((".ok", ".opened", ".closed"))}


def _num_bytes(parts: Sequence[memoryview]) -> int:
    return sum(part.nbytes for part in parts)
