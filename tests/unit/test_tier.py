"""StoredTier over a real directory, a real breaker and a real pool: every job is reported exactly once."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.tiering.base import TransferJob

from lmcache_ext.errors import StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.offload import metrics
from lmcache_ext.offload.lookups import ADAPTER_PARAM
from lmcache_ext.offload.tier import StoredTier, TierLimits
from lmcache_ext.serde.lossless import LosslessSerde
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.guard import READ, WRITE, Guarded
from lmcache_ext.stores.jobs import JobPool
from tests.unit.answers import await_answers

NAMESPACE = bytes(range(16))
NUM_ROWS, ROW_BYTES = 32, 4096
WAIT_S = 10.0
LIMITS = TierLimits(lookup_timeout_s=60.0, fetch_timeout_s=60.0, flush_timeout_s=WAIT_S, max_pending_stores=16)
STEP = ScheduleEndContext(new_req_ids=(), preempted_req_ids=())


def key(i: int, group: int = 0) -> OffloadKey:
    return OffloadKey(i.to_bytes(32, "big") + group.to_bytes(4, "big"))


def context(req_id: str = "r", adapter: str | None = None) -> ReqContext:
    return ReqContext(req_id, None if adapter is None else {ADAPTER_PARAM: adapter})


class GatedStore(DiskStore):
    """A directory that answers when the test lets it, or fails as told."""

    def __init__(self, path: str) -> None:
        super().__init__([path], None)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.error: Exception | None = None
        self.closed = False

    def _pass(self):
        self.entered.release()
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error

    def exists(self, keys):
        self._pass()
        return super().exists(keys)

    def get_into(self, key, parts):
        self._pass()
        return super().get_into(key, parts)

    def put(self, key, parts):
        self._pass()
        super().put(key, parts)

    def close(self):
        self.closed = True
        super().close()


class Bench:
    """A tier with everything below it."""

    def __init__(self, path, limits: TierLimits = LIMITS, *, max_queued=64, num_threads=2, serde=None) -> None:
        self.rows = np.zeros((NUM_ROWS, ROW_BYTES), dtype=np.int8)
        self.store = GatedStore(str(path))
        self.guarded = Guarded(self.store, deadline_s=WAIT_S, failures_to_open=2, probe_interval_s=3600)
        self.pool = JobPool(num_threads, max_queued=max_queued)
        self.tier = StoredTier(
            None,
            memoryview(self.rows),
            store=self.guarded,
            serde=serde or NaiveSerde(),
            namespace=NAMESPACE,
            pool=self.pool,
            limits=limits,
        )
        self._next_id = 0

    def job(self, keys, row_ids, *, load, req=None) -> int:
        self._next_id += 1
        rows = np.array(row_ids, dtype=np.int32)
        job = TransferJob(self._next_id, list(keys), rows, is_promotion=load, req_context=req or context())
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        return self._next_id

    def store_rows(self, keys, row_ids, req=None) -> int:
        return self.job(keys, row_ids, load=False, req=req)

    def load_rows(self, keys, row_ids, req=None) -> int:
        return self.job(keys, row_ids, load=True, req=req)

    def finished(self):
        """All results, once no work is left."""
        assert self.pool.drain(WAIT_S)
        return {result.job_id: result for result in self.tier.get_finished_jobs()}

    def settle_lookups(self):
        """End the step, and wait for the lookup thread's answer to it."""
        self.tier.on_schedule_end(STEP)
        await_answers(self.tier)

    def look(self, wanted, req=None):
        """The final answer for a key."""
        req = req or context()
        if (result := self.tier.lookup(wanted, req)) is LookupResult.RETRY:
            self.settle_lookups()
            result = self.tier.lookup(wanted, req)
        return result

    def counted(self, name):
        """Label values -> count since the last call."""
        return self.tier.get_stats()._values.get(name, {})

    def dropped(self):
        return {cause: count for (_, cause), count in self.counted(metrics.DROPPED_CHUNKS).items()}

    def close(self):
        self.store.error = None
        self.store.gate.set()
        self.tier.shutdown()
        self.pool.close(1.0)


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path / "disk")
    yield bench
    bench.close()


