"""The one bounded pool of threads that runs store work.

Two queues: urgent (lookups and loads, somebody waits for them) before bulk (stores, nobody does). Each
is bounded on its own, so a flood of stores never refuses a load; and of several threads one is kept
free of bulk work, so a load never waits for a store to finish either.
"""

from __future__ import annotations

import logging
import os
import threading
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


class JobPool:
    """`num_threads` daemon threads, started when first needed, over two queues of `max_queued` jobs each.

    Threads:  `submit` and `drain` from any thread; it never blocks on the work.
    Order:    urgent before bulk, each first in first out; jobs run at the same time.
    Owner:    the pool holds a job's arguments until it has run, or was discarded by `close`.
    Failure:  a job that raises is counted, and logged with its traceback once per function and error
              class; its thread goes on. A job reports its own outcome; the pool reports none.
    """

    def __init__(
        self, num_threads: int, *, max_queued: int, name: str = "store", cpu_affinity: set[int] | None = None
    ) -> None:
        if num_threads < 1 or max_queued < 1:
            raise ValueError(f"a pool needs a thread and a queue, got {num_threads} threads and {max_queued} places")
        self._num_threads = num_threads
        self._max_bulk = max(1, num_threads - 1)
        self._max_queued = max_queued
        self._name = name
        self._cpu_affinity = cpu_affinity
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
        """Queue a call; False where its queue is full or the pool closed: the caller counts a drop."""
        with self._changed:
            queue = self._urgent if urgent else self._bulk
            if self._closed or len(queue) >= self._max_queued:
                self._counters["refused"] += 1
                return False
            queue.append(_Job(call, args, urgent))
            if len(self._threads) < self._num_threads:
                self._start_thread()
            self._changed.notify_all()
            return True

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is queued and nothing runs; False where that took longer. Not from inside a job."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, timeout_s)

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

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        """Top of a thread."""
        self._pin()
        while (job := self._next()) is not None:
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
                    job = self._bulk.popleft()
                elif self._closed and not self._bulk:
                    return None
                else:
                    self._changed.wait()
                    continue
                self._running += 1
                self._running_bulk += not job.urgent
                return job

    def _finish(self, job: _Job) -> None:
        with self._changed:
            self._running -= 1
            self._running_bulk -= not job.urgent
            self._counters["done"] += 1
            self._changed.notify_all()

    def _report(self, job: _Job, error: Exception) -> None:
        what = getattr(job.call, "__qualname__", repr(job.call))
        with self._changed:
            self._counters["failed"] += 1
            is_new = (what, type(error)) not in self._logged
            self._logged.add((what, type(error)))
        if is_new:
            logger.error("%s: job %s failed; the same is only counted from now on", self._name, what, exc_info=error)

    def _pin(self) -> None:
        if self._cpu_affinity is None:
            return
        try:
            os.sched_setaffinity(0, self._cpu_affinity)
        except OSError as error:
            logger.warning("%s: threads are not bound to CPUs %s: %s", self._name, sorted(self._cpu_affinity), error)
