"""The circuit breaker and reads that come late, or never: deadlines, what they cost, and what a probe repeats."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from lmcache_ext.errors import StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.guard import READ, WRITE, Change, Guarded
from tests.unit.test_guard import DEADLINE_S, FAILURES, LOOKUP_S, Bench, Gate, ScriptedStore


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.guarded.close()


def test_a_lookup_has_a_deadline_of_its_own(bench: Bench) -> None:
    bench.store.took_s = (LOOKUP_S + DEADLINE_S) / 2
    for _ in range(FAILURES + 1):
        assert bench.guarded.get_into(b"a", []) == 7
    assert bench.guarded.exists([b"a"]) == [True]
    assert bench.guarded.counters() == {"read.ok": FAILURES + 1, "read.slow": 1}


def test_lookups_that_work_do_not_hide_fetches_that_fail(bench: Bench) -> None:
    for _ in range(FAILURES):
        assert bench.guarded.exists([b"a"]) == [True]
        bench.store.error = StoreTimeout("trickles")
        assert bench.guarded.get_into(b"a", []) is None
        bench.store.error = None
    assert bench.guarded.is_open()


def test_a_long_wait_for_nothing_counts_once_per_second(bench: Bench) -> None:
    bench.store.error, bench.store.took_s = StoreTimeout("late"), FAILURES + 0.1
    assert bench.guarded.get_into(b"a", []) is None
    assert bench.guarded.is_open()


def test_a_write_that_failed_late_counts_once_for_nobody_waits(bench: Bench) -> None:
    bench.store.error, bench.store.took_s = StoreFull("looked for room for long"), FAILURES + 0.1
    with pytest.raises(StoreFull):
        bench.guarded.put(b"a", [])
    assert not bench.guarded.is_open(WRITE)


class StuckStore(ScriptedStore):
    """Its `exists` never ends, as on a file system that is gone, until the test lets it."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__(clock)
        self.entered, self.leave = threading.Event(), threading.Event()

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        self.entered.set()
        assert self.leave.wait(10)
        return super().exists(keys)


def test_a_lookup_that_never_returns_opens_it_all_the_same() -> None:
    clock = [0.0]
    store = StuckStore(clock)
    guarded = Guarded(
        store, deadline_s=10.0, lookup_deadline_s=0.3, failures_to_open=3, closing=Gate(), clock=lambda: clock[0]
    )
    stuck = threading.Thread(target=guarded.exists, args=([b"a"],))
    stuck.start()
    assert store.entered.wait(10)
    opened = []
    for clock[0] in (0.2, 0.31, 1.9, 2.1, 2.9, 3.0, 9.0):
        opened.append(guarded.is_open())
    assert opened == [False, False, False, False, False, True, True]
    assert guarded.counters() == {"read.overdue": 1, "read.opened": 1}
    store.leave.set()
    stuck.join(10)
    assert guarded.counters()["read.slow"] == 1
    guarded.close()


def test_a_probe_after_a_fetch_that_took_too_long_fetches_it_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that trickles answers `ping` at once."""
    fetched: list[tuple[bytes, int]] = []
    trickles = [True, True, False]

    def get_into(key: bytes, parts: Sequence[memoryview]) -> int | None:
        fetched.append((key, sum(part.nbytes for part in parts)))
        if trickles.pop(0):
            raise StoreTimeout("trickles")
        return None

    bench.open_reads(StoreTimeout, num_bytes=12)
    bench.store.error = None
    monkeypatch.setattr(bench.store, "get_into", get_into)
    for _ in range(2):
        bench.gate.next_wait()
        bench.gate.let_go()
    bench.gate.next_wait()
    assert bench.guarded.is_open()
    bench.gate.let_go()
    assert bench.next_event() == Change("scripted", READ, False, "probe")
    assert fetched == [(b"k", 12)] * 3


def test_one_object_beyond_repair_does_not_keep_it_open(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_into(key: bytes, parts: Sequence[memoryview]) -> int | None:
        raise StoreUnavailable("this one cannot be read")

    bench.open_reads()
    bench.store.error = None
    monkeypatch.setattr(bench.store, "get_into", get_into)
    bench.gate.next_wait()
    bench.gate.let_go()
    assert bench.next_event() == Change("scripted", READ, False, "probe")
    assert bench.store.calls[-2:] == ["ping", "exists"]


def test_a_backend_that_pings_but_cannot_look_up_stays_open(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that lacks a node: every node that is there answers PING."""
    down = [True, False]

    def exists(keys: Sequence[bytes]) -> list[bool]:
        if down.pop(0):
            raise StoreUnavailable("CLUSTERDOWN")
        return [False] * len(keys)

    bench.open_reads()
    bench.store.error = None
    monkeypatch.setattr(bench.store, "exists", exists)
    for _ in range(2):
        bench.gate.next_wait()
        assert bench.guarded.is_open()
        bench.gate.let_go()
    assert bench.next_event() == Change("scripted", READ, False, "probe")
