"""LMCacheOffloadingSpec: the tiers, the manager and the worker of one engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from typing_extensions import override
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingMetricMetadata, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from lmcache_ext.config import Config, load_config
from lmcache_ext.errors import ConfigError
from lmcache_ext.offload import metrics
from lmcache_ext.offload.copier import HostPageCopier
from lmcache_ext.offload.cores import spare_cores
from lmcache_ext.offload.cuda_copier import CudaPageCopier
from lmcache_ext.offload.element_layout import KV_PAGES, row_layout
from lmcache_ext.offload.far import FarTiers, num_threads
from lmcache_ext.offload.host import HostTier
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.offload.rows import open_rows
from lmcache_ext.offload.serdes import open_serde
from lmcache_ext.offload.settings import (
    FLUSH_TIMEOUT,
    NAMESPACE,
    PAGE_COPIER,
    WORKER,
    host_shape,
    in_rows,
    kernels_setting,
)
from lmcache_ext.offload.tier import CHUNKS_PER_TASK, StoredTier, TierLimits
from lmcache_ext.serde.base import Serde
from lmcache_ext.stores.guard import Guarded
from lmcache_ext.stores.jobs import NO_PATIENCE, JobPool, Patience

_MAX_QUEUED_TASKS = 4096
_WRITE_PATIENCE_S = 1.0  # what a killed engine may lose of what it would have written, and others find so much later
_HELD_FRACTION = 0.125  # of all rows may be pinned by writes that wait for an idle engine


class LMCacheOffloadingSpec(TieringOffloadingSpec):
    """vLLM's tiering spec with our region, worker, manager and tiers.

    Reads the LMCache configuration itself; the namespace comes with the connector's settings
    (`offload.settings.NAMESPACE`), and without one no tier behind host memory is built.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        self._shape = host_shape(config.extra_config)
        super().__init__(in_rows(config, self._shape))
        self._manager: OffloadingManager | None = None

    @classmethod
    @override
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return {**super().build_metric_definitions(extra_config), **metrics.definitions()}

    @override
    def create_worker(self, kv_caches: CanonicalKVCaches) -> CPUOffloadingWorker:
        """The default worker on GPUs: vLLM's own, over our region."""
        return CPUOffloadingWorker(
            kv_caches=kv_caches,
            blocks_per_chunk=self.blocks_per_chunk,
            num_cpu_chunks=self.num_chunks,
            mmap_region=self._open_rows(self._worker_rank()),
        )

    @override
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        copier = self.extra_config[PAGE_COPIER]
        if copier == "vllm":
            return super().get_worker(kv_caches)
        region = self._open_rows(self._worker_rank())
        if copier == "host":
            return HostPageCopier(kv_caches, region, blocks_per_chunk=self.blocks_per_chunk, shape=self._shape)
        try:
            return CudaPageCopier(kv_caches, region, blocks_per_chunk=self.blocks_per_chunk, shape=self._shape)
        except ValueError as error:
            region.cleanup()
            setting = kernels_setting(load_config(connector_extra=self.extra_config))
            raise ConfigError(f"{setting} cannot be had here: {error}; remove it") from error

    @override
    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            region = self._open_rows(None)
            primary = HostTier(
                self.num_chunks,
                region,
                cache_policy=self.eviction_policy,
                cache_policy_module_path=self.cache_policy_module_path,
                enable_events=self.kv_events_config.enable_kv_cache_events,
            )
            far = self._open_far(primary.get_kv_memoryview())
            self._manager = BoundedTieringManager(primary, far.tiers if far else (), far)
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

    def _make_pool(self, config: Config) -> JobPool:
        """On CPUs the model computes next to us, so writes wait for it; a GPU does not mind them."""
        max_held = int(self.num_chunks * _HELD_FRACTION) // CHUNKS_PER_TASK
        return JobPool(
            num_threads(config),
            max_queued=_MAX_QUEUED_TASKS,
            name="lmcache_ext-store",
            bulk_cpus=spare_cores(),
            patience=Patience(_WRITE_PATIENCE_S, max_held) if current_platform.is_cpu() else NO_PATIENCE,
        )

    def _open_far(self, rows: memoryview) -> FarTiers | None:
        namespace = self.extra_config.get(NAMESPACE)
        if namespace is None:
            return None
        config = load_config(connector_extra=self.extra_config)
        pool = self._make_pool(config)

        def make_tier(store: Guarded, serde: Serde, limits: TierLimits) -> StoredTier:
            shared: dict[str, Any] = {"namespace": bytes.fromhex(namespace), "pool": pool}
            return StoredTier(self, rows, store=store, serde=serde, limits=limits, **shared)

        return FarTiers(
            config,
            rows,
            serde_of=self._serde_opener(config),
            num_rows=self.num_chunks,
            flush_timeout_s=float(self.extra_config[FLUSH_TIMEOUT]),
            make_tier=make_tier,
            pool=pool,
            worker=int(self.extra_config.get(WORKER, 0)),
        )

    def _serde_opener(self, config: Config) -> Callable[[str, str], Serde]:
        if self._shape is not None:
            return partial(open_serde, kv_dtype="fp8", layout=None, opaque="rows are fp8 already (host_kv_dtype)")
        layout, opaque = row_layout(
            self.extra_config[KV_PAGES],
            row_bytes=self.kv_bytes_per_chunk,
            rank_bytes=self.cpu_page_size_per_worker,
            ranks=1 if self.replicated_layout else self.config.parallel.world_size,
            blocks=self.blocks_per_chunk,
            tensors_first=self.extra_config[PAGE_COPIER] == "vllm",
        )
        return partial(
            open_serde,
            kv_dtype=self.config.model.dtype,
            layout=layout,
            opaque=opaque,
            key_bins=config.cachegen_key_bins,
            value_bins=config.cachegen_value_bins,
        )
