"""BoundedTieringManager over real rows and a real directory: what vLLM's manager does not promise."""

from __future__ import annotations

import uuid
from dataclasses import replace

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext

from lmcache_ext.config_quotas import UNSALTED, Quota
from lmcache_ext.offload.host import HostTier
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.offload.rows import open_rows
from tests.unit.answers import await_answers
from tests.unit.test_tier import NAMESPACE, STEP, Bench, key

NUM_ROWS, ROW_BYTES = 8, 4096


class Machine:
    """Host memory of eight rows before a directory."""

    def __init__(self, path, **limits) -> None:
        engine_id = f"test-{uuid.uuid4().hex}"
        worker, self.region = (
            open_rows(engine_id=engine_id, num_chunks=NUM_ROWS, rank=rank, row_bytes=ROW_BYTES, worker_bytes=ROW_BYTES)
            for rank in (0, None)
        )
        worker.cleanup()
        self.primary = HostTier(NUM_ROWS, self.region)
        self.bench = Bench(path)
        if limits:
            self.bench.tier.limits = replace(self.bench.tier.limits, **limits)
        self.bench.tier._rows = np.asarray(self.primary.get_kv_memoryview()).view(np.uint8)
        self.manager = BoundedTieringManager(self.primary, [self.bench.tier])
        self._contexts: dict[str, ReqContext] = {}
        self._farther: list[Bench] = []

    def add_tier(self, path) -> Bench:
        """One more directory behind the others."""
        farther = Bench(path)
        farther.tier._rows = self.bench.tier._rows
        self.manager._append(farther.tier)
        self.manager._metrics._tier_types.append(farther.tier.tier_type)
        self._farther.append(farther)
        return farther

    def request(self, req_id: str) -> ReqContext:
        if req_id not in self._contexts:
            self._contexts[req_id] = ReqContext(req_id)
            self.manager.on_new_request(self._contexts[req_id])
        return self._contexts[req_id]

    def step(self):
        """End a step; all far work that it started is done when the next begins."""
        self.manager.on_schedule_end(STEP)
        for bench in (self.bench, *self._farther):
            assert bench.pool.drain(10.0)

    def write(self, keys, req_id="writer", success=True):
        """As a worker that computed and copied these chunks."""
        req = self.request(req_id)
        output = self.manager.prepare_store(keys, req)
        assert output is not None
        if not success:
            self.manager.mark_unwritten(output.keys_to_store)
        self.manager.complete_store(output.keys_to_store, req)
        self.step()
        self.step()  # takes in what the directory has

    def forget_host(self):
        """Only the directory remembers."""
        self.manager.reset_cache()

    def look(self, wanted, req_id):
        req = self.request(req_id)
        result = self.manager.lookup(wanted, req)
        if result is LookupResult.RETRY:
            self.manager.on_schedule_end(STEP)
            await_answers(self.bench.tier)
            result = self.manager.lookup(wanted, req)
        return result

    def find(self, keys, req_id):
        """How many chunks a whole prompt finds, in the end."""
        req = self.request(req_id)
        for _ in range(10):
            if (found := self.manager.lookup_prefix(keys, req)) is not None:
                return found
            self.step()
            await_answers(self.bench.tier)
        raise AssertionError("never answered")

    def lent(self):
        """Rows that are being read into, and loans that were not taken back."""
        assert bool(self.primary._num_lent) == bool(self.bench.tier._ahead._num_lent)
        return self.primary._num_lent

    def pinned(self):
        return sum(chunk.ref_cnt != 0 for chunk in self.primary._policy.chunks.values())

    def close(self):
        self.bench.store.gate.set()
        self.manager.shutdown()
        assert self.region.mmap_obj is None
        for bench in (self.bench, *self._farther):
            bench.pool.close(1.0)


@pytest.fixture
def make(tmp_path):
    made = []

    def build(**limits):
        made.append(Machine(tmp_path / f"disk{len(made)}", **limits))
        return made[-1]

    yield build
    for machine in made:
        machine.close()


def test_a_chunk_comes_back_from_the_directory(make):
    machine = make()
    machine.write([key(1), key(2)])
    machine.forget_host()
    assert machine.look(key(1), "r") is LookupResult.HIT_PENDING
    machine.step()
    assert machine.look(key(1), "r") is LookupResult.HIT
    assert machine.pinned() == 0


