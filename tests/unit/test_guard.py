"""The circuit breaker, on a clock that only the test moves and a probe that only the test lets go."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lmcache_ext.errors import StoreError, StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.base import Store, Usage
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.guard import READ, WRITE, Breaker, Change, Guarded
from tests.contracts.store_contract import ROOM_BYTES, StoreContract, get, key_of, views

DEADLINE_S = 1.0
LOOKUP_S = 0.5
FAILURES = 3


class ScriptedStore(Store):
    """Answers as told: an error to raise, and seconds that a call takes on the test's clock."""

    name = "scripted"

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.error: Exception | None = None
        self.errors: dict[bytes, StoreError] = {}
        self.took_s = 0.0
        self.calls: list[str] = []

    def _answer(self, call: str) -> None:
        self.calls.append(call)
        self.clock[0] += self.took_s
        if self.error is not None:
            raise self.error

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        self._answer("exists")
        return [True] * len(keys)

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        self._answer("get")
        if key in self.errors:
            raise self.errors[key]
        return 7

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        self._answer("put")
        if key in self.errors:
            raise self.errors[key]

    def delete(self, keys: Sequence[bytes]) -> None:
        self._answer("delete")

    def ping(self) -> float:
        self._answer("ping")
        return self.took_s

    def usage(self) -> Usage:
        self._answer("usage")
        return Usage(1, 2, 3)

    def close(self) -> None:
        self.calls.append("close")


class Gate(threading.Event):
    """The guard's closing event: `wait` shows how long it would wait and returns when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: queue.Queue[float] = queue.Queue()
        self._turns: queue.Queue[None] = queue.Queue()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.put(timeout)
        self._turns.get(timeout=10)
        return self.is_set()

    def set(self) -> None:
        super().set()
        self._turns.put(None)

    def next_wait(self) -> float:
        """Block until the probe waits; for how long it wants to."""
        return self.waits.get(timeout=10)

    def let_go(self) -> None:
        self._turns.put(None)


class Bench:
    """A guarded scripted store and everything around it."""

    def __init__(self) -> None:
        self.clock = [100.0]
        self.store = ScriptedStore(self.clock)
        self.gate = Gate()
        self.events: queue.Queue[Change] = queue.Queue()
        self.guarded = Guarded(
            self.store,
            deadline_s=DEADLINE_S,
            lookup_deadline_s=LOOKUP_S,
            failures_to_open=FAILURES,
            probe_interval_s=1.0,
            max_probe_interval_s=8.0,
            on_event=self.events.put,
            clock=lambda: self.clock[0],
            closing=self.gate,
            jitter=lambda: 0.0,
        )

    def next_event(self) -> Change:
        return self.events.get(timeout=10)

    def open_reads(self, error: type[StoreError] = StoreUnavailable, num_bytes: int = 0) -> None:
        self.store.error = error("down")
        for _ in range(FAILURES):
            assert self.guarded.get_into(b"k", [memoryview(bytearray(num_bytes))]) is None
        assert self.next_event() == Change("scripted", READ, True, error.__name__)

    def open_writes(self, error: StoreError) -> None:
        self.store.error = error
        for _ in range(FAILURES):
            with pytest.raises(type(error)):
                self.guarded.put(b"k", [])
        self.store.error = None
        assert self.next_event() == Change("scripted", WRITE, True, type(error).__name__)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.guarded.close()


class TestGuardedDisk(StoreContract):
    """A guarded store is a store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        self.disk = DiskStore([str(tmp_path)], ROOM_BYTES)
        guarded = Guarded(self.disk, deadline_s=30.0)
        yield guarded
        guarded.close()

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        self.disk.put(key, views(data))

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        return get(self.disk, key, 8 * 1024**2)


def test_closed_it_is_not_noticed(bench: Bench) -> None:
    assert bench.guarded.exists([b"a", b"b"]) == [True, True]
    assert bench.guarded.get_into(b"a", []) == 7
    bench.guarded.put(b"a", [])
    bench.guarded.delete([b"a"])
    assert bench.guarded.usage() == Usage(1, 2, 3)
    assert bench.guarded.ping() == 0.0
    assert bench.guarded.counters() == {"read.ok": 2, "write.ok": 1, "delete.ok": 1}


def test_a_failed_read_is_a_miss_and_counted_by_cause(bench: Bench) -> None:
    bench.store.error = StoreTimeout("late")
    assert bench.guarded.exists([b"a", b"b"]) == [False, False]
    bench.store.error = StoreUnavailable("gone")
    assert bench.guarded.get_into(b"a", []) is None
    assert bench.guarded.usage() == Usage(None, None, None)
    assert bench.guarded.counters() == {
        "read.StoreTimeout": 1,
        "read.StoreUnavailable": 1,
        "usage.StoreUnavailable": 1,
    }