@pytest.fixture
def make_bench(tmp_path):
    made = []

    def make(**changed):
        pool = {name: changed.pop(name) for name in ("max_queued", "num_threads", "serde") if name in changed}
        made.append(Bench(tmp_path / f"disk{len(made)}", replace(LIMITS, **changed), **pool))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


class TestLookup:
    def test_is_retry_until_the_store_has_answered(self, bench):
        bench.store_rows([key(1)], [0])
        bench.finished()
        assert bench.tier.lookup(key(1), context()) is LookupResult.RETRY
        assert bench.tier.lookup(key(2), context()) is LookupResult.RETRY
        bench.settle_lookups()
        assert bench.tier.lookup(key(1), context()) is LookupResult.HIT
        assert bench.tier.lookup(key(2), context()) is LookupResult.MISS

    def test_that_takes_too_long_is_a_miss(self, make_bench):
        bench = make_bench(lookup_timeout_s=0.0)
        bench.store.gate.clear()
        assert bench.tier.lookup(key(1), context()) is LookupResult.MISS

    def test_that_was_asked_later_has_its_time_from_then(self, make_bench):
        bench = make_bench(lookup_timeout_s=0.2)
        bench.store.gate.clear()
        assert bench.tier.lookup(key(1), context()) is LookupResult.RETRY
        while bench.tier.lookup(key(1), context()) is LookupResult.RETRY:
            time.sleep(0.01)
        assert bench.tier.lookup(key(2), context()) is LookupResult.RETRY
        assert bench.tier.lookup(key(1), context("another")) is LookupResult.MISS

    def test_forgets_when_it_asked_what_nobody_wants_any_more(self, bench):
        bench.store.gate.clear()
        for i in range(3):
            bench.tier.lookup(key(i), context())
            bench.tier.lookup(key(i), context("another"))
        bench.tier.on_request_finished(context())
        assert len(bench.tier._backing.lookups._questions) == 3
        bench.tier.on_request_finished(context("another"))
        assert not bench.tier._backing.lookups._questions

    def test_of_a_dead_store_is_a_miss_at_once(self, bench):
        bench.store.error = StoreUnavailable("gone")
        for i in range(2):
            bench.look(key(i), context(f"r{i}"))
        assert bench.guarded.is_open(READ)
        assert bench.tier.lookup(key(9), context()) is LookupResult.MISS

    def test_after_a_failed_fetch_is_a_miss_until_the_request_is_gone(self, bench):
        bench.store_rows([key(1)], [0])
        bench.finished()
        assert bench.look(key(1)) is LookupResult.HIT
        bench.store.delete([NAMESPACE + key(1)])
        bench.load_rows([key(1)], [5])
        assert not next(iter(bench.finished().values())).success
        assert bench.tier.lookup(key(1), context()) is LookupResult.MISS
        bench.tier.on_request_finished(context())
        assert bench.tier.lookup(key(1), context()) is LookupResult.RETRY

    def test_with_an_unknown_adapter_asks_nobody(self, bench):
        assert bench.tier.lookup(key(1), context(adapter="")) is LookupResult.MISS
        assert not bench.store.entered.acquire(blocking=False)

    def test_that_breaks_is_a_miss_and_not_the_last(self, bench, monkeypatch, caplog):
        bench.store_rows([key(0)], [0])
        bench.finished()
        with monkeypatch.context() as broken:
            broken.setattr(bench.tier._backing.chunks, "present", lambda keys: 1 / 0)
            assert bench.look(key(0)) is LookupResult.MISS
        bench.tier.on_request_finished(context())
        assert "A lookup of 1 chunks failed" in caplog.text
        assert bench.look(key(0)) is LookupResult.HIT


