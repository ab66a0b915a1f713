"""Quotas in host memory: a tenant's own chunks make room for it, and nobody else's. Real rows, every policy."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.kv_offload.base import LookupResult, ReqContext

from lmcache_ext.config_quotas import OTHERS, UNSALTED, Quota, tenant_of_salt
from lmcache_ext.offload import metrics
from lmcache_ext.offload.tenants import TENANT_PARAM
from tests.unit.test_host import NUM_ROWS, POLICIES, ROW_BYTES, Host, build_host, make  # noqa: F401  a fixture
from tests.unit.test_tier import key

NUMBERS = itertools.count(1000)


class Tenant:
    """Requests of one tenant; each of its prompts is a sequence of chunks."""

    def __init__(self, host: Host, name: str | None) -> None:
        self.host = host
        self.id = tenant_of_salt(name)
        self.params = {TENANT_PARAM: self.id} if name else None

    def request(self) -> ReqContext:
        return ReqContext(f"r{next(NUMBERS)}", self.params)

    def begin(self, *ids, req=None):
        """Store chunks that were computed, but for the copying; returns what was taken, or None."""
        req = req or self.request()
        for i in ids:
            req.set_offload_key_position(key(i), i)
        output = self.host.prepare_store([key(i) for i in ids], req)
        return None if output is None else [int.from_bytes(k[:-4], "big") for k in output.keys_to_store]

    def write(self, *ids, req=None):
        req = req or self.request()
        taken = self.begin(*ids, req=req)
        self.host.complete_store([key(i) for i in taken or ()], req)
        self.host.on_request_finished(req)
        return taken

    def use(self, *ids):
        """A hit on these chunks."""
        req = self.request()
        self.host.prepare_load([key(i) for i in ids], req)
        self.host.complete_load([key(i) for i in ids], req)
        self.host.on_request_finished(req)

    def has(self, *ids):
        return [i for i in ids if self.host.lookup(key(i), self.request()) is LookupResult.HIT]

    @property
    def held(self):
        return self.host.tenants.num_held(self.id)


def quota(name: str, rows: int, *, label: str | None = None) -> Quota:
    tenant = name if name in (OTHERS, UNSALTED) else tenant_of_salt(name)
    return Quota(tenant, label or name, rows * ROW_BYTES)


@pytest.fixture
def host(make):  # noqa: F811
    return make()


@pytest.fixture
def noisy(host):
    return Tenant(host, "noisy")


@pytest.fixture
def quiet(host):
    return Tenant(host, "quiet")


class TestFull:
    def test_makes_room_with_its_own_oldest_and_leaves_others_alone(self, host, noisy, quiet):
        host.set_quotas((quota("noisy", 3),))
        quiet.write(1, 2)
        noisy.write(11, 12, 13)
        assert noisy.write(14, 15) == [14, 15]
        assert noisy.held == 3
        assert len(noisy.has(11, 12, 13)) == 1
        assert quiet.has(1, 2) == [1, 2]

    @pytest.mark.parametrize(("policy", "module"), POLICIES)
    def test_never_holds_more_whatever_the_policy(self, make, policy, module):  # noqa: F811
        host = make(policy, module)
        noisy, quiet = Tenant(host, "noisy"), Tenant(host, "quiet")
        host.set_quotas((quota("noisy", 3),))
        quiet.write(1, 2, 3)
        for i in range(20, 60):
            noisy.write(i)
            assert noisy.held <= 3
            host.check()
        assert quiet.has(1, 2, 3) == [1, 2, 3]

    @pytest.mark.parametrize(("policy", "module"), [POLICIES[0], POLICIES[1], POLICIES[2]])
    def test_keeps_what_it_used_last(self, make, policy, module):  # noqa: F811
        host = make(policy, module)
        noisy = Tenant(host, "noisy")
        host.set_quotas((quota("noisy", 3),))
        for i in (11, 12, 13):
            noisy.write(i)
        noisy.use(11)
        noisy.write(14)
        assert noisy.has(11, 12, 13, 14) == [11, 13, 14]

    def test_keeps_the_head_of_a_prompt_that_is_longer_than_it(self, host, noisy):
        host.set_quotas((quota("noisy", 3),))
        req = noisy.request()
        assert noisy.begin(11, 12, req=req) == [11, 12]
        host.complete_store([key(11), key(12)], req)
        assert noisy.write(13, 14, 15, req=req) == [13]  # the next step of a chunked prefill
        assert noisy.has(11, 12, 13, 14, 15) == [11, 12, 13]

    def test_takes_the_head_first_in_whatever_order_it_is_offered(self, host, noisy):
        host.set_quotas((quota("noisy", 2),))
        assert noisy.write(13, 11, 14, 12) == [11, 12]

    def test_takes_nothing_of_a_pinned_row(self, host, noisy, quiet):
        host.set_quotas((quota("noisy", 2),))
        noisy.write(11, 12)
        req = noisy.request()
        host.prepare_load([key(11), key(12)], req)
        assert noisy.write(13) == []
        host.complete_load([key(11), key(12)], req)
        assert noisy.write(13) == [13]
        assert noisy.held == 2

    def test_counts_rows_that_are_being_written(self, host, noisy):
        host.set_quotas((quota("noisy", 2),))
        first = noisy.request()
        assert noisy.begin(11, 12, req=first) == [11, 12]
        assert noisy.begin(13) == []
        host.complete_store([key(11), key(12)], first, success=False)
        assert noisy.held == 0
        assert noisy.write(13) == [13]

    def test_refuses_the_promotion_of_a_chunk_that_it_may_not_hold(self, host, noisy):
        host.set_quotas((quota("noisy", 0),))
        assert host.take_in([key(11)], noisy.request()) == ([], [])
        host.set_quotas((quota("noisy", 1),))
        assert host.take_in([key(11)], noisy.request())[0] == [key(11)]
        host.complete_write([key(11)], noisy.request())

    def test_of_nothing_keeps_nothing(self, host, noisy, quiet):
        host.set_quotas((quota("noisy", 0),))
        assert noisy.write(11, 12) == []
        assert quiet.write(1, 2) == [1, 2]

    def test_tells_whoever_listens(self, make):  # noqa: F811
        host = make(enable_events=True)
        noisy = Tenant(host, "noisy")
        host.set_quotas((quota("noisy", 1),))
        noisy.write(11)
        list(host.take_events())
        noisy.begin(12)
        (event,) = host.take_events()
        assert (event.removed, event.keys) == (True, [key(11)])


class TestWhoIsMeant:
    def test_others_are_limited_each_for_itself(self, host, noisy, quiet):
        host.set_quotas((quota("*", 2),))
        assert noisy.write(11, 12, 13) == [11, 12]
        assert quiet.write(1, 2, 3) == [1, 2]

    def test_a_name_goes_before_the_others(self, host, noisy, quiet):
        host.set_quotas((quota("*", 2), quota("quiet", 4)))
        assert len(noisy.write(11, 12, 13)) == 2
        assert len(quiet.write(1, 2, 3, 4, 5)) == 4

    def test_who_is_not_named_is_not_limited(self, host, quiet):
        host.set_quotas((quota("noisy", 1),))
        assert len(quiet.write(*range(NUM_ROWS))) == NUM_ROWS

    def test_requests_without_a_salt_are_one_tenant(self, host, noisy):
        anonymous = Tenant(host, None)
        host.set_quotas((quota("unsalted", 2),))
        assert anonymous.write(1) == [1]
        assert anonymous.write(2, 3, 4) == [2, 3]
        assert anonymous.held == 2
        assert len(noisy.write(11, 12, 13)) == 3

    def test_and_without_a_line_of_their_own_one_of_the_others(self, host):
        host.set_quotas((quota("*", 2),))
        assert Tenant(host, None).write(1, 2, 3) == [1, 2]


class TestChange:
    @pytest.mark.parametrize("salt", ["noisy", None])
    def test_to_less_evicts_at_once_even_what_was_stored_before_there_were_quotas(self, host, quiet, salt):
        noisy = Tenant(host, salt)
        noisy.write(11, 12, 13, 14)
        quiet.write(1, 2)
        name = salt or "unsalted"
        host.set_quotas((quota(name, 3),))
        assert (noisy.held, len(noisy.has(11, 12, 13, 14))) == (3, 3)
        host.set_quotas((quota(name, 1),))
        assert (noisy.held, len(noisy.has(11, 12, 13, 14))) == (1, 1)
        assert quiet.has(1, 2) == [1, 2]

    def test_to_less_waits_for_pinned_rows(self, host, noisy):
        noisy.write(11, 12, 13)
        req = noisy.request()
        host.prepare_load([key(11), key(12), key(13)], req)
        host.set_quotas((quota("noisy", 1),))
        assert noisy.held == 3
        host.complete_load([key(11), key(12), key(13)], req)
        host.settle()
        assert noisy.held == 1
        assert not host.tenants.over

    def test_to_more_lets_more_in(self, host, noisy):
        host.set_quotas((quota("noisy", 1),))
        noisy.write(11, 12)
        host.set_quotas((quota("noisy", 3),))
        assert noisy.write(13, 14) == [13, 14]
        assert noisy.held == 3

    def test_to_none_lets_everything_in(self, host, noisy):
        host.set_quotas((quota("noisy", 1), quota("unsalted", 1)))
        Tenant(host, None).write(1)
        host.set_quotas(())
        assert len(noisy.write(*range(11, 17))) == 6
        assert host.tenants.num_held(UNSALTED) == 0  # nobody asks

    def test_of_the_capacity_and_of_quotas_together(self, host, noisy, quiet):
        noisy.write(11, 12, 13, 14)
        quiet.write(1, 2)
        host.set_limit(4)
        host.set_quotas((quota("noisy", 1),))
        host.check()
        assert noisy.held + quiet.held <= 4
        host.set_limit(NUM_ROWS)
        assert len(quiet.write(*range(30, 36))) == 6

    def test_that_leaves_less_than_a_row_says_so(self, host, caplog):
        host.set_quotas((Quota(tenant_of_salt("noisy"), "team-a", ROW_BYTES - 1),))
        assert "team-a" in caplog.text
        assert f"holds no chunk, which takes {ROW_BYTES} bytes" in caplog.text


def test_a_reset_charges_nobody(host, noisy):
    host.set_quotas((quota("noisy", 2),))
    noisy.write(11, 12)
    host.reset_cache()
    assert noisy.held == 0
    assert noisy.write(13, 14) == [13, 14]


def test_an_engine_without_quotas_and_salts_counts_nothing(host):
    Tenant(host, None).write(*range(NUM_ROWS))
    assert not host.tenants._owners
    assert not any("tenant" in name for name in host.get_stats()._values)


class TestMetrics:
    def counted(self, host, name):
        return host.get_stats()._values.get(name, {})

    def test_say_what_is_held_and_may_be(self, host, noisy, quiet):
        host.set_quotas((quota("noisy", 3, label="team-a"), quota("*", 2)))
        noisy.write(11, 12)
        quiet.write(1)
        Tenant(host, None).write(5, 6)
        assert self.counted(host, metrics.TENANT_QUOTA_BYTES) == {
            ("host", "team-a"): 3 * ROW_BYTES,
            ("host", "*"): 2 * ROW_BYTES,
        }
        assert self.counted(host, metrics.TENANT_CHARGED_BYTES) == {
            ("host", "team-a"): 2 * ROW_BYTES,
            ("host", "*"): 3 * ROW_BYTES,
        }

    def test_count_evictions_and_rejections_once(self, host, noisy):
        host.set_quotas((quota("noisy", 2),))
        noisy.write(11, 12)
        noisy.write(13, 14, 15)
        stats = host.get_stats()._values
        assert stats[metrics.TENANT_EVICTED_CHUNKS] == {("host", "noisy"): 2}
        assert stats[metrics.TENANT_REJECTED_CHUNKS] == {("host", "noisy"): 1}
        assert self.counted(host, metrics.TENANT_REJECTED_CHUNKS) == {}

    def test_tell_that_a_quota_is_gone(self, host):
        host.set_quotas((quota("noisy", 2),))
        host.set_quotas(())
        assert self.counted(host, metrics.TENANT_QUOTA_BYTES) == {("host", "noisy"): float("inf")}
        assert self.counted(host, metrics.TENANT_QUOTA_BYTES) == {}


class Sharing(RuleBasedStateMachine):
    """Three tenants, quotas and a capacity that change, transfers that begin, end and fail in any order."""

    @initialize(policy=st.sampled_from(POLICIES))
    def start(self, policy):
        self.host = build_host(*policy)
        self.tenants = [Tenant(self.host, name) for name in ("a", "b", None)]
        self.writing, self.reading, self.ids = [], [], itertools.count(1)
        self.stored = {0: [], 1: [], 2: []}

    @rule(who=st.integers(0, 2), num=st.integers(1, 4))
    def begin_write(self, who, num):
        tenant = self.tenants[who]
        req, ids = tenant.request(), [next(self.ids) for _ in range(num)]
        self.host.settle()
        others = self.ready(exclude=who)
        free = self.host._get_num_free_chunks()
        taken = tenant.begin(*ids, req=req)
        if taken:
            self.writing.append((who, req, taken))
            self.stored[who] += taken
        if len(taken or ()) <= free:  # there was room: then nobody else has lost anything
            assert self.ready(exclude=who) == others

    @precondition(lambda self: self.writing)
    @rule(success=st.booleans(), data=st.data())
    def end_write(self, success, data):
        _, req, ids = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        self.host.complete_store([key(i) for i in ids], req, success)

    @rule(who=st.integers(0, 2), data=st.data())
    def begin_read(self, who, data):
        tenant = self.tenants[who]
        ready = tenant.has(*self.stored[who])
        if ready:
            i, req = data.draw(st.sampled_from(ready)), tenant.request()
            self.host.prepare_load([key(i)], req)
            self.reading.append((req, i))

    @precondition(lambda self: self.reading)
    @rule()
    def end_read(self):
        req, i = self.reading.pop()
        self.host.complete_load([key(i)], req)
        self.host.on_request_finished(req)

    @rule(rows=st.tuples(*[st.none() | st.integers(0, NUM_ROWS)] * 4))
    def change_quotas(self, rows):
        found = zip(("a", "b", UNSALTED, OTHERS), rows, strict=True)
        self.host.set_quotas(tuple(quota(name, num) for name, num in found if num is not None))

    @rule(rows=st.integers(1, NUM_ROWS))
    def change_capacity(self, rows):
        self.host.set_limit(rows)

    @rule()
    def settle(self):
        self.host.settle()
        for tenant in self.tenants:
            chunks = [self.host._policy.get(k) for k in self.host.tenants.held(tenant.id)]
            assert not self.host.tenants.excess(tenant.id) or all(chunk.ref_cnt != 0 for chunk in chunks)

    @invariant()
    def every_row_is_in_one_place_and_what_is_pinned_is_there(self):
        if not hasattr(self, "host"):
            return
        self.host.check()
        for _, i in self.reading:
            assert self.host._policy.get(key(i)).ref_cnt > 0
        for _, _, ids in self.writing:
            assert all(self.host._policy.get(key(i)) is not None for i in ids)

    @invariant()
    def nobody_holds_more_than_its_quota_unless_it_waits_for_the_next_step(self):
        for tenant in getattr(self, "tenants", ()):
            assert not self.host.tenants.excess(tenant.id) or tenant.id in self.host.tenants.over

    def ready(self, *, exclude):
        return {who: tenant.has(*self.stored[who]) for who, tenant in enumerate(self.tenants) if who != exclude}

    def teardown(self):
        if not hasattr(self, "host"):
            return
        while self.reading:
            self.end_read()
        for _, req, ids in self.writing:
            self.host.complete_store([key(i) for i in ids], req)
        self.host.settle()
        for tenant in self.tenants:
            limit = self.host.tenants.limit(tenant.id)
            assert limit is None or tenant.held <= limit
        self.host.check()
        self.host.shutdown()


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
