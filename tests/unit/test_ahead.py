"""What a directory has of a prompt is read by the lookup itself, into rows that are lent for it: ReadAhead."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from vllm.v1.kv_offload.base import ReqContext
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmcache_ext.offload import metrics
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.guard import Guarded
from tests.servers import until
from tests.unit.answers import await_answers
from tests.unit.test_manager import NUM_ROWS, ROW_BYTES, Machine
from tests.unit.test_tier import NAMESPACE, STEP, GatedStore, key


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path / "disk")
    yield machine
    machine.close()


class Spy:
    """Counts calls on their way."""

    def __init__(self, body) -> None:
        self.body, self.count = body, 0

    def __call__(self, *arguments):
        self.count += 1
        return self.body(*arguments)


def test_takes_two_lookups(machine):
    keys = [key(i) for i in range(4)]
    machine.write(keys)
    machine.forget_host()
    req = machine.request("r")
    assert machine.manager.lookup_prefix(keys, req) is None
    machine.step()
    await_answers(machine.bench.tier)
    assert machine.manager.lookup_prefix(keys, req) == 4
    sources = [machine.manager.get_load_source(wanted, req) for wanted in keys]
    assert sources == [CacheHitSource.DISK] * 4
    assert machine.lent() == 0


def test_reads_the_bytes_that_were_written(machine):
    rows = np.asarray(machine.primary.get_kv_memoryview()).view(np.uint8)
    req = machine.request("writer")
    output = machine.manager.prepare_store([key(1), key(2)], req)
    for value, row in enumerate(output.store_spec.block_ids.tolist(), 41):
        rows[row] = value
    machine.manager.complete_store(output.keys_to_store, req)
    machine.step()
    machine.step()
    machine.forget_host()
    rows[:] = 0
    assert machine.find([key(2), key(1)], "r") == 2
    for value, wanted in ((41, key(1)), (42, key(2))):
        assert (rows[machine.primary._policy.get(wanted).chunk_id] == value).all()


def test_reads_nothing_behind_a_chunk_that_nobody_has(machine):
    machine.write([key(1), key(3)])
    machine.forget_host()
    assert machine.find([key(1), key(2), key(3)], "r") == 1
    assert machine.primary.find([key(1), key(2), key(3)])[1:] == [None, None]
    assert machine.primary.room() == NUM_ROWS
    assert machine.lent() == 0


def test_gives_back_the_rows_of_a_prompt_that_nobody_has(machine):
    assert machine.find([key(i) for i in range(4)], "r") == 0
    assert machine.lent() == 0
    assert machine.primary.room() == NUM_ROWS


def test_goes_on_for_others_when_its_request_is_gone(machine):
    machine.write([key(1), key(2)])
    machine.forget_host()
    assert machine.manager.lookup_prefix([key(1), key(2)], machine.request("r")) is None
    machine.manager.on_request_finished(machine.request("r"))
    machine.step()
    await_answers(machine.bench.tier)
    machine.step()
    assert machine.lent() == 0
    assert machine.manager.lookup_prefix([key(1), key(2)], machine.request("another")) == 2
    assert "r" not in machine.manager._request_load_sources
    assert "r" not in machine.manager._promotions


def test_is_shared_by_requests_that_want_the_same(machine, monkeypatch):
    machine.write([key(1), key(2)])
    machine.forget_host()
    asked = Spy(machine.bench.tier.read_ahead)
    monkeypatch.setattr(machine.bench.tier, "read_ahead", asked)
    for req_id in ("a", "b"):
        assert machine.manager.lookup_prefix([key(1), key(2)], machine.request(req_id)) is None
    machine.step()
    await_answers(machine.bench.tier)
    for req_id in ("a", "b"):
        assert machine.manager.lookup_prefix([key(1), key(2)], machine.request(req_id)) == 2
    assert asked.count == 1


def test_of_a_chunk_that_is_torn_is_a_miss_and_frees_its_row(machine):
    machine.write([key(1), key(2)])
    machine.forget_host()
    machine.bench.store.delete([NAMESPACE + key(2)])
    machine.bench.store.put(NAMESPACE + key(2), [memoryview(bytes(100))])
    assert machine.find([key(1), key(2)], "r") == 1
    assert machine.lent() == 0
    assert machine.primary.room() == NUM_ROWS
    counted = machine.manager.get_stats()._values
    assert counted["vllm:kv_offload_tiering_read_bytes"] == {("1:disk",): ROW_BYTES}
    assert counted["vllm:kv_offload_tiering_promotion_job_failures"] == {("1:disk",): 1}


def test_that_takes_too_long_is_a_miss_and_comes_after_all(machine):
    machine.bench.tier.limits = replace(machine.bench.tier.limits, fetch_timeout_s=0.0)
    machine.write([key(1), key(2)])
    machine.forget_host()
    tier, req = machine.bench.tier, machine.request("r")
    entered = machine.bench.store.entered
    while entered.acquire(blocking=False):
        pass
    machine.bench.store.gate.clear()
    assert machine.manager.lookup_prefix([key(1), key(2)], req) is None
    machine.manager.on_schedule_end(STEP)
    assert entered.acquire(timeout=10)  # asks what is there,
    machine.bench.store.gate.set()
    machine.bench.store.gate.clear()
    assert entered.acquire(timeout=10)  # and reads it
    assert machine.manager.lookup_prefix([key(1), key(2)], req) == 0
    assert machine.lent() == 2
    machine.bench.store.gate.set()
    await_answers(tier)
    machine.step()
    assert machine.manager.lookup_prefix([key(1), key(2)], machine.request("another")) == 2
    assert machine.manager.get_stats()._values[metrics.ABANDONED_CHUNKS] == {("disk",): 2}


def test_that_the_pool_has_no_place_for_is_a_miss(machine, monkeypatch):
    machine.write([key(1), key(2)])
    machine.forget_host()
    monkeypatch.setattr(machine.bench.pool, "_max_queued", 0)
    assert machine.find([key(1), key(2)], "r") == 0
    assert machine.lent() == 0


def test_that_breaks_is_a_miss(machine, monkeypatch):
    machine.write([key(1), key(2)])
    machine.forget_host()
    monkeypatch.setattr(machine.bench.tier._backing.chunks, "fetch", lambda keys, rows: 1 / 0)
    assert machine.find([key(1), key(2)], "r") == 0
    assert machine.lent() == 0
    assert machine.primary.room() == NUM_ROWS


def test_that_cannot_begin_is_a_miss_and_not_the_last(machine, monkeypatch, caplog):
    machine.write([key(1), key(2)])
    machine.forget_host()
    with monkeypatch.context() as broken:
        broken.setattr(machine.bench.tier._ahead, "_views", lambda rows: 1 / 0)
        assert machine.manager.lookup_prefix([key(1)], machine.request("lost")) is None
        machine.step()
        until(lambda: "A lookup of 1 chunks failed" in caplog.text, "said so")
    machine.manager.reset_cache()  # waits for what was lent
    assert machine.lent() == 0
    assert machine.find([key(2)], "next") == 1


def test_is_waited_for_by_a_reset(machine):
    machine.write([key(1), key(2)])
    machine.forget_host()
    machine.bench.store.gate.clear()
    assert machine.manager.lookup_prefix([key(1), key(2)], machine.request("r")) is None
    machine.manager.on_schedule_end(STEP)
    reset = threading.Thread(target=machine.manager.reset_cache)
    reset.start()
    reset.join(0.2)
    assert reset.is_alive()
    machine.bench.store.gate.set()
    reset.join(10)
    assert not reset.is_alive()
    assert machine.lent() == 0
    assert machine.primary.find([key(1), key(2)]) == [None, None]
    assert machine.find([key(1), key(2)], "r") == 2


def test_evicts_nothing_for_an_engine_that_stores_nothing(machine):
    kept = [key(i) for i in range(NUM_ROWS)]
    machine.write(kept)
    machine.manager.frozen = True
    assert machine.find([key(90)], "r") == 0
    assert None not in machine.primary.find(kept)


def test_evicts_nothing_for_a_request_of_which_nothing_is_stored(machine):
    kept = [key(i) for i in range(NUM_ROWS)]
    machine.write(kept)
    req = ReqContext("secret", kv_transfer_params={"lmcache.skip_save": True})
    machine.manager.on_new_request(req)
    assert machine.manager.lookup_prefix([key(90)], req) is None
    machine.step()
    await_answers(machine.bench.tier)
    assert machine.manager.lookup_prefix([key(90)], req) == 0
    assert None not in machine.primary.find(kept)


def test_counts_what_was_there(machine):
    machine.write([key(1), key(2)])
    machine.forget_host()
    machine.manager.get_stats()
    assert machine.find([key(1), key(2), key(3), key(4)], "r") == 2
    counted = machine.manager.get_stats()._values
    assert counted["vllm:kv_offload_tiering_chunk_hits"] == {("disk",): 2}


def test_ends_with_another_store_in_its_place(machine, tmp_path):
    machine.write([key(1), key(2)])
    machine.forget_host()
    machine.bench.store.gate.clear()
    req = machine.request("r")
    assert machine.manager.lookup_prefix([key(1), key(2)], req) is None
    other = Guarded(GatedStore(str(tmp_path / "other")), deadline_s=10.0)
    machine.bench.tier.replace(other, NaiveSerde())
    machine.bench.store.gate.set()
    machine.manager.reset_cache()  # waits for what was lent
    assert machine.lent() == 0
    assert machine.find([key(1), key(2)], "r") == 0


def test_touches_no_row_after_a_shutdown_that_could_not_wait_for_it(tmp_path):
    machine = Machine(tmp_path / "disk", lookup_timeout_s=0.1)
    machine.write([key(1)])
    machine.forget_host()
    machine.bench.store.gate.clear()
    assert machine.manager.lookup_prefix([key(1)], machine.request("r")) is None
    machine.manager.on_schedule_end(STEP)
    thread = machine.bench.tier._backing.lookups._thread
    machine.manager.shutdown()
    assert machine.region.mmap_obj is None
    machine.bench.store.gate.set()
    thread.join(10)
    assert not thread.is_alive()
    (loan,) = machine.bench.tier._ahead.take()
    assert (loan.num_read, loan.read) == (0, {})
    machine.bench.pool.close(1.0)


def test_is_waited_for_though_a_tier_farther_away_has_the_chunks(tmp_path):
    machine = Machine(tmp_path / "disk")
    farther = machine.add_tier(tmp_path / "farther")
    machine.write([key(1), key(2)])
    machine.forget_host()
    first, second = machine.request("first"), machine.request("second")
    machine.bench.tier.present = False
    assert machine.manager.lookup_prefix([key(1), key(2)], first) is None
    machine.step()
    await_answers(farther.tier)
    machine.bench.tier.present = True
    assert farther.tier.ask([key(1), key(2)], second) == [True, True]
    assert machine.manager.lookup_prefix([key(1), key(2)], second) is None
    assert machine.lent() == 2
    assert not machine.manager._pending_load_submissions
    machine.step()
    await_answers(machine.bench.tier)
    assert machine.manager.lookup_prefix([key(1), key(2)], second) == 2
    assert machine.manager.get_load_source(key(1), second) is CacheHitSource.DISK
    machine.close()
