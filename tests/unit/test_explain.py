"""Each reason why a request found nothing, told by a real connector to a request that asked."""

from __future__ import annotations

import time

import pytest
from vllm.platforms import current_platform
from vllm.v1.request import RequestStatus

from lmcache_ext.errors import StoreUnavailable
from lmcache_ext.offload.explain import ANSWER, ASK, ENABLED, TEXTS
from lmcache_ext.offload.recent import Recent
from tests.unit.connector_engine import PAGE
from tests.unit.test_connector import PROMPT, Engine, vllm_config  # noqa: F401  a fixture
from tests.unit.test_tier import key

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the copier of hosts without a GPU")

ROW_BYTES = 4 * PAGE  # two blocks of two layers
BLOCKS = [1, 2, 3, 4, 5, 6, 7]


class Told(Engine):
    """An engine that explains."""

    def ask(self, tokens=PROMPT, req_id="asking", **attributes):
        """What a request is told that was looked up and is over."""
        request = self.request(req_id, tokens, **attributes)
        request.kv_transfer_params = {**(request.kv_transfer_params or {}), ASK: True}
        self.match(request)
        return self.end(request)

    def end(self, request):
        request.status = RequestStatus.FINISHED_STOPPED
        later, params = self.scheduler.request_finished_all_groups(request, ([],))
        assert not later
        self.step(finished={request.request_id})
        return None if params is None else params[ANSWER]


@pytest.fixture
def make(vllm_config, tmp_path):  # noqa: F811
    made = []

    def build(enabled=True, **settings):
        made.append(Told(vllm_config, tmp_path / "disk", connector={ENABLED: enabled}, **settings))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def limited(make, rows):
    """An engine without a disk, where a tenant may hold so many rows of host memory."""
    quotas = {"*": {"host": f"{rows * ROW_BYTES}B", "name": "everybody"}}
    return make(local_disk=None, extra_config={"quotas": quotas})


@pytest.fixture
def warm(make):
    engine = make()
    engine.compute("first", BLOCKS)
    return engine


