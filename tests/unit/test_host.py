"""HostTier: fewer rows hold chunks than are reserved, and more again, whatever is pinned. Real rows."""

from __future__ import annotations

import random
import uuid

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

from lmcache_ext.offload.host import HostTier
from lmcache_ext.offload.policies import resident
from lmcache_ext.offload.rows import open_rows
from tests.unit.test_tier import key

NUM_ROWS, ROW_BYTES = 8, 4096
POLICIES = [
    ("lru", None),
    ("arc", None),
    ("LFUCachePolicy", "lmcache_ext.offload.policies"),
    ("FIFOCachePolicy", "lmcache_ext.offload.policies"),
    ("MRUCachePolicy", "lmcache_ext.offload.policies"),
]


class Host(HostTier):
    """With the words of a test."""

    def write(self, *ids):
        """As chunks that were computed and copied; the rows that they got, or None."""
        planned = self.begin_write(*ids)
        if planned is not None:
            self.complete_store([key(i) for i in ids], self.req)
        return planned

    def begin_write(self, *ids):
        output = self.prepare_store([key(i) for i in ids], self.req)
        return None if output is None else output.store_spec.block_ids.tolist()

    def has(self, *ids):
        return [self.lookup(key(i), self.req) is LookupResult.HIT for i in ids]

    def borrow(self, num_rows, spared=(), may_evict=True):
        """As for chunks that a far tier may have; the rows, remembered until they are given back."""
        rows = self.lend(num_rows, self.req, spared, may_evict=may_evict)
        self.on_loan.append(rows)
        return rows

    def give_back(self, rows, *ids):
        """The first of the rows hold these chunks now."""
        self.on_loan.remove(rows)
        read = {key(i): ready(row) for i, row in zip(ids, rows, strict=False)}
        return list(self.take_back(rows, read, self.req))

    def rows_in_use(self):
        policy = self._policy
        chunks = policy.chunks if hasattr(policy, "chunks") else {**policy.t1, **policy.t2}
        return sorted(chunk.chunk_id for chunk in chunks.values())

    def check(self):
        """Every row is in one place: used, free, not used yet or withheld."""
        fresh = range(self._num_allocated_chunks, self._num_chunks)
        lent = [row for rows in self.on_loan for row in rows]
        rows = [*self.rows_in_use(), *self._free_list, *fresh, *self._withheld, *lent]
        assert sorted(rows) == list(range(NUM_ROWS))
        assert self._num_chunks + len(self._withheld) == NUM_ROWS
        assert self.tenants._owners.keys() <= set(resident(self._policy))


def build_host(policy="lru", module=None, **options):
    engine_id = f"test-{uuid.uuid4().hex}"
    sizes = {"num_chunks": NUM_ROWS, "row_bytes": ROW_BYTES, "worker_bytes": ROW_BYTES}
    worker = open_rows(engine_id=engine_id, rank=0, **sizes)
    region = open_rows(engine_id=engine_id, rank=None, **sizes)
    worker.cleanup()
    host = Host(NUM_ROWS, region, cache_policy=policy, cache_policy_module_path=module, **options)
    host.req, host.on_loan = ReqContext("r"), []
    return host


def ready(row):
    chunk = ChunkStatus(row)
    chunk.ref_cnt = 0
    return chunk


@pytest.fixture
def make():
    made = []

    def build(policy="lru", module=None, **options):
        made.append(build_host(policy, module, **options))
        return made[-1]

    yield build
    for host in made:
        host.check()
        host.shutdown()


@pytest.fixture
def host(make):
    return make()


