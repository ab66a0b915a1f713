"""LMCacheOffloadingSpec: the tiers, the manager and the worker of one engine."""

from __future__ import annotations

import os
from typing import Any

from typing_extensions import override
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingMetricMetadata, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from lmcache_ext.config import Config, load_config
from lmcache_ext.offload import metrics
from lmcache_ext.offload.copier import HostPageCopier
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.offload.rows import open_rows
from lmcache_ext.offload.serdes import open_serde
from lmcache_ext.offload.settings import FLUSH_TIMEOUT, NAMESPACE
from lmcache_ext.offload.store_options import store_options
from lmcache_ext.offload.tier import StoredTier, TierLimits
from lmcache_ext.serde.base import Serde
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.guard import Guarded
from lmcache_ext.stores.jobs import JobPool
from lmcache_ext.stores.registry import open_store

_MAX_QUEUED_TASKS = 4096
_PENDING_STORE_FRACTION = 0.5  # of all rows may wait to be written to one tier


class LMCacheOffloadingSpec(TieringOffloadingSpec):
    """vLLM's tiering spec with our region, worker, manager and tiers.

    Reads the LMCache configuration itself; the namespace comes with the connector's settings
    (`offload.settings.NAMESPACE`), and without one no tier behind host memory is built.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        self._manager: OffloadingManager | None = None

    @classmethod
    @override
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return {**super().build_metric_definitions(extra_config), **metrics.definitions()}

    @override
    def create_worker(self, kv_caches: CanonicalKVCaches) -> CPUOffloadingWorker:
        """The worker on GPUs: vLLM's own, over our region."""
        return CPUOffloadingWorker(
            kv_caches=kv_caches,
            blocks_per_chunk=self.blocks_per_chunk,
            num_cpu_chunks=self.num_chunks,
            mmap_region=self._open_rows(self._worker_rank()),
        )

    @override
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        region = self._open_rows(self._worker_rank())
        return HostPageCopier(kv_caches, region, blocks_per_chunk=self.blocks_per_chunk)

    @override
    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            region = self._open_rows(None)
            primary = CPUPrimaryTierOffloadingManager(
                num_chunks=self.num_chunks,
                cache_policy=self.eviction_policy,
                cache_policy_module_path=self.cache_policy_module_path,
                enable_events=self.kv_events_config.enable_kv_cache_events,
                mmap_region=region,
            )
            tiers = self._open_tiers(primary.get_kv_memoryview())
            self._manager = BoundedTieringManager(primary, list(tiers))
        return self._manager

    def _worker_rank(self) -> int:
        return 0 if self.replicated_layout else self.config.parallel.rank

    def _open_rows(self, rank: int | None) -> SharedOffloadRegion:
        return open_rows(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=rank,
            row_bytes=self.kv_bytes_per_chunk,
            worker_bytes=self.cpu_page_size_per_worker,
        )

    def _open_tiers(self, rows: memoryview) -> list[StoredTier]:
        namespace = self.extra_config.get(NAMESPACE)
        if namespace is None:
            return []
        config = load_config(connector_extra=self.extra_config)
        stores = _open_stores(config, self.config.model.dtype)
        if not stores:
            return []
        for store, _ in stores:
            store.register(rows)
        pool = JobPool(_num_threads(config), max_queued=_MAX_QUEUED_TASKS, name="lmcache_ext-store")
        limits = TierLimits(
            lookup_timeout_s=config.live.lookup_timeout_ms / 1000,
            fetch_timeout_s=config.live.blocking_timeout_s,
            flush_timeout_s=float(self.extra_config[FLUSH_TIMEOUT]),
            max_pending_stores=max(1, int(self.num_chunks * _PENDING_STORE_FRACTION)),
        )
        shared: dict[str, Any] = {"namespace": bytes.fromhex(namespace), "pool": pool, "limits": limits}
        return [StoredTier(self, rows, store=store, serde=serde, **shared) for store, serde in stores]


def _open_stores(config: Config, kv_dtype: str) -> list[tuple[Guarded, Serde]]:
    """The far tiers, nearest first: disk, then remote."""
    found: list[tuple[Store, Serde]] = []
    if config.disk_paths:
        serde = open_serde(config.local_disk_serde, _origin(config, "local_disk_serde"), kv_dtype=kv_dtype)
        found.append((DiskStore(config.disk_paths, config.live.disk_capacity_bytes), serde))
    if config.live.remote_url is not None:
        serde = open_serde(config.live.remote_serde, _origin(config, "remote_serde"), kv_dtype=kv_dtype)
        found.append((open_store(config.live.remote_url, options=store_options(config.live.remote_url, config)), serde))
    return [(_guarded(store, config), serde) for store, serde in found]


def _origin(config: Config, key: str) -> str:
    return f"{config.origin(key).text}: {key}"


def _num_threads(config: Config) -> int:
    """As asked for, or one per core up to eight."""
    if config.origin("extra_config.disk_io_threads").kind != "default":
        return config.disk_io_threads
    return min(8, os.cpu_count() or 1)


def _guarded(store: Store, config: Config) -> Guarded:
    """The breaker around a store; LMCache's health settings replace its own where they were written."""
    health = config.live.health
    written = {
        "failures_to_open": ("get_blocking_failed_threshold", health.failures_before_open),
        "probe_interval_s": ("ping_interval", health.ping_interval_s),
        "max_probe_interval_s": ("waiting_time_for_recovery", health.recovery_s),
    }
    options: dict[str, Any] = {
        name: value for name, (key, value) in written.items() if config.origin(f"extra_config.{key}").kind != "default"
    }
    lookup_deadline_s = config.live.lookup_timeout_ms / 1000
    return Guarded(store, deadline_s=config.live.blocking_timeout_s, lookup_deadline_s=lookup_deadline_s, **options)