class TestReason:
    def test_all_that_can_be_is_found(self, warm):
        told = warm.ask()
        assert (told["reason"], told["cache_tokens"], told["prompt_tokens"]) == ("all", 96, 100)

    def test_prompt_without_a_whole_chunk(self, warm):
        told = warm.ask(PROMPT[:32])
        assert told["reason"] == "short"
        assert "32 tokens" in told["text"]

    def test_prompt_that_differs_somewhere(self, warm):
        told = warm.ask(PROMPT[:70] + [1] * 30)
        assert (told["reason"], told["first_missing_token"]) == ("differs", 64)
        assert told["tiers"] == {"host": "miss", "disk": "miss"}

    def test_prompt_that_differs_at_once(self, warm):
        assert warm.ask([1] * 100)["reason"] == "new"

    def test_salt_of_a_prompt_that_was_stored_without(self, warm):
        told = warm.ask(cache_salt="tenant")
        assert (told["reason"], told["salted"]) == ("apart", True)
        assert "under this cache_salt" in told["text"]

    def test_salt_of_a_prompt_that_was_stored_under_another(self, make):
        engine = make()
        engine.match(engine.request("salted", cache_salt="tenant"))
        assert engine.ask(cache_salt="another")["reason"] == "apart"

    def test_lack_of_the_salt_that_a_prompt_was_stored_under(self, make):
        engine = make()
        engine.match(engine.request("salted", cache_salt="tenant"))
        told = engine.ask()
        assert (told["reason"], told["salted"]) == ("apart", False)
        assert "without a cache_salt or adapter, and its tokens came before" in told["text"]

    def test_salt_of_a_prompt_that_never_came(self, warm):
        assert warm.ask([1] * 100, cache_salt="tenant")["reason"] == "new"

    def test_chunks_that_were_there(self, warm, tmp_path):
        warm.scheduler.reset_cache()
        for file in (tmp_path / "disk").glob("*/*/*.kv"):
            file.unlink()
        told = warm.ask()
        assert (told["reason"], told["first_missing_token"]) == ("evicted", 0)

    @pytest.mark.parametrize(("rows", "first"), [(0, 0), (1, 32)])
    def test_chunks_that_a_quota_did_not_let_in(self, make, rows, first):
        engine = limited(make, rows)
        engine.compute("first", BLOCKS)
        told = engine.ask()
        assert (told["reason"], told["first_missing_token"]) == ("over quota", first)
        assert (told["tenant"], told["quota_chunks"], told["quota_bytes"]) == ("everybody", rows, rows * ROW_BYTES)
        assert f"the quota of everybody in host memory holds {rows} chunks of 32 tokens" in told["text"]

    def test_chunks_that_made_way_for_newer_ones_of_the_same_tenant(self, make):
        engine = limited(make, 3)
        engine.compute("first", BLOCKS)
        engine.compute("second", BLOCKS, [7] * 100)
        assert engine.ask()["reason"] == "over quota"
        assert engine.ask([7] * 100)["reason"] == "all"

    def test_chunks_that_a_quota_has_cost_once_and_that_were_lost_otherwise_since(self, make):
        engine = limited(make, 3)
        engine.compute("first", BLOCKS)
        engine.compute("second", BLOCKS, [7] * 100)
        engine.compute("first again", BLOCKS)
        engine.scheduler.reset_cache()
        assert engine.ask()["reason"] == "evicted"

    def test_fewer_tokens_than_are_worth_it(self, make, warm):
        told = make(min_retrieve_tokens=97).ask()
        assert (told["reason"], told["cache_tokens"], told["min_retrieve_tokens"]) == ("too few", 96, 97)

    def test_bypass(self, make):
        assert make(bypass=True).ask()["reason"] == "bypass"

    def test_freeze(self, make):
        assert make(freeze=True).ask()["reason"] == "frozen"

    def test_cache_that_is_off(self, warm):
        warm.scheduler._hooks.off = True
        request = warm.request("asking")
        request.kv_transfer_params = {ASK: True}
        assert warm.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        assert warm.scheduler.request_finished_all_groups(request, ([],))[1][ANSWER]["reason"] == "off"

    def test_store_that_is_off(self, warm, monkeypatch):
        (tier,) = warm.scheduler.scheduler.manager.secondary_tiers
        warm.scheduler.reset_cache()

        def fail(*_):
            raise StoreUnavailable("gone")

        monkeypatch.setattr(tier.store._store, "exists", fail)
        for i in range(5):
            tier.store.exists([bytes([i]) * 17])
        told = warm.ask()
        assert (told["reason"], told["tiers"]["disk"]) == ("tier off", "off")
        assert "circuit breaker of disk" in told["text"]

    def test_store_that_did_not_answer_in_time(self, make, warm, monkeypatch):
        engine = make(lookup_timeout_ms=1)
        (tier,) = engine.scheduler.scheduler.manager.secondary_tiers
        monkeypatch.setattr(tier._backing.lookups, "flush", lambda: None)  # what is asked for never leaves
        request = engine.request("asking")
        request.kv_transfer_params = {ASK: True}
        deadline = time.monotonic() + 10.0
        while engine.scheduler.get_num_new_matched_tokens(request, 0)[0] is None and time.monotonic() < deadline:
            engine.step()
        monkeypatch.undo()
        told = engine.end(request)
        assert (told["reason"], told["tiers"]["disk"]) == ("slow", "slow")

    def test_of_every_kind_has_a_text(self):
        facts = {"prompt_tokens": 1, "chunk_tokens": 2, "gpu_tokens": 3, "cache_tokens": 4, "min_retrieve_tokens": 5}
        facts |= {"tenant": "team", "quota_chunks": 7}
        for text in TEXTS.values():
            assert text.format(first_missing_token=6, names="disk", marks="cache_salt", **facts)


class TestServer:
    def test_says_what_its_namespace_is_made_of(self, warm):
        told = warm.ask()
        assert len(told["namespace"]) == 32
        assert {"model", "weights", "kv_dtype", "hash", "chunk", "parallel"} <= told["components"].keys()
        assert told["components"]["chunk"].startswith("blocks=2 row=")
        assert '"num_hidden_layers"' in told["components"]["model"]  # whole, so that two can be compared key by key
        assert all(len(text) <= 16_384 for text in told["components"].values())


class TestSilence:
    def test_towards_who_did_not_ask(self, warm):
        request = warm.request("silent")
        warm.match(request)
        assert warm.end(request) is None

    def test_where_nobody_may_ask(self, make):
        engine = make(enabled=False)
        assert engine.ask() is None
        assert engine.scheduler.scheduler.manager.stored is None

    def test_of_requests_that_are_gone(self, warm):
        warm.ask()
        assert warm.scheduler._explainer._told == {}


def test_the_oldest_keys_are_forgotten_first():
    recent = Recent(max_keys=2)
    recent.add([key(1), key(2)])
    recent.add([key(1), key(3)])
    assert [key(i) in recent for i in (1, 2, 3)] == [True, False, True]