class TestLess:
    def test_takes_rows_that_nobody_uses_first(self, host):
        host.write(1, 2, 3)
        host.set_limit(4)
        assert host.has(1, 2, 3) == [True] * 3
        host.check()
        assert host.write(4, 5) is not None
        assert len(host.rows_in_use()) == 4

    @pytest.mark.parametrize(("policy", "module"), POLICIES)
    def test_evicts_what_the_policy_would_and_holds(self, make, policy, module):
        host = make(policy, module)
        host.write(*range(NUM_ROWS))
        host.set_limit(3)
        assert len(host.rows_in_use()) == 3
        host.check()
        for i in range(20, 40):
            host.write(i)
            assert len(host.rows_in_use()) == 3
        assert host._policy.cache_capacity == 3

    def test_evicts_the_least_recently_used(self, host):
        host.write(*range(NUM_ROWS))
        host.touch([key(0)], host.req)
        host.set_limit(2)
        assert host.has(0, 7) == [True, True]

    def test_waits_for_rows_that_are_read(self, host):
        host.write(*range(NUM_ROWS))
        host.prepare_load([key(i) for i in range(6)], host.req)
        host.set_limit(2)
        assert host.has(*range(6)) == [True] * 6
        assert host.rows_in_use() == list(range(6))
        host.complete_load([key(i) for i in range(6)], host.req)
        host.settle()
        assert len(host.rows_in_use()) == 2
        host.check()

    def test_waits_for_rows_that_are_written(self, host):
        host.begin_write(*range(NUM_ROWS))
        host.set_limit(2)
        host.complete_store([key(i) for i in range(NUM_ROWS)], host.req)
        host.settle()
        assert host.has(*range(NUM_ROWS)).count(True) == 2

    def test_gives_no_row_above_it_to_a_new_chunk(self, host):
        host.write(*range(NUM_ROWS))
        host.prepare_load([key(i) for i in range(NUM_ROWS)], host.req)
        host.set_limit(2)
        host.complete_load([key(i) for i in range(4)], host.req)
        assert host.write(20) is None  # four are pinned still, and two may be used
        host.complete_load([key(i) for i in range(4, NUM_ROWS)], host.req)
        assert host.write(20) is not None
        assert len(host.rows_in_use()) == 2

    def test_than_a_request_needs_fails_its_store_only(self, host):
        host.set_limit(2)
        assert host.write(1, 2, 3) is None
        assert host.write(1, 2) is not None

    def test_than_one_is_one(self, host):
        host.set_limit(0)
        assert host.limit == 1

    def test_is_told_to_whoever_listens(self, make):
        host = make(enable_events=True)
        host.write(*range(NUM_ROWS))
        list(host.take_events())
        host.set_limit(6)
        (event,) = host.take_events()
        assert event.removed
        assert event.keys == [key(0), key(1)]


class TestMore:
    def test_gives_rows_back(self, host):
        host.write(*range(NUM_ROWS))
        host.set_limit(2)
        host.set_limit(5)
        host.check()
        host.write(20, 21, 22)
        assert host.has(6, 7, 20, 21, 22) == [True] * 5
        assert host.write(30) is not None
        assert len(host.rows_in_use()) == 5

    def test_than_reserved_is_all_that_is(self, host):
        host.set_limit(2)
        host.set_limit(1000)
        assert host.limit == NUM_ROWS
        assert len(host.write(*range(NUM_ROWS))) == NUM_ROWS

    def test_while_the_last_change_still_waits_for_pinned_rows(self, host):
        host.write(*range(NUM_ROWS))
        host.prepare_load([key(i) for i in range(NUM_ROWS)], host.req)
        host.set_limit(1)
        host.set_limit(7)
        host.complete_load([key(i) for i in range(NUM_ROWS)], host.req)
        host.settle()
        assert len(host.rows_in_use()) == 7


def test_a_reset_keeps_the_limit(host):
    host.write(*range(NUM_ROWS))
    host.set_limit(3)
    host.reset_cache()
    host.check()
    assert host.write(1, 2, 3) is not None
    assert host.write(4, 5, 6) is not None
    assert len(host.rows_in_use()) == 3


def test_the_share_in_use_is_that_of_the_rows_that_may_be_used(host):
    host.write(1, 2)
    host.set_limit(4)
    host.prepare_load([key(1)], host.req)
    gauges = host.get_stats()._values
    assert gauges["vllm:kv_offload_cpu_cache_usage_perc"] == {(): 0.25}
    host.complete_load([key(1)], host.req)


