"""The pool: order, bounds, and nothing lost silently."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from lmcache_ext.stores.jobs import JobPool, Patience

WAIT_S = 10.0


class Blocker:
    """A job that runs until it is let go."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.released = threading.Event()

    def __call__(self) -> None:
        self.started.set()
        assert self.released.wait(WAIT_S)


@pytest.fixture
def pool() -> Iterator[JobPool]:
    pool = JobPool(1, max_queued=4, name="test")
    yield pool
    pool.close(WAIT_S)


def occupy(pool: JobPool, *, urgent: bool = True) -> Blocker:
    blocker = Blocker()
    assert pool.submit(blocker, urgent=urgent)
    assert blocker.started.wait(WAIT_S)
    return blocker


def test_jobs_run_with_their_arguments_off_the_caller_thread(pool: JobPool) -> None:
    seen: list[tuple[object, ...]] = []
    pool.submit(lambda *args: seen.append((*args, threading.current_thread().name)), 1, "two")
    assert pool.drain(WAIT_S)
    assert seen == [(1, "two", "test-0")]
    assert pool.counters() == {"done": 1, "failed": 0, "refused": 0, "discarded": 0}


def test_urgent_jobs_go_first_and_each_queue_keeps_its_order(pool: JobPool) -> None:
    blocker = occupy(pool)
    order: list[str] = []
    for name in ("store 1", "store 2"):
        assert pool.submit(order.append, name)
    for name in ("load 1", "load 2"):
        assert pool.submit(order.append, name, urgent=True)
    blocker.released.set()
    assert pool.drain(WAIT_S)
    assert order == ["load 1", "load 2", "store 1", "store 2"]


def test_a_full_queue_refuses_and_a_flood_of_stores_never_refuses_a_load(pool: JobPool) -> None:
    blocker = occupy(pool)
    assert [pool.submit(int) for _ in range(6)] == [True] * 4 + [False] * 2
    assert [pool.submit(int, urgent=True) for _ in range(5)] == [True] * 4 + [False]
    assert pool.num_queued() == 8
    blocker.released.set()
    assert pool.drain(WAIT_S)
    assert pool.counters() == {"done": 9, "failed": 0, "refused": 3, "discarded": 0}


def test_one_thread_is_kept_for_loads() -> None:
    pool = JobPool(2, max_queued=4)
    first = occupy(pool, urgent=False)
    second = Blocker()
    assert pool.submit(second)
    loaded = threading.Event()
    assert pool.submit(loaded.set, urgent=True)
    assert loaded.wait(WAIT_S)
    assert not second.started.is_set()
    first.released.set()
    assert second.started.wait(WAIT_S)
    second.released.set()
    assert pool.close(WAIT_S)


