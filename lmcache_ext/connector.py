"""LMCacheConnectorV1: the class vLLM loads for ``{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}``.

A thin subclass of vLLM's `OffloadingConnector`. It adds the LMCache configuration, containment of
our own failures (`offload.hooks`), delivery of failed copies, and the counters and log lines that
tell a user what was reused.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger

from lmcache_ext import namespace
from lmcache_ext.offload import explain, identity, metrics, settings
from lmcache_ext.offload.adapters import Adapters
from lmcache_ext.offload.announcer import Announcer, join_controller
from lmcache_ext.offload.copier import HostPageCopier, PageCopier
from lmcache_ext.offload.explain import Explainer
from lmcache_ext.offload.hooks import Hooks
from lmcache_ext.offload.lookups import ADAPTER_PARAM
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.offload.messages import NOTHING_TO_DO, LMCacheConnectorMetadata, LMCacheWorkerMetadata
from lmcache_ext.offload.prefix import PrefixLookup
from lmcache_ext.offload.quiet import QuietSteps
from lmcache_ext.offload.report import HitReport, start_line
from lmcache_ext.offload.serdes import loss
from lmcache_ext.offload.tenants import label_tenant
from lmcache_ext.offload.tuning import Tuning
from lmcache_ext.reload import ConfigWatcher, set_log_level

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.lmcache_ext.connector")

_IDLE_WAIT_S = 0.010  # with nothing to compute, waiting for a short copy is cheaper than another step
_FAR_WAIT_S = 0.005  # and so is waiting for a far tier; it delays at most one new request by as much
_LOOKUP_PATIENCE_S = 15.0  # a request that is still being looked up then is computed
# Asking again takes 1 us per chunk (benchmarks/ttft.py), in every step, of each request that waits: without
# progress of a tier it is done this often, for what only time changes.
_ASK_AGAIN_S = 0.010


@dataclass(slots=True)
class _Deferred:
    """A request whose lookup has not been answered."""

    since: float
    asked_at: float
    progress: int


class LMCacheConnectorV1(OffloadingConnector):
    """See the module's docstring. One instance schedules, one per worker moves bytes."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        found = settings.resolve(vllm_config, kv_cache_config)
        self._hooks = Hooks()
        self._settings = found
        set_log_level(found.config)
        if role == KVConnectorRole.SCHEDULER:
            if transfer.kv_connector_extra_config.get(settings.LOAD_FAILURE_POLICY) != "fail":
                transfer.kv_load_failure_policy = "recompute"  # vLLM reads it right after this constructor
            name, components = self._open_namespace(vllm_config, kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)
        read_config = partial(settings.read_config, vllm_config)
        self._reload: Tuning | ConfigWatcher
        self._adapters = Adapters()
        self._report = HitReport(found.tokens_per_chunk)
        self._stats = OffloadingConnectorStats()
        self._pace = metrics.Pace()
        events = vllm_config.kv_events_config
        self._has_events = events is not None and events.enable_kv_cache_events
        self._deferred: dict[str, _Deferred] = {}
        self._was_idle = False
        self._failed_loads: set[str] = set()
        self._failed_jobs: set[int] = set()
        self._explainer: Explainer | None = None
        self._announcer: Announcer | None = None
        if role == KVConnectorRole.SCHEDULER:
            assert isinstance(self.scheduler.manager, BoundedTieringManager)
            self._reload = self._tuning = Tuning(found.config, read_config, self.scheduler)
            self._quiet = QuietSteps(self.scheduler, self.scheduler.manager.progress)
            self.scheduler._maximal_prefix_lookup = PrefixLookup(self.scheduler)
            self._stats.set_gauge(metrics.CACHE_ACTIVE, 1)
            if transfer.kv_connector_extra_config.get(explain.ENABLED):
                self._explainer = Explainer(self.scheduler, name, components)
            self._announcer = join_controller(vllm_config, found, name, self.scheduler)
        else:
            self._reload = ConfigWatcher(found.config, read_config, quiet=True).open()  # how much this process logs

    def _open_namespace(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> tuple[str | None, dict[str, str]]:
        """The namespace and what it is made of; none where no other process could have the same keys."""
        assert vllm_config.kv_transfer_config is not None
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        name, parts = None, {}
        if identity.shareable_hash(vllm_config):
            blocks, row_bytes = self._settings.blocks_per_chunk, self._settings.row_bytes
            parts = identity.components(vllm_config, kv_cache_config, blocks_per_chunk=blocks, row_bytes=row_bytes)
            if found := loss(self._settings.config):
                parts["loss"] = found
            parts |= settings.row_order(extra, found)
            name = namespace.digest(parts).hex()
        else:
            logger.warning(
                "Only host memory is used: with --prefix-caching-hash-algo %s every process has other keys; "
                "use sha256_cbor",
                vllm_config.cache_config.prefix_caching_hash_algo,
            )
        extra[settings.NAMESPACE] = name
        extra[settings.WORKER] = vllm_config.parallel_config.data_parallel_rank
        for note in self._settings.config.notes:
            logger.info("%s", note)
        if (role := vllm_config.kv_transfer_config.kv_role) != "kv_both":
            logger.warning(
                "kv_role %s is taken for kv_both: every engine loads and stores; freeze: true only loads", role
            )
        logger.info("%s", start_line(self._settings, name))
        return name, parts

    @classmethod
    @override
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics:
        settings.announce(vllm_config)
        return super().build_prom_metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- scheduler -------------------------------------------------------------------------------

    @override
    def on_new_request(self, request: Request) -> None:
        if self._hooks.off:
            return
        self._hooks.run("reload", self._between_steps, None)
        if not isinstance(request.kv_transfer_params, dict):
            request.kv_transfer_params = None  # extra_args may hold anything under this name
        req_id = request.request_id
        self._hooks.run("label_tenant", lambda: label_tenant(request), False, req_id=req_id)
        if not self._hooks.run("label_adapter", lambda: self._adapters.label(request), False, req_id=req_id):
            request.kv_transfer_params = {**(request.kv_transfer_params or {}), ADAPTER_PARAM: ""}
        self._hooks.run(
            "on_new_request", lambda: super(LMCacheConnectorV1, self).on_new_request(request), None, req_id=req_id
        )

    def _between_steps(self) -> None:
        """What others want of this engine: a new configuration, the controller's tasks."""
        if self._tuning.tick():
            self._quiet.wake()
        if self._announcer is not None:
            assert isinstance(self.scheduler.manager, BoundedTieringManager)
            self._announcer.serve(self.scheduler.manager.host)

    @override
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        req_id = request.request_id
        if self._tuning.live.bypass or self._hooks.bypassed(req_id):
            self._explain(request, num_computed_tokens, 0)
            return 0, False
        nothing: tuple[int | None, bool] = (0, False)
        return self._hooks.run(
            "get_num_new_matched_tokens", lambda: self._match(request, num_computed_tokens), nothing, req_id=req_id
        )

    def _match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        req_id = request.request_id
        if self._asked_just_now(req_id):
            return None, False
        self._quiet.wake()
        tokens, load = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if tokens is None:
            if time.monotonic() - self._deferred[req_id].since < _LOOKUP_PATIENCE_S:
                return None, False
            logger.warning("Request %s: looked up for %.0f s, computing it instead", req_id, _LOOKUP_PATIENCE_S)
            self._hooks.bypass(req_id)
            tokens, load = 0, False
        self._deferred.pop(req_id, None)
        self._explain(request, num_computed_tokens, tokens)
        if tokens < self._tuning.live.min_retrieve_tokens:
            tokens, load = 0, False
        self._pace.mark()
        self._stats.increase_counter(metrics.LOOKUP_REQUESTS)
        self._stats.increase_counter(metrics.REQUESTED_TOKENS, request.num_tokens)
        self._report.tell(req_id, request.num_tokens, num_computed_tokens + tokens, tokens)
        return tokens, load

    def _asked_just_now(self, req_id: str) -> bool:
        """Whether asking again would find what it found; if not, it counts as asked now."""
        assert isinstance(self.scheduler.manager, BoundedTieringManager)
        far = self.scheduler.manager.progress
        now, progress = time.monotonic(), far.count
        deferred = self._deferred.get(req_id)
        if deferred is None:
            self._deferred[req_id] = _Deferred(now, now, progress)
            return False
        if progress == deferred.progress and self._was_idle:
            self._was_idle = False  # the next request does not wait once more in the same step
            progress = far.wait_beyond(progress, _FAR_WAIT_S)
        if progress == deferred.progress and now - deferred.asked_at < _ASK_AGAIN_S:
            return True
        deferred.asked_at, deferred.progress = now, progress
        return False

    def _explain(self, request: Request, gpu_tokens: int, cache_tokens: int) -> None:
        if (explainer := self._explainer) is None:
            return
        live, off = self._tuning.live, self._hooks.off
        self._hooks.run(
            "explain",
            lambda: explainer.note(request, gpu_tokens, cache_tokens, live, off=off),
            None,
            req_id=request.request_id,
        )

    @override
    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        def body() -> dict[CacheHitSource, int]:
            sources: dict[CacheHitSource, int]
            sources = super(LMCacheConnectorV1, self).get_external_cache_hit_sources(request, num_external_tokens)
            for source, tokens in sources.items():
                self._stats.increase_counter(metrics.HIT_TOKENS, tokens, (source.value,))
            return sources

        return self._hooks.run("get_external_cache_hit_sources", body, {}, req_id=request.request_id)

    @override
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        def body() -> bool:
            self._quiet.wake()
            super(LMCacheConnectorV1, self).update_state_after_alloc(request, blocks, num_external_tokens)
            return True

        req_id = request.request_id
        if num_external_tokens and not self._hooks.run("update_state_after_alloc", body, False, req_id=req_id):
            self._failed_loads.add(req_id)

    @override
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        meta = None
        if not self._hooks.off:
            meta = self._hooks.run("build_connector_meta", lambda: self._build_meta(scheduler_output), None)
            self._hooks.run("reload", self._between_steps, None)
        if meta is NOTHING_TO_DO:
            self._was_idle = False
            return meta
        meta = meta or self._lost_meta()
        meta.idle = self._was_idle = scheduler_output.total_num_scheduled_tokens == 0
        self.scheduler.manager.set_busy(not meta.idle)
        if meta.idle or meta.load_jobs or meta.store_jobs:
            self._pace.mark()
        meta.failed_loads, self._failed_loads = self._failed_loads, set()
        return meta

    def _build_meta(self, scheduler_output: SchedulerOutput) -> LMCacheConnectorMetadata:
        if self._quiet.holds(scheduler_output):
            return LMCacheConnectorMetadata({}, {}) if self._failed_loads else NOTHING_TO_DO
        meta = super().build_connector_meta(scheduler_output)
        assert isinstance(meta, OffloadingConnectorMetadata)
        self._quiet.plans(scheduler_output)
        return LMCacheConnectorMetadata(meta.load_jobs, meta.store_jobs, meta.jobs_to_flush)

    def _lost_meta(self) -> LMCacheConnectorMetadata:
        """This step's plan is lost, or the cache went off in the middle of it: nobody may wait for its loads."""
        planned = self.scheduler._current_batch_load_jobs
        self._failed_loads.update(job.req_id for job in planned.values())
        planned.clear()
        return LMCacheConnectorMetadata({}, {}, set())

    @override
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        has_news = connector_output.kv_connector_worker_meta is not None or connector_output.failed_recving
        if has_news and not self._hooks.off:
            self._hooks.run("update_connector_output", lambda: self._take_output(connector_output), None)

    def _take_output(self, connector_output: KVConnectorOutput) -> None:
        for req_id in connector_output.failed_recving:  # it would find, and fail to load, the same chunks again
            self._hooks.bypass(req_id)
        meta = connector_output.kv_connector_worker_meta
        if meta is not None:
            self._pace.mark()
            self._quiet.wake()
        for job_id in getattr(meta, "failed_jobs", ()):
            job = self.scheduler._jobs.get(job_id)
            if job is not None and job.is_store:
                assert isinstance(self.scheduler.manager, BoundedTieringManager)
                self.scheduler.manager.mark_unwritten(job.keys)
        super().update_connector_output(connector_output)

    @override
    def has_pending_push_work(self) -> bool:
        if self._failed_loads or self._hooks.off:
            return bool(self._failed_loads)
        return self._hooks.run("has_pending_push_work", super().has_pending_push_work, False)

    @override
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._request_finished(request)

    @override
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._request_finished(request)

    def _request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        self._deferred.pop(request.request_id, None)
        self._hooks.forget(request.request_id)
        self._pace.mark()
        told = self._explainer.take(request.request_id) if self._explainer is not None else None
        if self._hooks.off:
            return False, told
        later, params = self._hooks.run(
            "request_finished", lambda: self.scheduler.request_finished(request), (False, None)
        )
        return later, told or params

    @override
    def take_events(self) -> Iterable[KVCacheEvent]:
        if self._hooks.off or not self._has_events:
            return ()
        return self._hooks.run("take_events", lambda: list(super(LMCacheConnectorV1, self).take_events()), [])

    @override
    def reset_cache(self) -> bool | None:
        self._quiet.wake()
        return self._hooks.run("reset_cache", super().reset_cache, False)

    @override
    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        is_due = self.connector_scheduler is not None and self._pace.is_due()
        if not (is_due or self._hooks.has_failures):  # a worker counts nothing else
            return None
        return self._hooks.run("get_kv_connector_stats", self._take_stats, None)

    def _take_stats(self) -> KVConnectorStats | None:
        stats, self._stats = self._stats, OffloadingConnectorStats()
        for hook, count in self._hooks.take_failures().items():
            stats.increase_counter(metrics.HOOK_FAILURES, count, (hook,))
        if self.connector_scheduler is None:
            return None if stats.is_empty() else stats
        if self._hooks.off:
            stats.set_gauge(metrics.CACHE_ACTIVE, 0)
        elif (inner := self.scheduler.get_stats()) is not None:
            stats.aggregate(inner)
        self._tuning.count_into(stats)
        return None if stats.is_empty() else stats

    # -- worker ----------------------------------------------------------------------------------

    @override
    def has_connector_metadata(self) -> bool:
        """What vLLM asks in each layer before it calls `wait_for_layer_load` and `save_kv_layer`: we need neither."""
        return False

    @override
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, OffloadingConnectorMetadata)
        if not (kv_connector_metadata.jobs_to_flush or self._has_deferred_stores()):
            return

        def body() -> bool:
            super(LMCacheConnectorV1, self).handle_preemptions(kv_connector_metadata)
            self._begin_copies()
            return True

        if not self._hooks.run("handle_preemptions", body, False):  # their blocks may be overwritten under the copy
            self._failed_jobs |= kv_connector_metadata.jobs_to_flush or set()

    @override
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if not (self._metadata.load_jobs or self._has_deferred_stores()):
            return

        def body() -> bool:
            super(LMCacheConnectorV1, self).start_load_kv(forward_context, **kwargs)
            self._begin_copies()
            return True

        if not self._hooks.run("start_load_kv", body, False):
            self._give_up({job_id: job.req_id for job_id, job in self._metadata.load_jobs.items()})

    def _begin_copies(self) -> None:
        """Before the model is given this step's work, which the copies need not wait for."""
        assert self.connector_worker is not None
        if isinstance(copier := self.connector_worker.worker, PageCopier):
            copier.begin()

    def _has_deferred_stores(self) -> bool:
        """Whether stores of the last step are to be submitted: vLLM waits with them until its tokens are out."""
        assert self.connector_worker is not None
        return bool(self.connector_worker._unsubmitted_store_jobs)

    def _give_up(self, loads: dict[int, str]) -> None:
        """Report loads (job -> request) as failed, once no copy runs: their blocks go to other requests."""
        worker = self.connector_worker
        assert worker is not None
        assert worker.worker is not None
        worker.worker.wait(set(loads))
        for job_id, req_id in loads.items():
            worker._load_jobs.pop(job_id, None)
            worker._connector_worker_meta.mark_completed(job_id)
            self._failed_loads.add(req_id)

    @override
    def wait_for_save(self) -> None:
        if self._metadata.store_jobs:
            self._hooks.run("wait_for_save", super().wait_for_save, None)

    @override
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self.connector_worker is not None
        loads, copier = self.connector_worker._load_jobs, self.connector_worker.worker
        if isinstance(copier, PageCopier) and not (loads or self._has_failed() or copier.has_news()):
            return KVConnectorTransferResults()
        if self._metadata.idle and isinstance(copier, HostPageCopier):
            copier.wait_for(set(loads), _IDLE_WAIT_S)
        before = dict(loads)
        received = self._hooks.run("get_finished", lambda: self.get_finished(finished_req_ids)[1], None)
        if received is None:  # nobody will report these any more
            self._give_up(before)
        failed, self._failed_loads = self._metadata.failed_loads | self._failed_loads, set()
        if isinstance(copier, PageCopier):
            self._failed_jobs |= copier.take_failed()
            done = self._failed_jobs & (before.keys() - loads.keys())
            failed.update(before[job_id] for job_id in done)
            self._failed_jobs -= done
        return KVConnectorTransferResults(finished_recving=(received or set()) | failed, failed_recving=failed)

    def _has_failed(self) -> bool:
        return bool(self._failed_loads or self._failed_jobs or self._metadata.failed_loads)

    @override
    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        assert self.connector_worker is not None
        if not self.connector_worker._connector_worker_meta.completed_jobs:
            return None
        meta = super().build_connector_worker_meta()
        if meta is None:
            return None
        failed = self._failed_jobs & meta.completed_jobs.keys()
        self._failed_jobs -= failed
        return LMCacheWorkerMetadata(meta.completed_jobs, meta.transfer_stats, failed)

    @property
    def _metadata(self) -> LMCacheConnectorMetadata:
        return cast(LMCacheConnectorMetadata, self._connector_metadata)

    # -- both ------------------------------------------------------------------------------------

    @override
    def shutdown(self) -> None:
        self._reload.close()
        if self._announcer is not None:
            self._announcer.close()
        self._hooks.run("shutdown", super().shutdown, None)


class LMCacheConnector(LMCacheConnectorV1):
    """The name of LMCache's first connector."""


class LMCacheMPConnector(LMCacheConnectorV1):
    """The name of LMCache's multi-process connector; ours runs in the engine and needs no server."""
