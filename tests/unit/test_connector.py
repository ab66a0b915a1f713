"""Both halves of the connector, on vLLM's own scheduler and worker halves, real rows, a real directory
and real tensors; only the engine that would call them is missing."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from lmcache_ext import connector as connector_module
from lmcache_ext.offload import metrics
from lmcache_ext.offload.lookups import ADAPTER_PARAM
from lmcache_ext.offload.messages import LMCacheWorkerMetadata
from lmcache_ext.offload.rows import rows_path
from lmcache_ext.ops import lossless, pages_fp8
from lmcache_ext.plugin import LOAD_FAILURE_POLICY
from lmcache_ext.stores.jobs import Patience
from tests.unit.connector_engine import HASH_FN, PAGE, PROMPT, Engine, make_vllm_config, output_of

FP8 = {"extra_config": {"host_kv_dtype": "fp8"}}

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the copier of hosts without a GPU")


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    kv_cache_utils.init_none_hash(HASH_FN)
    return make_vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_engine(vllm_config, tmp_path):
    made = []

    def make(**settings):
        made.append(Engine(vllm_config, tmp_path / "disk", **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine):
    return make_engine()


@pytest.fixture
def warm(make_engine):
    """An engine that holds PROMPT, computed in blocks 1..7."""
    engine = make_engine()
    engine.compute("first", [1, 2, 3, 4, 5, 6, 7])
    return engine


@pytest.mark.parametrize(("role", "warnings"), [("kv_both", 0), ("kv_consumer", 1), ("kv_producer", 1)])
def test_half_a_role_is_said_to_be_the_whole(vllm_config, make_engine, monkeypatch, role, warnings):
    said = []
    monkeypatch.setattr(connector_module.logger, "warning", lambda text, *words: said.append(text % words))
    monkeypatch.setattr(vllm_config.kv_transfer_config, "kv_role", role)
    engine = make_engine()
    engine.compute("first", [1, 2, 3, 4, 5, 6, 7])
    assert engine.match(engine.request("second")) == 96
    assert sum(f"kv_role {role} is taken for kv_both" in line for line in said) == warnings


def fail(*args, **kwargs):
    raise RuntimeError("a bug")


class TestReuse:
    def test_of_a_prompt_brings_back_its_blocks(self, warm):
        request = warm.request("again")
        assert warm.begin_load(request, [10, 11, 12, 13, 14, 15, 16]) == 96
        report = warm.step()
        assert report.finished_recving == {"again"}
        assert not report.failed_recving
        for tensor in warm.kv:
            assert torch.equal(tensor[[10, 11, 12, 13, 14, 15]], tensor[[1, 2, 3, 4, 5, 6]])
        warm.finish(request)
        assert warm.pinned() == 0
        assert not warm.jobs
        assert not warm.scheduler.has_pending_push_work()

    def test_outlives_the_engine(self, warm, make_engine):
        next_engine = make_engine()
        request = next_engine.request("again")
        assert next_engine.begin_load(request, [10, 11, 12, 13, 14, 15, 16]) == 96
        assert next_engine.step().finished_recving == {"again"}
        for old, new in zip(warm.kv, next_engine.kv, strict=True):
            assert torch.equal(new[[10, 11, 12, 13, 14, 15]], old[[1, 2, 3, 4, 5, 6]])

    @pytest.mark.parametrize(
        ("writer", "reader", "hit"),
        [
            ("naive", "lossless", 96),
            ("lossless", "naive", 96),
            ("fp8", "fp8", 96),
            ("naive", "fp8", 0),
            ("fp8", "naive", 0),
        ],
    )
    @pytest.mark.skipif(not lossless.available(), reason="no compiler was there when the package was installed")
    def test_is_shared_by_engines_of_the_same_loss_only(self, make_engine, writer, reader, hit):
        first = make_engine(local_disk_serde=writer)
        first.compute("first", [1, 2, 3, 4, 5, 6, 7])
        second = make_engine(local_disk_serde=reader)
        assert second.match(second.request("again")) == hit

    @pytest.mark.skipif(not pages_fp8.available(), reason="no compiler was there when the package was installed")
    def test_with_rows_of_eight_bits_brings_back_nearly_the_same_keys_and_values(self, make_engine):
        first = make_engine(**FP8)
        exact = torch.randn(len(first.kv), *first.kv[0].shape[:1], PAGE // 2).bfloat16()
        for tensor, numbers in zip(first.kv, exact, strict=True):
            tensor.copy_(numbers.view(torch.int8))
        first.compute("first", [1, 2, 3, 4, 5, 6, 7])
        for engine in (first, make_engine(**FP8, local_disk_serde="lossless")):  # from its own rows; from disk
            request = engine.request("again")
            assert engine.begin_load(request, [10, 11, 12, 13, 14, 15, 16]) == 96
            assert engine.step().finished_recving == {"again"}
            for tensor, numbers in zip(engine.kv, exact.float(), strict=True):
                found = tensor[[10, 11, 12, 13, 14, 15]].view(torch.bfloat16).float()
                assert not torch.equal(found, numbers[1:7])
                assert torch.allclose(found, numbers[1:7], rtol=1 / 15, atol=1e-3)

    @pytest.mark.skipif(not pages_fp8.available(), reason="no compiler was there when the package was installed")
    @pytest.mark.parametrize(("writer", "reader"), [("fp8", "auto"), ("auto", "fp8")])
    def test_never_meets_rows_of_another_dtype(self, make_engine, writer, reader):
        first = make_engine(extra_config={"host_kv_dtype": writer})
        first.compute("first", [1, 2, 3, 4, 5, 6, 7])
        second = make_engine(extra_config={"host_kv_dtype": reader})
        assert second.match(second.request("again")) == 0

    def test_stops_where_prompts_part(self, warm):
        assert warm.match(warm.request("other", PROMPT[:40] + [1] * 60)) == 32
        assert warm.match(warm.request("salted", PROMPT, cache_salt="tenant")) == 0

    def test_below_the_configured_minimum_is_none(self, warm, make_engine):
        engine = make_engine(min_retrieve_tokens=64)
        assert engine.match(engine.request("short", PROMPT[:40])) == 0
        assert engine.match(engine.request("long")) == 96
        assert engine.pinned() == 0

    def test_counts_requests_and_tokens(self, warm):
        warm.scheduler.get_kv_connector_stats()
        request = warm.request("again")
        tokens = warm.begin_load(request, [10, 11, 12, 13, 14, 15, 16])
        warm.scheduler.get_external_cache_hit_sources(request, tokens)
        stats = warm.scheduler.get_kv_connector_stats()._values
        assert stats[metrics.LOOKUP_REQUESTS] == {(): 1}
        assert stats[metrics.REQUESTED_TOKENS] == {(): 100}
        assert stats[metrics.HIT_TOKENS] == {("host",): 96}

    def test_are_told_in_steps_with_news_and_once_a_second(self, warm):
        warm.step()  # nothing computed: always told, for no step may follow
        assert warm.scheduler.get_kv_connector_stats() is not None
        assert warm.scheduler.get_kv_connector_stats() is None
        warm.match(warm.request("news"))
        assert warm.scheduler.get_kv_connector_stats() is not None
        warm.scheduler._pace._due_at = 0.0  # a second later
        assert warm.scheduler.get_kv_connector_stats() is not None


class TestLife:
    @pytest.mark.parametrize(("chosen", "policy"), [({}, "recompute"), ({LOAD_FAILURE_POLICY: "fail"}, "fail")])
    def test_a_failed_load_is_computed_again_unless_the_user_chose_otherwise(self, make_engine, chosen, policy):
        assert make_engine(connector=chosen).transfer.kv_load_failure_policy == policy

    def test_shutdown_unmaps_everything_and_leaves_no_name(self, vllm_config, tmp_path):
        engine = Engine(vllm_config, tmp_path / "disk")
        mapped = [engine.region.mmap_obj, engine.copier._region.mmap_obj]
        engine.compute("first", [1, 2, 3, 4, 5, 6, 7])
        engine.close()
        assert all(region.closed for region in mapped)
        assert not os.path.exists(rows_path(engine.engine_id))
        assert not engine.worker._hooks.take_failures()
        assert not engine.scheduler._hooks.take_failures()

    def test_rows_may_take_more_than_half_of_the_shared_memory(self, vllm_config, tmp_path, monkeypatch):
        real = os.statvfs

        def small(path):  # a mount of 1.5 MiB whose free space shrinks as rows are populated
            if path != "/dev/shm":
                return real(path)
            own = rows_path(vllm_config.kv_transfer_config.engine_id)
            taken = os.stat(own).st_blocks * 512 if os.path.exists(own) else 0
            return SimpleNamespace(f_bavail=(3 * 2**19 - taken) // 4096, f_blocks=3 * 2**19 // 4096, f_frsize=4096)

        monkeypatch.setattr("lmcache_ext.host_memory.os.statvfs", small)
        engine = Engine(vllm_config, tmp_path / "disk")
        assert engine.region.total_size_bytes == engine.copier._region.total_size_bytes == 2**20
        engine.close()


# Hook -> how vLLM calls it, and its neutral answer.
REQUEST_HOOKS = {
    "on_new_request": (lambda e, r: e.scheduler.on_new_request(r), None),
    "get_num_new_matched_tokens": (lambda e, r: e.scheduler.get_num_new_matched_tokens(r, 0), (0, False)),
    "get_external_cache_hit_sources": (lambda e, r: e.scheduler.get_external_cache_hit_sources(r, 32), {}),
    "update_state_after_alloc": (lambda e, r: e.scheduler.update_state_after_alloc(r, None, 32), None),
}
NEWS = KVConnectorOutput(kv_connector_worker_meta=LMCacheWorkerMetadata())
ENGINE_HOOKS = {
    "update_connector_output": (lambda e, r: e.scheduler.update_connector_output(NEWS), None),
    "has_pending_push_work": (lambda e, r: e.scheduler.has_pending_push_work(), False),
    "request_finished": (lambda e, r: e.scheduler.request_finished(r, []), (False, None)),
    "take_events": (lambda e, r: list(e.scheduler.take_events()), []),
    "reset_cache": (lambda e, r: e.scheduler.reset_cache(), False),
}


class TestContainment:
    @pytest.mark.parametrize("hook", REQUEST_HOOKS)
    def test_of_a_request_bypasses_that_request_and_is_counted(self, warm, monkeypatch, hook):
        call, neutral = REQUEST_HOOKS[hook]
        request = warm.request("again")
        with monkeypatch.context() as patch:
            patch.setattr(warm.scheduler.scheduler, hook, fail)
            assert call(warm, request) == neutral
        assert warm.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        assert warm.match(warm.request("another")) == 96
        assert warm.counted(metrics.HOOK_FAILURES) == {(hook,): 1}

    @pytest.mark.parametrize("hook", ENGINE_HOOKS)
    def test_of_the_engine_turns_the_cache_off_and_is_counted(self, warm, monkeypatch, hook):
        call, neutral = ENGINE_HOOKS[hook]
        request = warm.request("again")
        monkeypatch.setattr(warm.scheduler, "_has_events", True)  # as with --kv-events-config; else nobody asks
        with monkeypatch.context() as patch:
            patch.setattr(warm.scheduler.scheduler, hook, fail)
            assert call(warm, request) == neutral
        assert warm.match(warm.request("another")) == 0
        stats = warm.scheduler.get_kv_connector_stats()._values
        assert stats[metrics.HOOK_FAILURES] == {(hook,): 1}
        assert stats[metrics.CACHE_ACTIVE] == {(): 0}

    def test_of_a_cache_that_is_off_remembers_no_requests(self, engine):
        engine.scheduler._hooks.off = True
        request = engine.request("r")
        engine.step((request, [1, 2, 3, 4, 5, 6, 7]))
        engine.finish(request)
        assert engine.scheduler.scheduler._req_status == {}

    def test_of_an_adapter_that_cannot_be_read_costs_the_far_tiers_only(self, warm, monkeypatch):
        monkeypatch.setattr(warm.scheduler._adapters, "label", fail)
        request = warm.request("again")
        assert request.kv_transfer_params == {ADAPTER_PARAM: ""}
        warm.step((request, [20, 21, 22, 23, 24, 25, 26]))  # a request unknown to it would raise here
        assert not warm.scheduler._hooks.off


class TestFailedLoad:
    BLOCKS = (10, 11, 12, 13, 14, 15, 16)

    def check_recomputed(self, engine, report, request):
        """The worker reported it once as failed; the scheduler half neither waits nor tries again."""
        assert report.finished_recving == report.failed_recving == {request.request_id}
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        after = engine.step()
        assert not after.finished_recving

    def test_whose_plan_failed_reaches_the_worker_and_comes_back(self, warm, monkeypatch):
        request = warm.request("again")
        with monkeypatch.context() as patch:
            patch.setattr(warm.scheduler.scheduler.manager.primary_tier, "prepare_load", fail)
            warm.begin_load(request, self.BLOCKS)
        assert warm.scheduler.has_pending_push_work()
        self.check_recomputed(warm, warm.step(), request)
        assert warm.pinned() == 0

    def test_whose_step_was_lost_comes_back_and_the_cache_is_off(self, warm, monkeypatch):
        request = warm.request("again")
        warm.begin_load(request, self.BLOCKS)
        with monkeypatch.context() as patch:
            patch.setattr(warm.scheduler.scheduler, "_build_store_jobs", fail)
            report = warm.step()
        self.check_recomputed(warm, report, request)
        assert warm.scheduler._hooks.off

    def test_planned_before_the_cache_went_off_in_the_same_step_comes_back(self, warm):
        request = warm.request("again")
        warm.begin_load(request, self.BLOCKS)
        warm.scheduler._hooks.run("another", fail, None)
        self.check_recomputed(warm, warm.step(), request)

    def test_whose_copy_failed_is_not_tried_again(self, warm, monkeypatch):
        request = warm.request("again")
        warm.begin_load(request, self.BLOCKS)
        monkeypatch.setattr(warm.copier, "_copy", fail)
        self.check_recomputed(warm, warm.step(), request)
        assert warm.pinned() == 0
        assert not warm.jobs

    def test_that_was_never_submitted_comes_back(self, warm, monkeypatch):
        request = warm.request("again")
        warm.begin_load(request, self.BLOCKS)
        with monkeypatch.context() as patch:
            patch.setattr(warm.copier, "submit_load", fail)
            report = warm.step()
        self.check_recomputed(warm, report, request)
        assert warm.pinned() == 0
        assert not warm.jobs
        assert warm.worker.get_kv_connector_stats()._values[metrics.HOOK_FAILURES] == {("start_load_kv",): 1}

    def test_that_nobody_could_report_comes_back_after_its_copy_ended(self, warm, monkeypatch):
        request = warm.request("again")
        warm.begin_load(request, self.BLOCKS)
        with monkeypatch.context() as patch:
            patch.setattr(warm.worker.connector_worker, "get_finished", fail)
            report = warm.step()
        assert report.failed_recving == {"again"}
        assert not warm.copier._pending
        assert warm.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)


class TestFailedStore:
    def test_is_never_found(self, engine, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(engine.copier, "_copy", fail)
            engine.compute("first", [1, 2, 3, 4, 5, 6, 7])
        assert engine.match(engine.request("again")) == 0
        assert engine.pinned() == 0
        assert engine.worker._failed_jobs == set()

    def test_is_what_a_flush_becomes_that_nobody_waited_for(self, engine, monkeypatch):
        request = engine.request("first")
        engine.begin_load(request, [])
        meta = engine.scheduler.build_connector_meta(output_of(request, [1, 2, 3, 4, 5, 6, 7]))
        meta.jobs_to_flush = set(meta.store_jobs)
        assert meta.jobs_to_flush
        with monkeypatch.context() as patch:
            patch.setattr(engine.copier, "wait", fail)
            engine.run_worker(meta)
        assert engine.scheduler.scheduler.manager.primary_tier._policy.chunks == {}


class TestPatience:
    def test_ends_and_the_request_is_computed(self, warm, monkeypatch):
        request = warm.request("again")
        monkeypatch.setattr(warm.scheduler.scheduler, "get_num_new_matched_tokens", lambda *args, **kw: (None, False))
        assert warm.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
        monkeypatch.setattr(connector_module, "_LOOKUP_PATIENCE_S", 0.0)
        monkeypatch.setattr(connector_module, "_ASK_AGAIN_S", 0.0)
        assert warm.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        monkeypatch.undo()
        assert warm.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        warm.finish(request)
        assert not warm.scheduler._deferred
        assert not warm.scheduler._hooks.bypassed("again")

    def test_asks_again_after_a_while_or_when_a_tier_has_news_and_not_before(self, warm, monkeypatch):
        request, asked = warm.request("again"), []
        monkeypatch.setattr(
            warm.scheduler.scheduler, "get_num_new_matched_tokens", lambda *args, **kw: asked.append(1) or (None, False)
        )
        monkeypatch.setattr(connector_module, "_ASK_AGAIN_S", 60.0)

        def ask():
            assert warm.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
            return len(asked)

        assert [ask(), ask()] == [1, 1]
        (tier,) = warm.scheduler.scheduler.manager.secondary_tiers
        tier.progress.advance()  # as when a fetch ends
        assert [ask(), ask()] == [2, 2]
        monkeypatch.setattr(connector_module, "_ASK_AGAIN_S", 0.0)
        assert [ask(), ask()] == [3, 4]

    def test_a_step_after_an_idle_one_waits_once_for_news_and_is_woken_by_them(self, warm, monkeypatch):
        request, asked = warm.request("again"), []
        monkeypatch.setattr(
            warm.scheduler.scheduler, "get_num_new_matched_tokens", lambda *args, **kw: asked.append(1) or (None, False)
        )
        monkeypatch.setattr(connector_module, "_ASK_AGAIN_S", 60.0)
        monkeypatch.setattr(connector_module, "_FAR_WAIT_S", 60.0)

        def ask():
            warm.scheduler.get_num_new_matched_tokens(request, 0)
            return len(asked)

        warm.scheduler._was_idle = False  # the fixture's last step computed nothing
        assert [ask(), ask()] == [1, 1], "without an idle step nobody waits"
        warm.scheduler.build_connector_meta(SchedulerOutput.make_empty())
        news = threading.Timer(0.05, warm.scheduler.scheduler.manager.progress.advance)
        news.start()
        assert [ask(), ask()] == [2, 2], "the second of the same step does not wait"
        news.join()
        warm.scheduler.build_connector_meta(SchedulerOutput.make_empty())
        monkeypatch.setattr(connector_module, "_FAR_WAIT_S", 0.01)
        assert ask() == 2, "and nobody waits for ever"


def test_a_step_without_news_asks_nothing_of_the_worker_half(warm, monkeypatch):
    for hook in ("handle_preemptions", "start_kv_transfers", "prepare_store_kv", "get_finished"):
        monkeypatch.setattr(warm.worker.connector_worker, hook, fail)
    meta = warm.scheduler.build_connector_meta(SchedulerOutput.make_empty())
    report = warm.run_worker(meta)
    assert report.kv_connector_worker_meta is None
    assert report.finished_recving == report.failed_recving == set()
    warm.worker.bind_connector_metadata(meta)
    assert not warm.worker.has_connector_metadata(), "layers would call us"
    assert not warm.worker._hooks.has_failures


class TestWriteBehind:
    def test_waits_for_a_step_that_computes_nothing(self, engine, tmp_path):
        pool = engine.scheduler.scheduler.manager.far.pool
        pool._patience = Patience(3600.0, max_jobs=8)
        first, after = engine.request("first"), engine.request("after", PROMPT[:20])
        for request in (first, after):
            assert engine.begin_load(request, []) == 0
        engine.step((first, [1, 2, 3, 4, 5, 6, 7]))
        engine.step((after, [8, 9]))
        written = threading.Event()
        pool.submit(written.set)  # behind the chunks
        assert not written.wait(0.1)
        assert not list(tmp_path.rglob("*.kv"))
        engine.step()
        assert written.wait(10.0)
        assert pool.drain(10.0)
        assert len(list(tmp_path.rglob("*.kv"))) == 3


class TestWorkerMetadata:
    def test_names_a_failed_store_only_once_it_is_complete(self, engine):
        engine.worker._failed_jobs = {1, 2}
        engine.worker.connector_worker._connector_worker_meta.mark_completed(2)
        assert engine.worker.build_connector_worker_meta().failed_jobs == {2}
        assert engine.worker.build_connector_worker_meta() is None
        assert engine.worker._failed_jobs == {1}

    def test_of_a_store_that_one_of_two_ranks_lost_is_unwritten(self, engine):
        request = engine.request("first")
        engine.begin_load(request, [])
        meta = engine.scheduler.build_connector_meta(output_of(request, [1, 2, 3, 4, 5, 6, 7]))
        (job_id,) = meta.store_jobs
        engine.jobs[job_id].pending_count = 2
        for failed in ({job_id}, set()):
            report = LMCacheWorkerMetadata({job_id: 1}, failed_jobs=failed)
            engine.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=report))
        assert engine.scheduler.scheduler.manager.primary_tier._policy.chunks == {}
        assert not engine.jobs