class TestJobs:
    def test_a_chunk_survives_its_row(self, bench):
        bench.rows[3] = 42
        stored = bench.store_rows([key(1)], [3])
        assert bench.finished()[stored].success
        loaded = bench.load_rows([key(1)], [7])
        result = bench.finished()[loaded]
        assert result.success
        assert result.transfer_bytes == ROW_BYTES
        assert (bench.rows[7] == 42).all()
        assert (bench.rows[8] == 0).all()

    def test_of_many_tasks_are_reported_once(self, bench):
        keys = [key(i) for i in range(13)]
        stored = bench.store_rows(keys, range(13))
        results = bench.finished()
        assert list(results) == [stored]
        assert results[stored].success
        assert bench.finished() == {}

    def test_a_load_that_finds_a_part_names_it(self, bench):
        bench.store_rows([key(i) for i in range(10)], range(10))
        bench.finished()
        bench.store.delete([NAMESPACE + key(4), NAMESPACE + key(9)])
        loaded = bench.load_rows([key(i) for i in range(10)], range(10, 20))
        result = bench.finished()[loaded]
        assert not result.success
        assert set(result.successful_keys) == {key(i) for i in range(10)} - {key(4), key(9)}

    def test_that_decode_do_so_with_one_chunk_while_others_arrive(self, make_bench, monkeypatch):
        """With one thread, before the next is asked for: with several, others receive meanwhile."""
        serde, events = LosslessSerde(1), []
        bench = make_bench(serde=serde, num_threads=1)
        bench.store_rows([key(i) for i in range(3)], range(3))
        bench.finished()
        for watched, name in ((bench.store, "get_into"), (serde, "decode")):
            call = getattr(watched, name)
            monkeypatch.setattr(
                watched, name, lambda *given, call=call, name=name: (events.append(name), call(*given))[1]
            )
        job = bench.load_rows([key(i) for i in range(3)], range(3, 6))
        assert bench.finished()[job].success
        assert events == ["get_into", "decode"] * 3

    def test_without_keys_are_reported_too(self, bench):
        jobs = {bench.store_rows([], []), bench.load_rows([], [])}
        assert bench.finished().keys() == jobs

    def test_that_raise_what_no_store_should_are_reported_as_failed(self, bench):
        bench.store.error = ZeroDivisionError("a bug")
        jobs = {bench.store_rows([key(1)], [0]), bench.load_rows([key(2)], [1])}
        results = bench.finished()
        assert results.keys() == jobs
        assert not any(result.success for result in results.values())

    def test_that_the_pool_refuses_are_reported_and_counted(self, make_bench):
        bench = make_bench(max_queued=1, num_threads=1)
        bench.store.gate.clear()
        first = bench.store_rows([key(0)], [0])
        assert bench.store.entered.acquire(timeout=WAIT_S)  # it runs: the queue is empty again
        rest = bench.store_rows([key(i) for i in range(1, 13)], range(1, 13))  # three tasks, one place
        loads = [bench.load_rows([key(20 + i)], [20 + i]) for i in range(3)]
        bench.store.gate.set()
        results = bench.finished()
        assert results.keys() == {first, rest, *loads}
        assert bench.dropped() == {"queue_full": 8}
        assert bench.tier._pending_stores == 0

    def test_beyond_the_backlog_are_dropped_at_once(self, make_bench):
        bench = make_bench(max_pending_stores=4)
        bench.store.gate.clear()
        first = bench.store_rows([key(i) for i in range(4)], range(4))
        over = bench.store_rows([key(9)], [9])
        (at_once,) = bench.tier.get_finished_jobs()
        assert (at_once.job_id, at_once.success) == (over, False)
        bench.store.gate.set()
        assert bench.finished()[first].success
        assert bench.dropped() == {"backlog": 1}
        again = bench.store_rows([key(9)], [9])
        assert bench.finished()[again].success

    def test_beyond_the_backlog_keep_the_beginning_of_their_prompt(self, make_bench):
        bench = make_bench(max_pending_stores=2)
        req = context()
        for i in range(4):
            req.set_offload_key_position(key(i), 256 * (i + 1))
        stored = bench.store_rows([key(i) for i in (3, 1, 0, 2)], range(4), req)
        assert bench.finished()[stored].successful_keys == [key(0), key(1)]
        assert bench.dropped() == {"backlog": 2}
        assert bench.tier._pending_stores == 0

    def test_for_a_store_with_an_open_circuit_are_dropped_at_once(self, bench):
        bench.store.error = StoreUnavailable("gone")
        for i in range(2):
            bench.guarded.get_into(NAMESPACE + key(i), (memoryview(bytearray(8)),))
        refused = bench.store_rows([key(5)], [5])
        assert [result.job_id for result in bench.tier.get_finished_jobs()] == [refused]
        assert bench.dropped() == {"circuit_open": 1}

    def test_for_a_store_that_only_refuses_writes_go_on_as_its_trial(self, bench):
        bench.store.error = StoreFull("full")
        for i in range(2):
            with pytest.raises(StoreFull):
                bench.guarded.put(NAMESPACE + key(i), (memoryview(bytearray(8)),))
        assert bench.guarded.is_open(WRITE)
        bench.store.error = None
        bench.guarded._writes.retry_at = 0.0
        stored = bench.store_rows([key(5)], [5])
        assert bench.finished()[stored].success
        assert not bench.guarded.is_open(WRITE)

    def test_are_overdue_only_past_their_deadline_and_only_while_they_run(self, make_bench):
        patient, hasty = make_bench(), make_bench(fetch_timeout_s=0.0)
        for bench, overdue in ((patient, False), (hasty, True)):
            bench.store.gate.clear()
            bench.load_rows([key(1)], [1])
            assert bench.tier.is_overdue(key(1)) is overdue
            assert bench.tier.is_overdue(key(1)) is overdue
            bench.store.gate.set()
            bench.finished()
            assert not bench.tier.is_overdue(key(1))
        assert hasty.counted(metrics.ABANDONED_CHUNKS) == {("disk",): 1}


