"""What is written where: every tier in the background, the nearest first, what was found far away near too, and
nothing twice. Host memory before a directory and a remote store (here another directory), through vLLM's manager.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadPolicy, ReqContext

from lmcache_ext.offload import metrics
from lmcache_ext.offload.host import HostTier
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.offload.rows import open_rows
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.guard import Guarded
from tests.unit.answers import await_answers
from tests.unit.test_tier import NAMESPACE, STEP, Bench, key

NUM_ROWS, ROW_BYTES = 16, 4096


class Machine:
    """Host memory, a disk and a remote store."""

    def __init__(self, path) -> None:
        engine_id = f"test-{uuid.uuid4().hex}"
        worker, self.region = (
            open_rows(engine_id=engine_id, num_chunks=NUM_ROWS, rank=rank, row_bytes=ROW_BYTES, worker_bytes=ROW_BYTES)
            for rank in (0, None)
        )
        worker.cleanup()
        self.primary = HostTier(NUM_ROWS, self.region)
        self.disk, self.remote = Bench(path / "disk"), Bench(path / "remote")
        for bench in (self.disk, self.remote):
            bench.tier._rows = np.asarray(self.primary.get_kv_memoryview()).view(np.uint8)
        self.manager = BoundedTieringManager(self.primary, [self.disk.tier, self.remote.tier])
        self._contexts: dict[str, ReqContext] = {}

    def limit(self, bench, **limits):
        bench.tier.limits = replace(bench.tier.limits, **limits)

    def request(self, req_id):
        if req_id not in self._contexts:
            self._contexts[req_id] = ReqContext(req_id)
            self.manager.on_new_request(self._contexts[req_id])
        return self._contexts[req_id]

    def step(self):
        """End a step; all far work that it started is done when the next begins."""
        self.manager.on_schedule_end(STEP)
        for bench in (self.disk, self.remote):
            assert bench.pool.drain(10.0)

    def use(self, keys, req_id):
        """As a request that computes what is not in host memory, from its first step to its end."""
        req = self.request(req_id)
        output = self.manager.prepare_store(keys, req)
        assert output is not None
        if output.keys_to_store:
            self.manager.complete_store(output.keys_to_store, req)
        self.step()
        self.step()
        self.manager.on_request_finished(req)

    def look(self, wanted, req_id):
        req = self.request(req_id)
        for _ in range(3):
            if (found := self.manager.lookup(wanted, req)) is not LookupResult.RETRY:
                return found
            self.manager.on_schedule_end(STEP)
            for bench in (self.disk, self.remote):
                await_answers(bench.tier)
        return LookupResult.RETRY

    def close(self):
        for bench in (self.disk, self.remote):
            bench.store.gate.set()
        self.manager.shutdown()
        for bench in (self.disk, self.remote):
            bench.pool.close(1.0)


def stored(bench, *keys):
    return DiskStore.exists(bench.store, [NAMESPACE + wanted for wanted in keys])  # past the test's gate


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.close()


class TestWriting:
    def test_goes_to_every_tier_and_waits_for_none(self, machine):
        for bench in (machine.disk, machine.remote):
            bench.store.gate.clear()
        req = machine.request("writer")
        output = machine.manager.prepare_store([key(1)], req)
        machine.manager.complete_store(output.keys_to_store, req)  # returns while both stores are stuck
        assert machine.manager.lookup(key(1), req) is LookupResult.HIT
        for bench in (machine.disk, machine.remote):
            bench.store.gate.set()
        machine.step()
        assert stored(machine.disk, key(1)) == stored(machine.remote, key(1)) == [True]

    def test_asks_for_many_chunks_at_once_and_sends_what_is_missing(self, machine, monkeypatch):
        asked, sent = [], []
        exists, put = machine.remote.store.exists, machine.remote.store.put
        monkeypatch.setattr(machine.remote.store, "exists", lambda keys: asked.append(len(keys)) or exists(keys))
        monkeypatch.setattr(machine.remote.store, "put", lambda key, parts: sent.append(key) or put(key, parts))
        machine.use([key(1), key(2)], "a")
        machine.manager.reset_cache()
        asked.clear()
        sent.clear()
        machine.use([key(i) for i in range(8)], "b")
        assert len(asked) == 2
        assert sum(asked) == 8
        assert len(sent) == 6


class TestFinding:
    def test_takes_the_nearest_tier_even_where_a_farther_one_answers_first(self, machine):
        machine.use([key(1)], "writer")
        machine.manager.reset_cache()
        machine.disk.store.gate.clear()
        req = machine.request("r")
        assert machine.manager.lookup(key(1), req) is LookupResult.RETRY
        machine.remote.settle_lookups()
        machine.disk.tier.on_schedule_end(STEP)
        assert machine.manager.lookup(key(1), req) is LookupResult.RETRY
        machine.disk.store.gate.set()
        assert machine.look(key(1), "r") is LookupResult.HIT_PENDING
        assert list(machine.manager._pending_load_submissions) == [0]
        machine.step()

    def test_far_away_writes_it_near_as_well(self, machine):
        machine.use([key(1), key(2)], "writer")
        machine.manager.reset_cache()
        machine.disk.store.delete([NAMESPACE + key(1), NAMESPACE + key(2)])
        assert machine.look(key(1), "r") is LookupResult.HIT_PENDING
        for _ in range(3):
            machine.step()
        assert machine.look(key(1), "r") is LookupResult.HIT
        assert stored(machine.disk, key(1), key(2)) == [True, False]
        assert not machine.manager.has_pending_work()

    def test_far_away_writes_nothing_near_where_that_is_off(self, machine):
        machine.limit(machine.disk, keeps_promoted=False)
        machine.use([key(1)], "writer")
        machine.manager.reset_cache()
        machine.disk.store.delete([NAMESPACE + key(1)])
        machine.look(key(1), "r")
        for _ in range(3):
            machine.step()
        assert machine.look(key(1), "r") is LookupResult.HIT
        assert stored(machine.disk, key(1)) == [False]

    def test_near_writes_nothing_far_away(self, machine):
        machine.use([key(1)], "writer")
        machine.manager.reset_cache()
        machine.remote.store.delete([NAMESPACE + key(1)])
        machine.look(key(1), "r")
        for _ in range(3):
            machine.step()
        assert stored(machine.remote, key(1)) == [False]


class TestAdmission:
    def test_is_off_unless_asked_for(self, machine):
        assert machine.remote.tier.on_new_request(ReqContext("r")).policy is OffloadPolicy.CHUNK_LEVEL
        machine.use([key(1)], "once")
        assert stored(machine.remote, key(1)) == [True]

    def test_keeps_a_prompt_that_comes_once_to_this_server(self, machine):
        machine.limit(machine.remote, min_uses=2)
        machine.use([key(1), key(2)], "once")
        assert stored(machine.remote, key(1), key(2)) == [False, False]
        assert stored(machine.disk, key(1), key(2)) == [True, True]
        assert machine.remote.dropped() == {"not_admitted": 2}

    def test_sends_what_a_second_request_uses_and_only_that(self, machine):
        machine.limit(machine.remote, min_uses=2)
        machine.use([key(1), key(2)], "one")
        machine.use([key(1), key(3)], "two")  # a shared prefix, in host memory by now
        assert stored(machine.remote, key(1), key(2), key(3)) == [True, False, False]

    def test_asks_the_store_nothing_about_what_it_has_written(self, machine):
        machine.limit(machine.remote, min_uses=2)
        for request in ("one", "two"):
            machine.use([key(1)], request)
        while machine.remote.store.entered.acquire(blocking=False):
            pass
        machine.use([key(1)], "three")
        assert not machine.remote.store.entered.acquire(blocking=False)
        assert machine.remote.counted(metrics.STORE_FAILURES) == {}

    def test_tries_again_where_the_write_failed(self, machine):
        machine.limit(machine.remote, min_uses=2)
        machine.use([key(1)], "one")
        machine.limit(machine.remote, max_pending_stores=0)
        machine.use([key(1)], "two")
        assert stored(machine.remote, key(1)) == [False]
        machine.limit(machine.remote, max_pending_stores=16)
        machine.use([key(1)], "three")
        assert stored(machine.remote, key(1)) == [True]

    def test_knows_nothing_of_a_store_that_takes_the_place_of_another(self, machine, tmp_path):
        machine.limit(machine.remote, min_uses=2)
        for request in ("one", "two"):
            machine.use([key(1)], request)
        other = DiskStore([str(tmp_path / "other")], None)
        machine.remote.tier.replace(Guarded(other, deadline_s=10.0), NaiveSerde())
        for request in ("three", "four"):
            machine.use([key(1)], request)
        assert other.exists([NAMESPACE + key(1)]) == [True]