def test_a_chunk_that_is_gone_from_the_directory_is_a_miss_and_gives_its_row_back(make):
    machine = make()
    machine.write([key(1)])
    machine.forget_host()
    assert machine.look(key(1), "r") is LookupResult.HIT_PENDING
    machine.bench.store.delete([NAMESPACE + key(1)])
    machine.step()
    assert machine.look(key(1), "r") is LookupResult.MISS
    assert machine.pinned() == 0
    assert not machine.manager.has_pending_work()


class TestPromotions:
    def test_of_one_request_leave_rows_to_others(self, make):
        machine = make()
        keys = [key(i) for i in range(NUM_ROWS)]
        machine.write(keys)
        machine.forget_host()
        found = [machine.look(wanted, "r") for wanted in keys]
        assert found == [LookupResult.HIT_PENDING] * 6 + [LookupResult.MISS] * 2

    def test_of_one_chunk_end_when_others_keep_taking_its_row(self, make):
        machine = make()
        machine.write([key(1)])
        results = []
        for _ in range(4):
            machine.forget_host()
            results.append(machine.look(key(1), "r"))
            machine.step()
        assert results == [LookupResult.HIT_PENDING] * 2 + [LookupResult.MISS] * 2
        assert machine.look(key(1), "another") is LookupResult.HIT_PENDING

    def test_are_forgotten_with_their_request(self, make):
        machine = make()
        machine.write([key(1)])
        machine.forget_host()
        machine.look(key(1), "r")
        machine.manager.on_request_finished(machine.request("r"))
        assert machine.manager._promotions == {}


class TestPrefix:
    def test_ends_where_nobody_has_the_next_chunk(self, make):
        machine = make()
        machine.write([key(1), key(2), key(4)])
        assert machine.find([key(1), key(2), key(3), key(4)], "r") == 2
        machine.forget_host()
        assert machine.find([key(1), key(2), key(3), key(4)], "again") == 2
        assert machine.manager.lookup_prefix([key(3)], machine.request("again")) == 0

    def test_is_read_at_once_behind_what_host_memory_has(self, make, monkeypatch):
        machine = make()
        keys = [key(i) for i in range(5)]
        machine.write(keys)
        machine.forget_host()
        assert machine.find(keys[:2], "r") == 2
        asked, tier = [], machine.bench.tier
        read_ahead = tier.read_ahead
        monkeypatch.setattr(tier, "read_ahead", lambda keys, *more: asked.append(keys) or read_ahead(keys, *more))
        monkeypatch.setattr(machine.bench.tier, "submit_load", None)
        assert machine.find(keys, "another") == 5
        assert asked == [keys[2:]]
        assert machine.pinned() == 0

    def test_is_not_known_before_its_last_chunk_came(self, make):
        machine = make()
        machine.write([key(1), key(2)])
        machine.forget_host()
        assert machine.look(key(2), "other") is LookupResult.HIT_PENDING
        machine.bench.store.gate.clear()
        machine.manager.on_schedule_end(STEP)
        req = machine.request("r")
        for _ in range(3):
            assert machine.manager.lookup_prefix([key(1), key(2)], req) is None
        machine.bench.store.gate.set()
        assert machine.find([key(1), key(2)], "r") == 2

    def test_ends_before_an_overdue_fetch(self, make):
        machine = make(fetch_timeout_s=0.0)
        machine.write([key(1), key(2)])
        machine.forget_host()
        assert machine.find([key(1)], "r") == 1
        assert machine.look(key(2), "other") is LookupResult.HIT_PENDING
        machine.bench.store.gate.clear()
        machine.manager.on_schedule_end(STEP)
        assert machine.manager.lookup_prefix([key(1), key(2)], machine.request("r")) == 1

    def test_of_nothing_is_nothing(self, make):
        machine = make()
        assert machine.manager.lookup_prefix([], machine.request("r")) == 0

    def test_leaves_rows_to_others(self, make):
        machine = make()
        keys = [key(i) for i in range(NUM_ROWS)]
        machine.write(keys)
        machine.forget_host()
        assert machine.find(keys, "r") == 6

    def test_takes_as_many_rows_as_nobody_has_pinned(self, make):
        machine = make()
        keys = [key(i) for i in range(5)]
        machine.write(keys)
        machine.forget_host()
        others = [key(10 + i) for i in range(4)]
        machine.write(others, "other")
        machine.manager.prepare_load(others, machine.request("other"))
        assert machine.find(keys, "r") == NUM_ROWS - 4
        machine.manager.prepare_load(keys[:4], machine.request("r"))
        assert machine.find([key(4)], "r") == 0

    def test_wakes_who_waits_for_a_chunk_that_another_request_computes(self, make):
        machine = make()
        req = machine.request("writer")
        output = machine.manager.prepare_store([key(1)], req)
        assert machine.manager.lookup_prefix([key(1)], machine.request("r")) is None
        seen = machine.manager.progress.count
        machine.manager.complete_store(output.keys_to_store, req)
        assert machine.manager.progress.count > seen
        assert machine.manager.lookup_prefix([key(1)], machine.request("r")) == 1


