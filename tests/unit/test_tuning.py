"""A changed file reaches both halves of the connector between two steps, whatever is under way."""

from __future__ import annotations

import logging

import pytest
from vllm.platforms import current_platform

from lmcache_ext.offload import metrics
from lmcache_ext.reload import INTERVAL_S
from tests.unit.connector_engine import Engine
from tests.unit.test_connector import vllm_config  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the copier of hosts without a GPU")

BLOCKS = [1, 2, 3, 4, 5, 6, 7]
OTHERS = [10, 11, 12, 13, 14, 15, 16]


class Tuned(Engine):
    """An engine whose file is looked at when the test says so."""

    def __init__(self, vllm_config, directory, path):  # noqa: F811
        super().__init__(vllm_config, directory / "disk")
        self.path = path
        for half in (self.scheduler, self.worker):
            half._tuning._watcher.close()
            self._look(half)

    def _look(self, half):
        while half._tuning._watcher.look() != INTERVAL_S:
            pass

    def write(self, text):
        """A new file, seen by both halves and not yet applied."""
        self.path.write_text(text)
        for half in (self.scheduler, self.worker):
            self._look(half)

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
    engine._look(engine.worker)
    engine.step()
    assert logging.getLogger("vllm.lmcache_ext").level == logging.ERROR
    engine.path.write_text("min_retrieve_tokens: 0\n")
    engine._look(engine.worker)
    engine.step()
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