class TestAdapters:
    ONE, TWO = "11" * 16, "22" * 16

    def test_of_one_name_never_share_a_chunk(self, bench):
        bench.rows[0] = 1
        bench.store_rows([key(1)], [0], context("a", self.ONE))
        bench.finished()
        assert bench.look(key(1), context("a", self.ONE)) is LookupResult.HIT
        for i, adapter in enumerate((self.TWO, None)):
            loaded = bench.load_rows([key(1)], [5], context(f"b{i}", adapter))
            assert not bench.finished()[loaded].success
        loaded = bench.load_rows([key(1)], [6], context("c", self.ONE))
        assert bench.finished()[loaded].success

    def test_that_nobody_knows_are_not_stored(self, bench):
        bench.store_rows([key(1)], [0], context(adapter=""))
        bench.finished()
        assert bench.dropped() == {"unidentified_adapter": 1}


class TestShutdown:
    def test_lets_go_of_every_view_on_the_rows(self, tmp_path):
        buffer = bytearray(NUM_ROWS * ROW_BYTES)
        bench = Bench(tmp_path / "disk")
        bench.tier._rows = np.frombuffer(buffer, dtype=np.uint8).reshape(NUM_ROWS, ROW_BYTES)
        bench.store_rows([key(i) for i in range(12)], range(12))
        bench.close()
        buffer.clear()  # BufferError while anybody still exports it

    def test_writes_what_is_queued_first(self, tmp_path):
        bench = Bench(tmp_path / "disk")
        bench.store_rows([key(i) for i in range(12)], range(12))
        bench.tier.shutdown()
        again = DiskStore([str(tmp_path / "disk")], None)
        assert all(again.exists([NAMESPACE + key(i) for i in range(12)]))

    def test_with_work_left_says_so_and_keeps_the_rows(self, tmp_path):
        bench = Bench(tmp_path / "disk", replace(LIMITS, flush_timeout_s=0.0, lookup_timeout_s=0.0))
        bench.store.gate.clear()
        bench.store_rows([key(1)], [1])
        assert bench.store.entered.acquire(timeout=WAIT_S)
        with pytest.raises(StoreTimeout, match=r"disk: work left after 0\.0 s"):
            bench.tier.shutdown()
        assert bench.tier._rows is not None
        bench.store.gate.set()
        assert bench.pool.drain(WAIT_S)
        bench.tier.shutdown()

    def test_does_not_wait_for_a_lookup_that_never_returns(self, tmp_path):
        bench = Bench(tmp_path / "disk", replace(LIMITS, lookup_timeout_s=0.01))
        bench.store.gate.clear()
        bench.tier.lookup(key(1), context())
        bench.tier.on_schedule_end(STEP)
        assert bench.store.entered.acquire(timeout=WAIT_S)
        bench.tier.shutdown()
        assert bench.store.closed
        bench.store.gate.set()

    def test_may_be_called_twice(self, tmp_path):
        bench = Bench(tmp_path / "disk")
        bench.tier.shutdown()
        bench.tier.shutdown()


def test_drain_leaves_every_result_to_be_taken(bench):
    jobs = {bench.store_rows([key(i)], [i]) for i in range(8)}
    bench.tier.drain_jobs()
    assert {result.job_id for result in bench.tier.get_finished_jobs()} == jobs