def test_failures_in_a_row_open_it_and_then_the_store_is_not_asked(bench: Bench) -> None:
    bench.open_reads()
    bench.gate.next_wait()
    asked = len(bench.store.calls)
    assert bench.guarded.exists([b"a", b"b"]) == [False, False]
    assert bench.guarded.get_into(b"a", []) is None
    assert bench.guarded.usage() == Usage(None, None, None)
    with pytest.raises(StoreUnavailable, match="circuit open"):
        bench.guarded.put(b"a", [])
    with pytest.raises(StoreUnavailable, match="circuit open"):
        bench.guarded.delete([b"a"])
    assert len(bench.store.calls) == asked
    assert bench.guarded.counters() == {
        "read.StoreUnavailable": FAILURES,
        "read.opened": 1,
        "read.rejected": 2,
        "usage.rejected": 1,
        "write.rejected": 1,
        "delete.rejected": 1,
    }


def test_a_success_between_failures_starts_the_count_again(bench: Bench) -> None:
    for _ in range(5):
        bench.store.error = StoreUnavailable("flaky")
        for _ in range(FAILURES - 1):
            bench.guarded.exists([b"a"])
        bench.store.error = None
        assert bench.guarded.exists([b"a"]) == [True]
    assert not bench.guarded.is_open()


def test_of_a_batch_what_failed_is_a_miss_counted_and_judged_once(bench: Bench) -> None:
    bench.store.errors = {b"b": StoreUnavailable("one"), b"d": StoreFull("other")}
    batch = [b"a", b"b", b"c", b"d"]
    assert bench.guarded.get_many_into(batch, [[]] * 4) == [7, None, 7, None]
    assert bench.guarded.put_many(batch, [[]] * 4) == [None, bench.store.errors[b"b"], None, bench.store.errors[b"d"]]
    assert bench.guarded.counters() == {
        "read.StoreUnavailable": 1,
        "read.StoreFull": 1,
        "write.StoreUnavailable": 1,
        "write.StoreFull": 1,
    }
    for _ in range(FAILURES - 1):
        assert not bench.guarded.is_open(READ)
        bench.guarded.get_many_into(batch, [[]] * 4)
    assert bench.next_event() == Change("scripted", READ, True, "StoreUnavailable")
    asked = len(bench.store.calls)
    assert bench.guarded.get_many_into(batch, [[]] * 4) == [None] * 4
    assert [str(error) for error in bench.guarded.put_many(batch, [[]] * 4)] == ["scripted: circuit open"] * 4
    assert len(bench.store.calls) == asked


def test_a_batch_is_a_trial_like_a_single_write(bench: Bench) -> None:
    bench.open_writes(StoreFull("no room"))
    assert all(isinstance(error, StoreUnavailable) for error in bench.guarded.put_many([b"a", b"b"], [[], []]))
    bench.clock[0] += 1.0
    assert bench.guarded.put_many([b"a", b"b"], [[], []]) == [None, None]
    assert bench.next_event() == Change("scripted", WRITE, False, "trial")


def test_a_slow_batch_is_one_slow_call(bench: Bench) -> None:
    bench.store.took_s = DEADLINE_S
    assert bench.guarded.get_many_into([b"a", b"b"], [[], []]) == [7, 7]
    assert bench.guarded.counters() == {"read.slow": 1}


def test_after_lost_time_the_rest_of_a_batch_is_not_asked_for(bench: Bench) -> None:
    bench.store.errors = {b"b": StoreTimeout("late")}
    late = bench.store.errors[b"b"]
    assert bench.store.get_many_into([b"a", b"b", b"c", b"d"], [[]] * 4) == [7, late, late, late]
    assert bench.store.put_many([b"a", b"b", b"c", b"d"], [[]] * 4) == [None, late, late, late]
    assert bench.store.calls == ["get", "get", "put", "put"]


def test_slow_calls_keep_their_result_and_open_it(bench: Bench) -> None:
    bench.store.took_s = DEADLINE_S + 0.5
    assert [bench.guarded.get_into(b"a", []) for _ in range(FAILURES)] == [7] * FAILURES
    assert bench.next_event() == Change("scripted", READ, True, "slow")
    assert bench.guarded.get_into(b"a", []) is None
    assert bench.guarded.counters() == {"read.slow": FAILURES, "read.opened": 1, "read.rejected": 1}


def test_the_probe_backs_off_and_closes_it_when_the_store_is_back(bench: Bench) -> None:
    bench.open_reads()
    waits = []
    for _ in range(5):
        waits.append(bench.gate.next_wait())
        bench.clock[0] += waits[-1]
        bench.gate.let_go()
    waits.append(bench.gate.next_wait())
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    bench.store.error = None
    bench.gate.let_go()
    assert bench.next_event() == Change("scripted", READ, False, "probe")
    assert bench.guarded.get_into(b"a", []) == 7
    assert bench.guarded.counters()["read.closed"] == 1
    assert bench.guarded.counters()["probe.failed"] == 5
    bench.open_reads()
    assert bench.gate.next_wait() == 1.0