class TestLoan:
    def test_keeps_its_rows_from_everybody_else(self, host):
        rows = host.borrow(3)
        assert len(rows) == 3
        written = host.write(*range(5))
        assert not set(written) & set(rows)
        assert host.write(9) is not None  # in the row of another chunk
        assert host.give_back(rows) == []
        assert sorted(host.write(10, 11, 12)) == sorted(rows)

    def test_leaves_chunks_in_the_rows_that_they_were_read_into(self, host):
        rows = host.borrow(3)
        assert host.give_back(rows, 1, 2) == [key(1), key(2)]
        assert host.has(1, 2, 3) == [True, True, False]
        assert [host._policy.get(key(i)).chunk_id for i in (1, 2)] == rows[:2]
        assert host.room() == NUM_ROWS

    def test_of_a_chunk_that_came_meanwhile_frees_its_row(self, host):
        rows = host.borrow(2)
        host.write(1)
        pending = host.begin_write(2)
        assert host.give_back(rows, 1, 2) == []
        assert host._policy.get(key(2)).chunk_id == pending[0]
        assert host.has(2) == [False]
        host.complete_store([key(2)], host.req)

    def test_takes_half_of_all_rows_at_most(self, host):
        assert [len(host.borrow(3)) for _ in range(3)] == [3, 1, 0]
        for rows in list(host.on_loan):
            host.give_back(rows)

    def test_evicts_little_and_nothing_of_the_prefix_that_it_is_for(self, host):
        host.write(*range(NUM_ROWS))
        assert host.borrow(2) == []
        rows = host.borrow(1, spared=[key(i) for i in range(NUM_ROWS - 1)])
        assert host.has(*range(NUM_ROWS)) == [True] * (NUM_ROWS - 1) + [False]
        assert host.borrow(1) == []
        host.give_back(rows)

    def test_evicts_nothing_where_it_may_not(self, host):
        host.write(*range(NUM_ROWS))
        assert host.borrow(1, may_evict=False) == []
        assert all(host.has(*range(NUM_ROWS)))

    def test_is_refused_a_reset(self, host):
        rows = host.borrow(1)
        with pytest.raises(AssertionError, match="1 rows are being read into"):
            host.reset_cache()
        host.give_back(rows)

    @pytest.mark.parametrize(("policy", "module"), POLICIES)
    def test_ends_as_if_its_chunks_had_been_written(self, make, policy, module):
        read, written = make(policy, module), make(policy, module)
        for host in (read, written):
            host.write(1, 2)
        read.give_back(read.borrow(3), 3, 4, 5)
        written.write(3, 4, 5)
        for host in (read, written):
            host.on_request_finished(host.req)
            host.req = ReqContext("next")
            host.write(6, 7, 8)
        for left in range(NUM_ROWS - 1, 0, -1):
            for host in (read, written):
                host.set_limit(left)
            assert read.has(*range(1, 9)) == written.has(*range(1, 9))
        assert read.get_stats()._values == written.get_stats()._values


@pytest.mark.parametrize("seed", range(20))
def test_no_row_is_lost_or_used_twice_whatever_happens(make, seed):
    rng = random.Random(seed)
    host = make(*rng.choice(POLICIES))
    writing, reading = [], []
    for step in range(200):
        action = rng.randrange(8)
        if action == 0:
            host.set_limit(rng.randrange(NUM_ROWS + 2))
        elif action == 1 and host.begin_write(step) is not None:
            writing.append(key(step))
        elif action == 2 and writing:
            host.complete_store([writing.pop()], host.req, rng.random() < 0.8)
        elif action == 3 and (ready := [i for i in range(step) if host.has(i) == [True]]):
            chosen = key(rng.choice(ready))
            host.prepare_load([chosen], host.req)
            reading.append(chosen)
        elif action == 4 and reading:
            host.complete_load([reading.pop()], host.req)
        elif action == 5:
            host.borrow(rng.randrange(4), may_evict=rng.random() < 0.5)
        elif action == 6 and host.on_loan:
            host.give_back(rng.choice(host.on_loan), *rng.sample(range(step + 1), rng.randrange(4)))
        else:
            host.settle()
        host.check()
    for rows in list(host.on_loan):
        host.give_back(rows)
    for chosen in reading:
        host.complete_load([chosen], host.req)
    host.complete_store(writing, host.req)
    host.settle()
    assert len(host.rows_in_use()) <= host.limit
