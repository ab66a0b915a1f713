"""Capacities, deadlines and the remote store change under a running engine, on real directories and real rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from vllm.platforms import current_platform

from lmcache_ext.config import Live
from lmcache_ext.offload import metrics
from tests import mooncake_servers
from tests.servers import longest_pause, until
from tests.unit.connector_engine import PROMPT, WAIT_S
from tests.unit.test_tuning import BLOCKS, OTHERS, engine, vllm_config  # noqa: F401  fixtures

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the copier of hosts without a GPU")

SEEDS = itertools.count(1)
ROW_BYTES = 16384  # a chunk of 32 tokens


@pytest.fixture
def tuned(engine, tmp_path):  # noqa: F811
    """The engine; `remote(name)` is the line of a file that puts a directory behind ``remote_url``."""
    engine.remote = lambda name: f"remote_url: 'file://{tmp_path / name}'\n" if name else "freeze: false\n"
    engine.files = lambda name: len(list((tmp_path / name).glob("*/*/*.kv")))
    return engine


def manager(engine):  # noqa: F811
    return engine.scheduler.scheduler.manager


def settle(engine):  # noqa: F811
    """Step until no far work is left."""
    for _ in range(50):
        engine.step()
        for tier in manager(engine).secondary_tiers:
            assert tier._pool.drain(WAIT_S)
        if not engine.scheduler.has_pending_push_work():
            return
    raise AssertionError("work never ends")


def new_prompt():
    seed = next(SEEDS)
    return [seed, *PROMPT[1:]]


class TestHostMemory:
    def test_shrinks_and_grows_to_what_was_reserved(self, tuned):
        host = manager(tuned).host
        assert host.num_reserved == 2**20 // ROW_BYTES
        tuned.transfer.kv_connector_extra_config.pop("lmcache.max_local_cpu_size")
        for size, rows in (("64Ki", 4), ("128Ki", 8), ("1Gi", host.num_reserved)):
            tuned.tune(f"max_local_cpu_size: {size}\n")
            assert host.limit == rows

    def test_says_that_no_more_was_reserved(self, tuned, caplog):
        tuned.transfer.kv_connector_extra_config.pop("lmcache.max_local_cpu_size")
        tuned.tune("max_local_cpu_size: 2Mi\n")
        (line,) = [line for line in caplog.messages if "reserved" in line]
        assert "restart for more" in line
        assert str(tuned.path) in line

    def test_too_small_for_one_chunk_changes_nothing(self, tuned, caplog):
        tuned.transfer.kv_connector_extra_config.pop("lmcache.max_local_cpu_size")
        before = manager(tuned).host.limit
        tuned.tune("max_local_cpu_size: 1Ki\nfreeze: true\n")
        assert manager(tuned).host.limit == before
        assert not manager(tuned).frozen
        assert f"{tuned.path}:1: max_local_cpu_size" in caplog.text
        assert f"takes {ROW_BYTES} bytes" in caplog.text

    def test_evicts_to_disk_what_it_no_longer_holds(self, tuned):
        tuned.transfer.kv_connector_extra_config.pop("lmcache.max_local_cpu_size")
        tuned.compute("first", BLOCKS)
        tuned.tune("max_local_cpu_size: 16Ki\n")
        tuned.tune("max_local_cpu_size: 1Mi\n")
        assert tuned.begin_load(tuned.request("again"), OTHERS) == 96
        assert tuned.step().finished_recving == {"again"}
        assert torch.equal(tuned.kv[0][[10, 11, 12, 13, 14, 15]], tuned.kv[0][[1, 2, 3, 4, 5, 6]])

    def test_in_the_middle_of_a_load_takes_none_of_its_rows(self, tuned):
        tuned.transfer.kv_connector_extra_config.pop("lmcache.max_local_cpu_size")
        tuned.compute("first", BLOCKS)
        assert tuned.begin_load(tuned.request("again"), OTHERS) == 96
        tuned.write("max_local_cpu_size: 16Ki\n")
        assert tuned.step().finished_recving == {"again"}
        assert torch.equal(tuned.kv[0][[10, 11, 12, 13, 14, 15]], tuned.kv[0][[1, 2, 3, 4, 5, 6]])
        tuned.step()
        assert manager(tuned).host._num_chunks == 1
        assert tuned.pinned() == 0


class TestDisk:
    def test_takes_a_new_limit_at_once_and_evicts_down_to_it(self, tuned):
        tuned.transfer.kv_connector_extra_config.pop("lmcache.max_local_disk_size")
        tuned.tune("max_local_disk_size: 1Mi\n")
        for name in ("one", "two"):
            tuned.compute(name, BLOCKS, new_prompt())
        settle(tuned)
        assert tuned.files("disk") == 6
        tuned.write("max_local_disk_size: 40Ki\n")
        assert tuned.files("disk") == 2  # before any step

    def test_is_left_alone_by_a_limit_that_stays(self, tuned, monkeypatch):
        def never(*_):
            raise AssertionError("walked for nothing")

        monkeypatch.setattr("lmcache_ext.stores.disk_space.Space.set_capacity", never)
        tuned.tune("freeze: true\n")


class TestDeadlines:
    def test_reach_every_tier_and_its_breaker(self, tuned):
        tuned.tune(
            "blocking_timeout_secs: 3\nlookup_timeout_ms: 70\n"
            "extra_config: {get_blocking_failed_threshold: 2, ping_interval: 5, waiting_time_for_recovery: 9}\n"
        )
        (tier,) = manager(tuned).secondary_tiers
        assert (tier.limits.fetch_timeout_s, tier.limits.lookup_timeout_s) == (3.0, 0.07)
        guard = tier.store
        assert (guard._deadline_s, guard._lookup_deadline_s) == (3.0, 0.07)
        for breaker in (guard._reads, guard._writes):
            assert (breaker._failures_to_open, breaker._interval_s, breaker._max_interval_s) == (2, 5.0, 9.0)
        tuned.tune("min_retrieve_tokens: 0\n")
        assert guard._reads._failures_to_open == 5

    def test_do_not_change_the_store(self, tuned):
        tuned.tune(tuned.remote("a"))
        store = manager(tuned).secondary_tiers[1].store
        tuned.tune(tuned.remote("a") + "blocking_timeout_secs: 3\n")
        assert manager(tuned).secondary_tiers[1].store is store


class TestWhatIsWritten:
    def test_to_a_remote_store_follows_the_file(self, tuned):
        tuned.tune(tuned.remote("a") + "remote_min_uses: 2\n")
        tuned.compute("once", BLOCKS, new_prompt())
        settle(tuned)
        assert tuned.files("a") == 0
        tuned.tune(tuned.remote("a"))
        tuned.compute("first", BLOCKS, new_prompt())
        settle(tuned)
        assert tuned.files("a") == 3

    def test_to_the_disk_after_a_fetch_follows_the_file(self, tuned, tmp_path):
        tuned.tune(tuned.remote("a") + "promote_on_hit: false\n")
        tuned.compute("first", BLOCKS)
        settle(tuned)
        for keeps, setting in ((0, "promote_on_hit: false\n"), (3, "")):
            tuned.tune(tuned.remote("a") + setting)
            tuned.scheduler.reset_cache()
            for file in (tmp_path / "disk").glob("*/*/*.kv"):
                file.unlink()
            request = tuned.request(f"again {keeps}")
            assert tuned.begin_load(request, OTHERS) == 96
            tuned.step()
            tuned.finish(request)
            settle(tuned)
            assert tuned.files("disk") == keeps


class TestRemote:
    def test_writes_with_the_time_to_live_of_the_file(self, tuned):
        url = "remote_url: redis://127.0.0.1:1\nextra_config: {ttl_s: %d}\n"
        for ttl_s in (60, 5):
            tuned.tune(url % ttl_s)
            assert manager(tuned).secondary_tiers[1].store._store._ttl_ms == ttl_s * 1000

    def test_takes_a_new_limit_for_a_fetch_that_stops(self, tuned):
        for stall_ms in (500, 70):
            tuned.tune(f"remote_url: lm://127.0.0.1:1\nextra_config: {{remote_stall_timeout_ms: {stall_ms}}}\n")
            assert manager(tuned).secondary_tiers[1].store._store._floor.timeout_s == stall_ms / 1000

    def test_is_added_where_there_was_none(self, tuned):
        tuned.tune(tuned.remote("a"))
        tuned.compute("first", BLOCKS)
        settle(tuned)
        assert tuned.files("a") == 3
        assert [tier.tier_type for tier in manager(tuned).secondary_tiers] == ["disk", "remote"]

    def test_that_was_added_is_read_from(self, tuned, tmp_path):
        tuned.tune(tuned.remote("a"))
        tuned.compute("first", BLOCKS)
        settle(tuned)
        tuned.scheduler.reset_cache()
        for file in (tmp_path / "disk").glob("*/*/*.kv"):
            file.unlink()
        assert tuned.begin_load(tuned.request("again"), OTHERS) == 96
        assert tuned.step().finished_recving == {"again"}

    def test_is_removed_and_added_again(self, tuned):
        tuned.tune(tuned.remote("a"))
        tuned.tune(tuned.remote(None))
        assert not manager(tuned).secondary_tiers[1].present
        tuned.compute("first", BLOCKS)
        settle(tuned)
        assert tuned.files("a") == 0
        tuned.tune(tuned.remote("b"))
        tuned.compute("second", BLOCKS, new_prompt())
        settle(tuned)
        assert tuned.files("b") == 3
        assert len(manager(tuned).secondary_tiers) == 2

    def test_that_cannot_be_opened_changes_nothing_at_all(self, tuned, caplog):
        tuned.tune(tuned.remote("a"))
        before = manager(tuned).secondary_tiers[1].store
        tuned.tune("remote_url: redis://h:1\nextra_config: {part_bytes: none}\nfreeze: true\n")
        assert manager(tuned).secondary_tiers[1].store is before
        assert not manager(tuned).frozen
        assert "part_bytes" in caplog.text
        assert tuned.counted(metrics.CONFIG_RELOADS) == {("applied",): 1, ("invalid",): 1}

    def test_of_another_kind_has_its_own_name_in_the_statistics(self, tuned):
        tuned.tune(tuned.remote("a"))
        tuned.tune("remote_url: mock://1/\n")
        assert manager(tuned)._metrics.tier_label(1) == ("2:mock",)
        tuned.compute("first", BLOCKS)
        settle(tuned)

    @pytest.mark.e2e
    def test_becomes_mooncake_and_no_longer_while_its_master_is_dead_and_no_step_waits(self, tuned, tmp_path):
        with mooncake_servers.master(tmp_path) as server:
            small = "{global_segment_size: 64MB, local_buffer_size: 16MB}"
            tuned.tune(f"remote_url: mooncakestore://{server.address}/\nextra_config: {small}\n")
            tier = manager(tuned).secondary_tiers[1]
            assert (tier.tier_type, tier.present) == ("mooncake", True)
            until(lambda: tier.store.exists([bytes(17)]) == [False] and tier.store.counters().get("read.ok"), "joined")
            server.kill()
            tuned.tune(tuned.remote("a"))
            assert tier.tier_type == "remote"
            (left,) = tier._retired
            assert longest_pause(lambda: left.closed) < 0.5
            server.start()

    def test_that_comes_too_late_is_closed(self, tuned, monkeypatch):
        closed = []
        monkeypatch.setattr("lmcache_ext.stores.guard.Guarded.close", lambda self: closed.append(self.name))
        tuned.write(tuned.remote("a"))
        tuned.scheduler._tuning.close()
        assert closed == ["remote"]
        monkeypatch.undo()

    def test_changes_under_load_and_no_request_notices(self, tuned, tmp_path):
        """Requests load and store while the store behind them is one directory, another, or none."""
        prompts = [new_prompt() for _ in range(4)]
        for prompt in prompts:
            tuned.compute(f"warm {prompt[0]}", BLOCKS, prompt)
        for turn, name in enumerate(["a", "b", None, "a", "c", None, "b"] * 3):
            prompt = prompts[turn % len(prompts)]
            tuned.scheduler.reset_cache()
            request = tuned.request(f"again {turn}", prompt)
            assert tuned.scheduler.get_num_new_matched_tokens(request, 0)[0] in (None, 0)
            tuned.write(tuned.remote(name))  # while it is being looked up
            tokens = tuned.begin_load(request, OTHERS)
            assert tokens in (0, 32, 64, 96)
            report = tuned.step() if tokens else None
            assert report is None or not report.failed_recving
            tuned.finish(request)
            tuned.compute(f"other {turn}", BLOCKS, new_prompt())
        settle(tuned)
        assert tuned.pinned() == 0
        assert not tuned.jobs
        until(
            lambda: all(backing.closed for tier in manager(tuned).secondary_tiers for backing in tier._retired),
            "closed",
        )
        assert {name for name in ("a", "b", "c") if tuned.files(name)} == {"a", "b", "c"}
        assert tuned.counted(metrics.HOOK_FAILURES) == {}


def test_every_live_setting_is_known_to_whoever_applies_it():
    """A new field of `Live` is a promise: apply it in `offload.tuning` or `offload.far`, test it, name it here."""
    by_tuning = {"host_capacity_bytes", "min_retrieve_tokens", "save_decode_cache", "freeze", "bypass", "log_level"}
    by_tuning |= {"quotas"}
    by_far = {"disk_capacity_bytes", "remote_url", "remote_serde", "blocking_timeout_s", "lookup_timeout_ms", "health"}
    by_far |= {"remote_min_uses", "promote_on_hit"}
    by_store_options = {"remote", "mooncake", "infinistore", "audit_actual_remote_url", "extra_config"}
    assert set(Live.model_fields) == by_tuning | by_far | by_store_options
