"""StoredTier with another store put in place while jobs and lookups of the old one run."""

from __future__ import annotations

import pytest
from vllm.v1.kv_offload.base import LookupResult

from lmcache_ext.errors import StoreFull
from lmcache_ext.offload import metrics
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.guard import Guarded
from tests.servers import until
from tests.unit.test_tier import NAMESPACE, NUM_ROWS, STEP, WAIT_S, Bench, GatedStore, context, key


class Swap:
    """A tier whose directory is replaced by another while it is used."""

    def __init__(self, bench, path) -> None:
        self.bench = bench
        self.old = bench.store
        self.new = GatedStore(str(path))
        self.new.name = "remote"
        self.guarded = Guarded(self.new, deadline_s=WAIT_S)

    def happens(self):
        self.bench.tier.replace(self.guarded, NaiveSerde())


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path / "disk")
    yield bench
    bench.close()


@pytest.fixture
def swap(bench, tmp_path):
    return Swap(bench, tmp_path / "new")


class TestReplace:
    def test_what_was_queued_finishes_on_the_store_it_began_on(self, bench, swap):
        bench.rows[0] = 42
        bench.store_rows([key(1)], [0])
        bench.finished()
        swap.old.gate.clear()
        loads = [bench.load_rows([key(1)], [10 + i]) for i in range(6)]  # more than there are threads
        stored = bench.store_rows([key(2)], [1])
        swap.happens()
        swap.old.gate.set()
        results = bench.finished()
        assert all(results[load].success for load in loads)
        assert results[stored].success
        assert (bench.rows[10:16] == 42).all()
        assert swap.old.exists([NAMESPACE + key(2)]) == [True]
        assert swap.new.exists([NAMESPACE + key(2)]) == [False]

    def test_closes_the_old_store_after_its_last_job_and_not_before(self, bench, swap):
        swap.old.gate.clear()
        bench.store_rows([key(1)], [0])
        assert swap.old.entered.acquire(timeout=WAIT_S)
        swap.happens()
        bench.tier.get_stats()
        assert not swap.old.closed
        swap.old.gate.set()
        until(lambda: swap.old.closed, "closed")
        assert not swap.new.closed

    def test_closes_the_old_store_after_its_last_lookup(self, bench, swap):
        swap.old.gate.clear()
        bench.tier.lookup(key(1), context())
        bench.tier.on_schedule_end(STEP)
        assert swap.old.entered.acquire(timeout=WAIT_S)
        swap.happens()
        assert not swap.old.closed
        swap.old.gate.set()
        until(lambda: swap.old.closed, "closed")

    def test_asks_the_new_store_what_the_old_one_had_answered(self, bench, swap):
        bench.store_rows([key(1)], [0])
        bench.finished()
        assert bench.look(key(1)) is LookupResult.HIT
        swap.happens()
        assert bench.look(key(1)) is LookupResult.MISS
        assert bench.tier.tier_type == "remote"

    def test_a_request_that_was_being_looked_up_gets_its_answer(self, bench, swap):
        swap.old.gate.clear()
        assert bench.tier.lookup(key(1), context()) is LookupResult.RETRY
        bench.tier.on_schedule_end(STEP)
        swap.happens()
        assert bench.look(key(1)) is LookupResult.MISS
        bench.tier.on_request_finished(context())
        swap.old.gate.set()

    def test_a_load_that_fails_after_it_is_a_miss_until_the_request_is_gone(self, bench, swap):
        bench.load_rows([key(1)], [0])
        swap.happens()
        assert not next(iter(bench.finished().values())).success
        assert bench.look(key(1)) is LookupResult.MISS

    def test_counts_of_the_old_store_are_not_lost(self, bench, swap):
        swap.old.error = StoreFull("full")
        swap.old.gate.clear()
        bench.store_rows([key(1)], [0])
        assert swap.old.entered.acquire(timeout=WAIT_S)
        swap.happens()
        swap.old.gate.set()
        bench.finished()
        stats = bench.tier.get_stats()._values
        assert stats[metrics.DROPPED_CHUNKS] == {("disk", "StoreFull"): 1}
        until(lambda: swap.old.closed, "closed")
        bench.tier.get_stats()
        bench.tier.get_stats()
        assert bench.tier._retired == []

    def test_by_nothing_finds_nothing_and_asks_nobody(self, bench):
        old = bench.store
        bench.store_rows([key(1)], [0])
        bench.finished()
        bench.tier.replace(None)
        assert bench.tier.lookup(key(1), context()) is LookupResult.MISS
        assert not bench.tier.present
        until(lambda: old.closed, "closed")
        assert metrics.TIER_UP not in bench.tier.get_stats()._values

    def test_of_nothing_brings_a_store_back(self, bench, swap):
        bench.tier.replace(None)
        swap.happens()
        stored = bench.store_rows([key(1)], [0])
        assert bench.finished()[stored].success
        assert bench.look(key(1)) is LookupResult.HIT

    def test_under_load_fails_nothing_and_closes_everything_but_the_last(self, bench, tmp_path):
        stores = [bench.store]
        jobs = []
        for i in range(20):
            jobs.append(bench.store_rows([key(i)], [i % NUM_ROWS]))
            jobs.append(bench.load_rows([key(i)], [(i + 7) % NUM_ROWS]))
            store = GatedStore(str(tmp_path / f"new{i}"))
            stores.append(store)
            bench.tier.replace(Guarded(store, deadline_s=WAIT_S), NaiveSerde())
            bench.tier.lookup(key(i), context(f"r{i}"))
            bench.tier.on_schedule_end(STEP)
        assert bench.finished().keys() == set(jobs)
        until(lambda: all(store.closed for store in stores[:-1]), "closed")
        assert not stores[-1].closed


@pytest.mark.parametrize(("name", "source"), [("disk", "disk"), ("peer", "p2p"), ("redis", "external_unspecified")])
def test_hits_count_for_the_kind_of_store_they_come_from(bench, tmp_path, name, source):
    bench.tier.replace(Guarded(DiskStore([str(tmp_path / "new")], None, name=name), deadline_s=WAIT_S), NaiveSerde())
    assert bench.tier.cache_hit_source.value == source