class TestQuota:
    """Of a tenant whose prefix is in the directory, and longer than what it may have of host memory."""

    def limit(self, machine, rows):
        machine.manager.host.set_quotas((Quota(UNSALTED, UNSALTED, rows * ROW_BYTES),))

    def test_lets_the_head_of_a_prefix_be_fetched(self, make):
        machine = make()
        keys = [key(i) for i in range(5)]
        machine.write(keys)
        machine.forget_host()
        self.limit(machine, 3)
        assert machine.find(keys, "r") == 3
        spec = machine.manager.prepare_load(keys[:3], machine.request("r"))
        assert len(spec.block_ids) == 3
        machine.manager.complete_load(keys[:3], machine.request("r"))
        assert machine.pinned() == 0
        assert not machine.manager.has_pending_work()

    def test_of_nothing_is_a_miss_at_once(self, make):
        machine = make()
        machine.write([key(1)])
        machine.forget_host()
        self.limit(machine, 0)
        assert machine.look(key(1), "r") is LookupResult.MISS
        assert machine.find([key(1)], "s") == 0
        assert machine.manager._request_load_sources.get("s", {}) == {}
        assert not machine.manager.has_pending_work()


class TestOverdue:
    def test_fetch_is_a_miss_for_whoever_waits_and_the_row_stays_pinned(self, make):
        machine = make(fetch_timeout_s=0.0)
        machine.write([key(1)])
        machine.forget_host()
        assert machine.look(key(1), "r") is LookupResult.HIT_PENDING
        machine.bench.store.gate.clear()
        machine.manager.on_schedule_end(STEP)
        assert machine.look(key(1), "r") is LookupResult.MISS
        assert machine.look(key(1), "late") is LookupResult.MISS
        assert machine.pinned() == 1  # a thread may still write into it

    def test_fetch_that_comes_after_all_is_a_hit(self, make):
        machine = make(fetch_timeout_s=0.0)
        machine.write([key(1)])
        machine.forget_host()
        machine.look(key(1), "r")
        machine.step()
        assert machine.look(key(1), "r") is LookupResult.HIT


class TestUnwritten:
    def test_rows_are_never_published_nor_sent_on(self, make):
        machine = make()
        machine.write([key(1), key(2)], success=False)
        for wanted in (key(1), key(2)):
            assert machine.look(wanted, "r") is LookupResult.MISS
        assert machine.pinned() == 0
        assert machine.primary._get_num_free_chunks() == NUM_ROWS

    def test_mark_lasts_for_one_store(self, make):
        machine = make()
        machine.write([key(1)], success=False)
        machine.write([key(1)])
        assert machine.look(key(1), "r") is LookupResult.HIT

    def test_mark_does_not_reach_other_chunks(self, make):
        machine = make()
        machine.manager.mark_unwritten([key(9)])
        machine.write([key(1)])
        assert machine.look(key(1), "r") is LookupResult.HIT


class TestLoad:
    def test_pins_every_row_until_it_is_complete(self, make):
        machine = make()
        machine.write([key(1), key(2)])
        machine.manager.prepare_load([key(1), key(2)], machine.request("r"))
        assert machine.pinned() == 2
        machine.manager.complete_load([key(1), key(2)], machine.request("r"))
        assert machine.pinned() == 0

    def test_of_a_chunk_that_left_since_pins_nothing(self, make):
        machine = make()
        machine.write([key(1), key(2)])
        with pytest.raises(KeyError, match="1 of 3 chunks left host memory"):
            machine.manager.prepare_load([key(1), key(2), key(3)], machine.request("r"))
        assert machine.pinned() == 0


def test_stores_that_wait_for_the_directory_pin_their_rows_only_so_long(make):
    machine = make()
    machine.bench.store.gate.clear()
    req = machine.request("writer")
    output = machine.manager.prepare_store([key(1)], req)
    machine.manager.complete_store(output.keys_to_store, req)
    assert machine.pinned() == 1
    machine.bench.store.gate.set()
    machine.step()
    machine.step()
    assert machine.pinned() == 0
    assert not machine.manager.has_pending_work()
