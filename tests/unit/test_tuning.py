"""A changed file reaches both halves of the connector between two steps, whatever is under way."""

from __future__ import annotations

import itertools
import logging

import pytest
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.request import RequestStatus

from lmcache_ext.config_quotas import tenant_of_salt
from lmcache_ext.offload import metrics
from lmcache_ext.offload.tenants import TENANT_PARAM
from lmcache_ext.reload import INTERVAL_S
from tests.unit.connector_engine import BLOCK, CHUNK, PROMPT, WAIT_S, Engine, output_of
from tests.unit.test_connector import vllm_config  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the copier of hosts without a GPU")

BLOCKS = [1, 2, 3, 4, 5, 6, 7]
NUMBERS = itertools.count(1000)
OTHERS = [10, 11, 12, 13, 14, 15, 16]


class Tuned(Engine):
    """An engine whose file is looked at when the test says so."""

    def __init__(self, vllm_config, directory, path):  # noqa: F811
        super().__init__(vllm_config, directory / "disk")
        self.path = path
        self.cancelled: set[str] = set()
        self.watchers = (self.scheduler._tuning._watcher, self.worker._reload)
        for watcher in self.watchers:
            watcher.close()
            self._look(watcher)

    def _look(self, watcher):
        while watcher.look() != INTERVAL_S:
            pass

    def write(self, text):
        """A new file, seen by both halves and not yet applied."""
        self.path.write_text(text)
        for watcher in self.watchers:
            self._look(watcher)

    @property
    def host(self):
        return self.scheduler.scheduler.manager.host

    @property
    def row_bytes(self):
        return self.host.row_bytes

    def first_key(self, salt):
        """The key of the first chunk of the usual prompt, as its tenant has it."""
        hashes = self.request(f"key of {salt}", cache_salt=salt).block_hashes
        return make_offload_key(hashes[CHUNK // BLOCK - 1], 0)

    def cancel(self, request):
        request.status = RequestStatus.FINISHED_ABORTED
        self.scheduler.request_finished_all_groups(request, ([],))
        self.cancelled.add(request.request_id)

    def settle_down(self):
        """Steps until nothing is under way."""
        self.step(finished=self.cancelled)
        self.cancelled = set()
        for _ in range(20):
            if not self.scheduler.has_pending_push_work():
                return
            self.step()
            assert self.scheduler.scheduler.manager.secondary_tiers[0]._pool.drain(WAIT_S)
        raise AssertionError("work never ends")

    def tune(self, text):
        """A new file, applied by the next step."""
        self.write(text)
        self.step()


@pytest.fixture
def engine(vllm_config, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "lmcache_config.yaml"
    path.write_text("min_retrieve_tokens: 0\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(path))
    engine = Tuned(vllm_config, tmp_path, path)
    yield engine
    engine.close()
    logging.getLogger("vllm.lmcache_ext").setLevel(logging.NOTSET)


class TestFreeze:
    def test_finds_and_loads_what_is_there_and_stores_nothing_new(self, engine):
        engine.compute("first", BLOCKS)
        engine.tune("freeze: true\n")
        assert engine.begin_load(engine.request("again"), OTHERS) == 96
        assert engine.step().finished_recving == {"again"}
        before = engine.scheduler.scheduler.manager.primary_tier._get_num_free_chunks()
        engine.compute("other", BLOCKS, [7] * 100)
        assert engine.scheduler.scheduler.manager.primary_tier._get_num_free_chunks() == before
        assert engine.match(engine.request("other again", [7] * 100)) == 0

    def test_finds_what_only_the_disk_has(self, engine):
        engine.compute("first", BLOCKS)
        engine.scheduler.reset_cache()
        engine.tune("freeze: true\n")
        assert engine.begin_load(engine.request("again"), OTHERS) == 96

    def test_ends_and_what_comes_then_is_stored(self, engine):
        engine.tune("freeze: true\n")
        engine.compute("first", BLOCKS)
        engine.tune("freeze: false\n")
        engine.compute("second", BLOCKS)
        assert engine.match(engine.request("again")) == 96

    def test_lets_a_store_that_has_begun_finish(self, engine):
        request = engine.request("first")
        assert engine.begin_load(request, []) == 0
        engine.write("freeze: true\n")  # applied at the end of the step that plans the store
        engine.step((request, BLOCKS))
        engine.finish(request)
        engine.step()
        assert engine.match(engine.request("again")) == 96
        assert not engine.jobs


class TestSkipSave:
    @pytest.mark.parametrize("value", [True, "true", 1])
    def test_of_a_request_stores_nothing_of_it(self, engine, value):
        engine.compute("secret", BLOCKS, params={"lmcache.skip_save": value})
        assert engine.match(engine.request("secret again")) == 0
        engine.compute("plain", BLOCKS)
        assert engine.match(engine.request("plain again")) == 96

    @pytest.mark.parametrize("value", [False, "false", None])
    def test_that_is_off_changes_nothing(self, engine, value):
        engine.compute("plain", BLOCKS, params={"lmcache.skip_save": value})
        assert engine.match(engine.request("again")) == 96

    def test_of_a_request_finds_what_others_stored(self, engine):
        engine.compute("plain", BLOCKS)
        assert engine.begin_load(engine.request("secret", params={"lmcache.skip_save": True}), OTHERS) == 96


class TestBypass:
    def test_neither_looks_up_nor_stores(self, engine):
        engine.compute("first", BLOCKS)
        engine.tune("bypass: true\n")
        assert engine.match(engine.request("again")) == 0
        engine.compute("other", BLOCKS, [7] * 100)
        engine.tune("bypass: false\n")
        assert engine.match(engine.request("other again", [7] * 100)) == 0
        assert engine.match(engine.request("again, later")) == 96

    def test_catches_a_request_that_is_being_looked_up(self, engine):
        engine.compute("first", BLOCKS)
        engine.scheduler.reset_cache()
        request = engine.request("again")
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
        engine.tune("bypass: true\n")
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        engine.step((request, OTHERS))
        engine.finish(request)
        assert engine.pinned() == 0

    def test_counts_no_lookup(self, engine):
        engine.tune("bypass: true\n")
        engine.match(engine.request("first"))
        assert engine.counted(metrics.LOOKUP_REQUESTS) == {}


class TestQuotas:
    """A prompt has three chunks, and a fourth begins."""

    def salted(self, engine, req_id, salt, tokens):
        request = engine.request(req_id, tokens, cache_salt=salt)
        assert engine.begin_load(request, []) == 0
        engine.step((request, BLOCKS))
        engine.finish(request)
        engine.settle_down()

    def again(self, engine, req_id, salt, tokens):
        request = engine.request(req_id, tokens, cache_salt=salt)
        return engine.match(request)

    def flood(self, engine, salt, prompts=8):
        """Prompts that nobody has sent before."""
        for _ in range(prompts):
            i = next(NUMBERS)
            self.salted(engine, f"flood {i}", salt, [i] * 100)

    def held(self, engine, salt):
        return engine.host.tenants.num_held(tenant_of_salt(salt))

    def test_a_flood_by_one_tenant_leaves_the_prefix_of_another(self, engine):
        engine.tune(f"extra_config: {{quotas: {{noisy: {6 * engine.row_bytes}B}}}}\n")
        self.salted(engine, "first", "quiet", PROMPT)
        before = engine.host._policy.get(engine.first_key("quiet"))
        self.flood(engine, "noisy", prompts=60)  # of 180 chunks, where host memory has 64
        assert self.held(engine, "noisy") == 6
        assert engine.host._policy.get(engine.first_key("quiet")) is before
        assert self.again(engine, "again", "quiet", PROMPT) == 96
        assert engine.pinned() == 0

    def test_a_quota_that_is_set_and_lowered_evicts_what_is_there(self, engine):
        self.flood(engine, "noisy")
        self.flood(engine, "quiet")
        assert (self.held(engine, "noisy"), self.held(engine, "quiet")) == (24, 24)
        engine.tune(f"extra_config: {{quotas: {{noisy: {9 * engine.row_bytes}B}}}}\n")
        assert (self.held(engine, "noisy"), self.held(engine, "quiet")) == (9, 24)
        engine.tune("extra_config: {quotas: {noisy: 0}}\n")
        assert (self.held(engine, "noisy"), self.held(engine, "quiet")) == (0, 24)

    def test_a_quota_that_is_raised_or_gone_lets_more_in(self, engine):
        engine.tune("extra_config: {quotas: {noisy: 0}}\n")
        self.flood(engine, "noisy", prompts=2)
        assert self.held(engine, "noisy") == 0
        engine.tune(f"extra_config: {{quotas: {{noisy: {3 * engine.row_bytes}B}}}}\n")
        self.flood(engine, "noisy", prompts=2)
        assert self.held(engine, "noisy") == 3
        engine.tune("min_retrieve_tokens: 0\n")
        self.flood(engine, "noisy", prompts=4)
        assert self.held(engine, "noisy") == 15

    def test_one_that_is_not_valid_keeps_the_old_and_says_where_without_the_salt(self, engine, caplog):
        engine.tune("extra_config:\n  quotas: {noisy: 0}\n")
        engine.tune("extra_config:\n  quotas: {noisy: many}\n")
        self.flood(engine, "noisy", prompts=1)
        assert self.held(engine, "noisy") == 0
        assert f"{engine.path}:2: extra_config.quotas: " in caplog.text
        assert "has 'many', which is not a size" in caplog.text
        assert "noisy" not in caplog.text

    def test_a_client_cannot_say_whose_its_request_is(self, engine):
        engine.tune("extra_config: {quotas: {noisy: 0}}\n")
        request = engine.request("liar", cache_salt="noisy")
        request.kv_transfer_params = {TENANT_PARAM: "another"}
        engine.scheduler.on_new_request(request)
        assert request.kv_transfer_params[TENANT_PARAM] == tenant_of_salt("noisy")
        plain = engine.request("plain")
        plain.kv_transfer_params = {TENANT_PARAM: "another"}
        engine.scheduler.on_new_request(plain)
        assert TENANT_PARAM not in plain.kv_transfer_params

    def test_many_requests_at_once_of_which_half_are_cancelled_leave_no_row_pinned(self, engine):
        engine.tune(f"extra_config: {{quotas: {{a: {4 * engine.row_bytes}B, '*': {5 * engine.row_bytes}B}}}}\n")
        requests = []
        for i in range(64):
            request = engine.request(f"r{i}", [i % 9 + 1] * 100, cache_salt="abc"[i % 3])
            engine.match(request)
            requests.append(request)
            output = engine.scheduler.build_connector_meta(output_of(request, BLOCKS))
            if i % 2:  # gone before its copy is over
                engine.cancel(request)
            engine.run_worker(output)
        for request in requests[::2]:
            engine.finish(request)
        engine.settle_down()
        assert engine.pinned() == 0
        assert not engine.jobs
        assert [self.held(engine, salt) for salt in "abc"] == [4, 5, 5]


def test_least_tokens_worth_loading_follow_the_file(engine):
    engine.compute("first", BLOCKS)
    engine.tune("min_retrieve_tokens: 97\n")
    assert engine.match(engine.request("again")) == 0
    engine.tune("min_retrieve_tokens: 96\n")
    assert engine.match(engine.request("once more")) == 96


def test_generated_tokens_are_kept_from_the_next_step_on(engine):
    assert engine.scheduler.scheduler.config.offload_prompt_only
    engine.tune("save_decode_cache: true\n")
    assert not engine.scheduler.scheduler.config.offload_prompt_only
    engine.tune("save_decode_cache: false\n")
    assert engine.scheduler.scheduler.config.offload_prompt_only


def test_log_level_follows_the_file_in_the_worker_too(engine):
    engine.scheduler._tuning.close()
    engine.path.write_text("log_level: ERROR\n")
    engine._look(engine.worker._reload)
    assert logging.getLogger("vllm.lmcache_ext").level == logging.ERROR
    engine.path.write_text("min_retrieve_tokens: 0\n")
    engine._look(engine.worker._reload)
    assert logging.getLogger("vllm.lmcache_ext").level == logging.NOTSET


def test_an_engine_without_steps_applies_a_change_before_it_looks_the_next_request_up(engine):
    engine.compute("first", BLOCKS)
    engine.write("bypass: true\n")
    assert engine.match(engine.request("again")) == 0


def test_statistics_carry_what_became_of_each_file(engine):
    engine.counted(metrics.CONFIG_GENERATION)
    engine.tune("freeze: true\n")
    stats = engine.scheduler.get_kv_connector_stats()._values
    assert stats[metrics.CONFIG_RELOADS] == {("applied",): 1}
    assert stats[metrics.CONFIG_GENERATION] == {(): 2}
    assert stats[metrics.CONFIG_DIGEST] == {(): int(engine.scheduler._tuning._status.digest, 16)}
    assert engine.counted(metrics.CONFIG_GENERATION) == {}  # told once
    engine.tune("freeze: perhaps\n")
    assert engine.counted(metrics.CONFIG_RELOADS) == {("invalid",): 1}


def test_a_change_is_told_once_by_the_scheduler(engine, caplog):
    caplog.set_level("INFO")
    engine.tune("freeze: true\nextra_config: {valkey_pasword: x}\n")
    told = [line for line in caplog.messages if "in effect" in line]
    assert len(told) == 1
    assert "LMCache configuration 2 is in effect: freeze: false -> true" in told[0]
    assert any("did you mean valkey_password?" in line for line in caplog.messages)