def test_a_job_that_raises_is_counted_and_its_traceback_logged_once(
    pool: JobPool, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(what: str) -> None:
        raise RuntimeError(what)

    for _ in range(3):
        pool.submit(break_down, "out of luck")
    pool.submit(int, "no number")
    assert pool.drain(WAIT_S)
    assert pool.counters()["failed"] == 4
    assert caplog.text.count("RuntimeError: out of luck") == 1
    assert caplog.text.count("ValueError: invalid literal") == 1
    assert "break_down" in caplog.text


def test_drain_says_when_it_took_too_long(pool: JobPool) -> None:
    assert pool.drain(0)
    blocker = occupy(pool)
    assert not pool.drain(0)
    blocker.released.set()
    assert pool.drain()


def test_close_finishes_what_is_queued_and_refuses_the_rest(pool: JobPool) -> None:
    done: list[int] = []
    for index in range(3):
        pool.submit(done.append, index)
    assert pool.close(WAIT_S)
    assert done == [0, 1, 2]
    assert not pool.submit(done.append, 3)
    assert pool.close(WAIT_S)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


def test_close_before_any_job_is_nothing(pool: JobPool) -> None:
    assert pool.close(0)


def test_close_discards_what_it_cannot_wait_for(pool: JobPool) -> None:
    blocker = occupy(pool)
    never: list[int] = []
    pool.submit(never.append, 1)
    assert not pool.close(0)
    blocker.released.set()
    assert pool.drain(WAIT_S)
    assert (never, pool.counters()["discarded"]) == ([], 1)


def test_a_finished_job_holds_its_arguments_no_longer(pool: JobPool) -> None:
    class Row:
        pass

    row = Row()
    gone = weakref.ref(row)
    pool.submit(id, row)
    assert pool.drain(WAIT_S)
    pool.submit(int)
    assert pool.drain(WAIT_S)
    del row
    gc.collect()
    assert gone() is None


def test_bulk_work_is_bound_to_its_cpus_and_urgent_work_is_not() -> None:
    anywhere = os.sched_getaffinity(0)
    cpu = min(anywhere)
    pool = JobPool(1, max_queued=2, bulk_cpus={cpu})
    seen: list[object] = []
    for urgent in (False, True, False):
        pool.submit(lambda: seen.append(os.sched_getaffinity(0)), urgent=urgent)
        assert pool.drain(WAIT_S)
    pool.submit(lambda: seen.append(threading.current_thread().daemon))
    assert pool.close(WAIT_S)
    assert seen == [{cpu}, anywhere, {cpu}, True]


class TestPatience:
    @pytest.fixture
    def patient(self) -> Iterator[JobPool]:
        """Holds back two jobs for as long as the engine is busy."""
        pool = JobPool(2, max_queued=8, patience=Patience(3600.0, max_jobs=2))
        pool.set_busy(True)
        yield pool
        pool.close(WAIT_S)

    def run_urgent(self, pool: JobPool) -> None:
        """What was submitted before had its chance to run once this returns."""
        ran = threading.Event()
        assert pool.submit(ran.set, urgent=True)
        assert ran.wait(WAIT_S)

    def test_holds_bulk_work_back_until_the_engine_is_idle(self, patient: JobPool) -> None:
        written = threading.Event()
        patient.submit(written.set)
        self.run_urgent(patient)
        assert patient.num_queued() == 1
        patient.set_busy(False)
        assert written.wait(WAIT_S)

    def test_ends_after_its_time(self) -> None:
        pool = JobPool(2, max_queued=8, patience=Patience(0.05, max_jobs=2))
        pool.set_busy(True)
        written = threading.Event()
        started_at = time.monotonic()
        pool.submit(written.set)
        assert written.wait(WAIT_S)
        assert time.monotonic() - started_at >= 0.05
        assert pool.close(WAIT_S)

    def test_is_not_for_more_than_so_many_jobs(self, patient: JobPool) -> None:
        written: list[int] = []
        for index in range(2):
            patient.submit(written.append, index)
        self.run_urgent(patient)
        assert written == []
        more = threading.Event()
        patient.submit(written.append, 2)
        patient.submit(more.set)
        deadline = time.monotonic() + WAIT_S
        while len(written) < 2 and time.monotonic() < deadline:
            self.run_urgent(patient)
        assert written == [0, 1]
        assert not more.is_set()

    @pytest.mark.parametrize("end", ["drain", "close"])
    def test_ends_with_a_flush(self, patient: JobPool, end: str) -> None:
        written: list[int] = []
        patient.submit(written.append, 1)
        assert getattr(patient, end)(WAIT_S)
        assert written == [1]


def test_cpus_that_are_not_there_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pool = JobPool(1, max_queued=1, bulk_cpus={4000})
    done = threading.Event()
    pool.submit(done.set)
    assert pool.close(WAIT_S)
    assert done.is_set()
    assert "not bound to CPUs [4000]" in caplog.text


def test_many_submitters_lose_nothing() -> None:
    pool = JobPool(4, max_queued=100_000)
    total: list[int] = []

    def submit(base: int) -> None:
        for index in range(500):
            assert pool.submit(total.append, base + index, urgent=index % 2 == 0)

    threads = [threading.Thread(target=submit, args=(base * 500,)) for base in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.drain(WAIT_S)
    assert sorted(total) == list(range(2000))
    assert pool.close(WAIT_S)


@pytest.mark.parametrize(("num_threads", "max_queued"), [(0, 1), (1, 0)])
def test_a_pool_of_nothing_is_refused(num_threads: int, max_queued: int) -> None:
    with pytest.raises(ValueError, match="needs a thread and a queue"):
        JobPool(num_threads, max_queued=max_queued)


def test_a_pool_that_gets_no_thread_refuses_and_tries_again(pool, monkeypatch, caplog):
    def start(thread):
        raise RuntimeError("can't start new thread")

    done = threading.Event()
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", start)
        assert not pool.submit(done.set)
        assert not pool.submit(done.set)
    assert pool.counters()["refused"] == 2
    assert len(caplog.records) == 1
    assert pool.submit(done.set)
    assert done.wait(WAIT_S)


def test_a_pool_that_gets_no_more_threads_does_with_those_it_has(monkeypatch):
    pool = JobPool(2, max_queued=4, name="test")
    blocker, done = occupy(pool), threading.Event()

    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", start)
        assert pool.submit(done.set)
    blocker.released.set()
    assert done.wait(WAIT_S)
    assert pool.close(WAIT_S)
