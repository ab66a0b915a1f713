"""The one bounded pool of threads that runs store work.

Two queues: urgent (lookups and loads, somebody waits for them) before bulk (stores, nobody does). Each
is bounded on its own, so a flood of stores never refuses a load; and of several threads one is kept
free of bulk work, so a load never waits for a store to finish either. Where the engine computes on the
cores of this machine, bulk work stays off them, and waits a little for the engine to be idle: a thread
that writes on the next core slows it, too (benchmarks/ttft.py).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("vllm.lmcache_ext.stores.jobs")


@dataclass(frozen=True, slots=True)
class _Job:
    call: Callable[..., object]
    args: tuple[Any, ...]
    urgent: bool
    due: float
    """When it is run even though the engine is busy; seconds of `time.monotonic`."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How much bulk work waits for the engine to be idle: so long, and never more than so many jobs."""

    seconds: float
    max_jobs: int


NO_PATIENCE = Patience(0.0, 0)


class JobPool:
    """`num_threads` daemon threads, started when first needed, over two queues of `max_queued` jobs each.

    Threads:  `submit` and `drain` from any thread; it never blocks on the work.
    Order:    urgent before bulk, each first in first out; jobs run at the same time. While the engine is
              busy (`set_busy`) bulk is held back as `patience` allows, but not from `drain` and `close`.
    Owner:    the pool holds a job's arguments until it has run, or was discarded by `close`.
    Failure:  a job that raises is counted, and logged with its traceback once per function and error
              class; its thread goes on. A job reports its own outcome; the pool reports none.
    """

    def __init__(
        self,
        num_threads: int,
        *,
        max_queued: int,
        name: str = "store",
        bulk_cpus: set[int] | None = None,
        patience: Patience = NO_PATIENCE,
    ) -> None:
        """Bulk jobs run on `bulk_cpus`; urgent ones, and all where it is None, wherever the process may."""
        if num_threads < 1 or max_queued < 1:
            raise ValueError(f"a pool needs a thread and a queue, got {num_threads} threads and {max_queued} places")
        self._num_threads = num_threads
        self._max_bulk = max(1, num_threads - 1)
        self._max_queued = max_queued
        self._name = name
        self._bulk_cpus = bulk_cpus
        self._patience = patience
        self._busy = False
        self._flushing = 0
        self._changed = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._bulk: deque[_Job] = deque()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._running_bulk = 0
        self._closed = False
        self._logged: set[tuple[str, type[Exception]]] = set()
        self._counters = {"done": 0, "failed": 0, "refused": 0, "discarded": 0}

    def submit(self, call: Callable[..., object], *args: Any, urgent: bool = False) -> bool:  # noqa: ANN401
        """Queue a call; False where its queue is full, the pool closed or no thread can be had: a drop, for the caller
        to count."""
        with self._changed:
            queue = self._urgent if urgent else self._bulk
            if self._closed or len(queue) >= self._max_queued:
                self._counters["refused"] += 1
                return False
            if not self._has_thread():
                self._counters["refused"] += 1
                return False
            queue.append(_Job(call, args, urgent, time.monotonic() + self._patience.seconds))
            self._changed.notify_all()
            return True

    def set_busy(self, busy: bool) -> None:
        """Whether the engine computes. Costs nothing where that is no news."""
        if busy == self._busy:
            return
        with self._changed:
            self._busy = busy
            self._changed.notify_all()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is queued and nothing runs; False where that took longer. Not from inside a job."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(self._is_idle, timeout_s)
            finally:
                self._flushing -= 1

    def close(self, timeout_s: float | None = 5.0) -> bool:
        """Refuse new jobs, finish the queued ones, join the threads; may be called twice.

        After `timeout_s` what is still queued is discarded (and counted) and what still runs is left to
        its daemon thread; then False.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            finished = self._changed.wait_for(self._is_idle, timeout_s)
            self._counters["discarded"] += len(self._urgent) + len(self._bulk)
            self._urgent.clear()
            self._bulk.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join(1.0 if finished else 0.0)
        return finished

    def counters(self) -> dict[str, int]:
        """Jobs so far: done, failed (of those done), refused by `submit`, discarded by `close`."""
        with self._changed:
            return dict(self._counters)

    def num_queued(self) -> int:
        """Jobs that wait."""
        with self._changed:
            return len(self._urgent) + len(self._bulk)

    def _is_idle(self) -> bool:
        return not self._urgent and not self._bulk and self._running == 0

    def _has_thread(self) -> bool:
        """Start one more thread where that is allowed and possible; whether there is any."""
        if len(self._threads) < self._num_threads:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the process or its container may have no more
                self._say("thread", error)
            else:
                self._threads.append(thread)
        return bool(self._threads)

    def _run(self) -> None:
        """Top of a thread."""
        anywhere = os.sched_getaffinity(0)
        bound = False
        while (job := self._next()) is not None:
            if self._bulk_cpus is not None and bound == job.urgent:
                bound = self._bind(anywhere if job.urgent else self._bulk_cpus, bulk=not job.urgent)
            try:
                job.call(*job.args)
            except Exception as error:
                self._report(job, error)
            finally:
                self._finish(job)
            del job  # the arguments are views on host memory that must be let go while we wait

    def _next(self) -> _Job | None:
        """The next job, waiting for one; None when the pool is closed and nothing is left for this thread."""
        with self._changed:
            while True:
                if self._urgent:
                    job = self._urgent.popleft()
                elif self._bulk and self._running_bulk < self._max_bulk:
                    if (held_s := self._held_s()) > 0:
                        self._changed.wait(held_s)
                        continue
                    job = self._bulk.popleft()
                elif self._closed and not self._bulk:
                    return None
                else:
                    self._changed.wait()
                    continue
                self._running += 1
                self._running_bulk += not job.urgent
                return job

    def _held_s(self) -> float:
        """For how long the first bulk job waits at most; 0 where nothing holds it back."""
        if not self._busy or self._flushing or self._closed or len(self._bulk) > self._patience.max_jobs:
            return 0.0
        return self._bulk[0].due - time.monotonic()

    def _finish(self, job: _Job) -> None:
        with self._changed:
            self._running -= 1
            self._running_bulk -= not job.urgent
            self._counters["done"] += 1
            self._changed.notify_all()

    def _report(self, job: _Job, error: Exception) -> None:
        with self._changed:
            self._counters["failed"] += 1
            self._say(f"job {getattr(job.call, '__qualname__', repr(job.call))}", error)

    def _say(self, what: str, error: Exception) -> None:
        if (what, type(error)) not in self._logged:
            self._logged.add((what, type(error)))
            logger.error("%s: %s failed; the same is only counted from now on", self._name, what, exc_info=error)

    def _bind(self, cpus: set[int], *, bulk: bool) -> bool:
        """Move this thread to `cpus`; whether it counts as bound to those of bulk work."""
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            logger.warning("%s: threads are not bound to CPUs %s: %s", self._name, sorted(cpus), error)
            self._bulk_cpus = None
        return bulk