def test_a_probe_slower_than_the_deadline_does_not_close_it(bench: Bench) -> None:
    bench.open_reads()
    bench.gate.next_wait()
    bench.store.error, bench.store.took_s = None, DEADLINE_S * 2
    bench.gate.let_go()
    bench.gate.next_wait()
    assert bench.guarded.is_open()


def test_a_probe_that_breaks_is_logged_and_goes_on(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.open_reads()
    bench.gate.next_wait()
    bench.store.error = KeyError("a bug in the store")
    bench.gate.let_go()
    bench.gate.next_wait()
    assert "a bug in the store" in caplog.text
    bench.store.error = None
    bench.gate.let_go()
    assert not bench.next_event().is_open


@pytest.mark.parametrize("error", [StoreFull("no room"), StoreUnavailable("read-only")])
def test_a_full_or_read_only_store_still_serves(bench: Bench, error: StoreError) -> None:
    bench.open_writes(error)
    assert (bench.guarded.is_open(WRITE), bench.guarded.is_open(READ)) == (True, False)
    assert bench.guarded.get_into(b"a", []) == 7
    assert bench.guarded.exists([b"a"]) == [True]
    bench.guarded.delete([b"a"])
    with pytest.raises(StoreUnavailable, match="circuit open"):
        bench.guarded.put(b"a", [])
    assert "put" not in bench.store.calls[FAILURES:]


def test_one_write_per_backoff_is_tried_until_it_works(bench: Bench) -> None:
    error = StoreFull("no room")
    bench.open_writes(error)
    for backoff_s in (1.0, 2.0, 4.0, 8.0, 8.0):
        bench.clock[0] += backoff_s - 0.01
        with pytest.raises(StoreUnavailable, match="circuit open"):
            bench.guarded.put(b"a", [])
        bench.clock[0] += 0.01
        bench.store.error = error
        with pytest.raises(StoreFull):
            bench.guarded.put(b"a", [])
        bench.store.error = None
    bench.clock[0] += 8.0
    bench.guarded.put(b"a", [])
    assert bench.next_event() == Change("scripted", WRITE, False, "trial")
    bench.guarded.put(b"a", [])
    assert bench.guarded.counters()["write.rejected"] == 5


def test_while_a_trial_is_under_way_no_other_write_passes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.open_writes(StoreFull("no room"))
    bench.clock[0] += 1.0

    def put_and_try_another(key: bytes, parts: Sequence[memoryview]) -> None:
        with pytest.raises(StoreUnavailable, match="circuit open"):
            bench.guarded.put(b"b", [])

    monkeypatch.setattr(bench.store, "put", put_and_try_another)
    bench.guarded.put(b"a", [])
    assert not bench.guarded.is_open(WRITE)


def test_calls_that_began_before_it_opened_do_not_lengthen_the_backoff() -> None:
    breaker = Breaker(2, 1.0, 60.0, lambda: 0.0)
    assert [breaker.fail(0.0) for _ in range(10)] == [False, True] + [False] * 8
    assert breaker.retry_at == 1.0


def test_jitter_shortens_a_wait_by_up_to_half() -> None:
    jitters = [0.0, 0.5, 1.0]
    retries = []
    for _ in range(3):
        breaker = Breaker(1, 10.0, 60.0, lambda: jitters.pop(0))
        breaker.fail(0.0)
        retries.append(breaker.retry_at)
    assert retries == [10.0, 7.5, 5.0]


def test_a_bug_in_the_store_is_not_a_failure_of_the_backend(bench: Bench) -> None:
    bench.store.error = TypeError("a bug")
    calls: list[Callable[[], object]] = [lambda: bench.guarded.exists([b"a"]), lambda: bench.guarded.put(b"a", [])]
    for call in calls * 5:
        with pytest.raises(TypeError, match="a bug"):
            call()
    assert not bench.guarded.is_open()


def test_one_log_line_per_change_of_state(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllm.lmcache_ext.stores.guard"):
        bench.open_reads()
        for _ in range(100):
            bench.guarded.exists([b"a"])
        bench.gate.next_wait()
        bench.store.error = None
        bench.gate.let_go()
        bench.next_event()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "scripted: reads are off" in caplog.text
    assert "scripted: reads are on again" in caplog.text


def test_close_ends_the_probe_and_may_be_called_twice(bench: Bench) -> None:
    bench.open_reads()
    bench.gate.next_wait()
    (probe,) = [thread for thread in threading.enumerate() if thread.name == "scripted-probe"]
    bench.guarded.close()
    assert not probe.is_alive()
    bench.guarded.close()
    assert bench.store.calls.count("close") == 2
    assert "ping" not in bench.store.calls


def test_many_threads_on_a_dead_store_open_it_once(bench: Bench) -> None:
    bench.store.error = StoreUnavailable("down")
    threads = [
        threading.Thread(target=lambda: [bench.guarded.exists([key_of("a")]) for _ in range(100)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counters = bench.guarded.counters()
    assert counters["read.opened"] == 1
    assert counters["read.StoreUnavailable"] + counters["read.rejected"] == 800
    assert sum(thread.name == "scripted-probe" for thread in threading.enumerate()) == 1
