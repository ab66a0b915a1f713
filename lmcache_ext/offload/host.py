"""Host memory as the tier next to the GPU: rows, some of which may be withheld while the engine runs.

Rows are reserved when the engine starts, pinned and mapped by every process; no more can be had later. How many
of them hold chunks can change: withheld rows stay reserved and are used by nobody.

Where a tenant has a quota, its own chunks make room for its new ones; nobody else's do, and where they cannot,
the end of its prompt is not kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from typing_extensions import override
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    OffloadingEvent,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.cpu.manager import _RequestCacheAccess
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager

from lmcache_ext.config_quotas import Quota
from lmcache_ext.offload.holdings import Holdings
from lmcache_ext.offload.lookups import adapter_of
from lmcache_ext.offload.policies import evict_among, resident
from lmcache_ext.offload.tenants import Tenants, tenant_of

logger = init_logger("vllm.lmcache_ext.offload.host")

_SLACK = 64  # a tenant that is full gives back a 64th at once: finding its oldest chunks looks at all of them


class HostTier(CPUPrimaryTierOffloadingManager):
    """vLLM's primary tier with a limit below what is reserved. All methods run in the scheduler's thread.

    `_num_chunks` is what vLLM may use now: usable rows, and those above the limit that are still pinned.
    """

    def __init__(self, num_chunks: int, mmap_region: SharedOffloadRegion, **options: Any) -> None:  # noqa: ANN401
        super().__init__(num_chunks, mmap_region, **options)
        self._num_allocated_chunks: int = 0  # vLLM's; said again for the type checker
        self.num_reserved = num_chunks
        self._limit = num_chunks
        self._withheld: list[int] = []
        self.holdings: Holdings | None = None
        """Where somebody wants to know, what is here."""
        self.tenants = Tenants()
        self._quotas: tuple[Quota, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, of all ranks."""
        strides = self.get_kv_memoryview().strides
        assert strides is not None
        return int(strides[0])

    @property
    def limit(self) -> int:
        """How many rows may hold chunks."""
        return self._limit

    @property
    def num_available(self) -> int:
        """How many rows a new chunk may have: those that are free, and those that may be evicted."""
        return int(self._get_num_free_chunks()) + int(self._num_evictable_cache_chunks)

    def find(self, keys: Iterable[OffloadKey]) -> list[ChunkStatus | None]:
        """What is known of each chunk; None where it is not here."""
        get = self._policy.get
        return [get(key) for key in keys]

    def set_limit(self, num_rows: int) -> None:
        """Let `num_rows` rows hold chunks, at least one and at most all that are reserved.

        Rows above the limit are evicted by the cache policy; those that a transfer has pinned, later (`settle`).
        """
        self._limit = min(max(1, num_rows), self.num_reserved)
        self._policy.cache_capacity = self._limit
        self.settle()

    def set_quotas(self, quotas: tuple[Quota, ...]) -> None:
        """Let each tenant hold so much; who holds more is brought down, chunks that are pinned later (`settle`)."""
        if quotas == self._quotas:
            return
        self._quotas = quotas
        for quota in quotas:
            if 0 < quota.host_bytes < self.row_bytes:
                logger.warning("quotas: %s holds no chunk, which takes %d bytes", quota, self.row_bytes)
        self.tenants.set_quotas(quotas, self.row_bytes, resident(self._policy))
        self.settle()

    def settle(self) -> None:
        """Withhold rows above the limit, as far as nothing pins them; give back those below it."""
        if self.tenants.over:
            self._trim()
        if self._num_chunks == self._limit:
            return
        self._free_list.extend(range(self._num_allocated_chunks, self._num_chunks))  # never used so far
        self._num_allocated_chunks = self._num_chunks
        while self._num_chunks < self._limit:
            self._free_list.append(self._withheld.pop())
            self._count_rows(1)
        self._evict(self._num_chunks - self._limit - len(self._free_list))
        while self._num_chunks > self._limit and self._free_list:
            self._withheld.append(self._free_list.pop())
            self._count_rows(-1)

    def _count_rows(self, change: int) -> None:
        self._num_chunks += change
        self._num_allocated_chunks += change

    def evict_all(self) -> int:
        """Free every row that is not pinned; how many chunks went."""
        return self._evict(self._num_evictable_cache_chunks)

    def _evict(self, num_rows: int) -> int:
        """Free up to `num_rows` rows, of those that are not pinned; how many."""
        num_rows = min(num_rows, self._num_evictable_cache_chunks)
        return self._drop(self._policy.evict(num_rows, set()) or ()) if num_rows > 0 else 0

    def _drop(self, evicted: Sequence[tuple[OffloadKey, ChunkStatus]]) -> int:
        """These have left the policy; how many."""
        if not evicted:
            return 0
        self._num_evictable_cache_chunks -= len(evicted)
        for _, chunk in evicted:
            self._free_chunk(chunk)
        keys = [key for key, _ in evicted]
        self._forget(keys)
        if self.events is not None:
            self.events.append(OffloadingEvent(keys=keys, medium=self.medium, removed=True))
        return len(evicted)

    def _forget(self, keys: Collection[OffloadKey]) -> None:
        """Chunks that were here are not any more."""
        self.tenants.discharge(keys)
        if self.holdings is not None:
            self.holdings.remove(keys)

    # -- tenants ---------------------------------------------------------------------------------

    def _trim(self) -> None:
        """Bring tenants down to their quotas, as far as nothing pins their chunks."""
        for tenant in list(self.tenants.over):
            self._evict_of(tenant, self.tenants.excess(tenant), set())
            if not self.tenants.excess(tenant):
                self.tenants.over.discard(tenant)

    def _evict_of(self, tenant: str, num_rows: int, protected: set[OffloadKey]) -> int:
        """Evict up to `num_rows` chunks of a tenant; returns how many."""
        if num_rows <= 0:
            return 0
        evicted = evict_among(self._policy, self.tenants.held(tenant), num_rows, protected)
        self.tenants.count_evicted(tenant, [key for key, _ in evicted])
        return self._drop(evicted)

    def _within_quota(
        self, keys: Collection[OffloadKey], req_context: ReqContext, tenant: str, limit: int
    ) -> Collection[OffloadKey]:
        """`keys` less what its tenant may not add; evicts older chunks of it, but none of the same request."""
        new = [key for key in keys if self._policy.get(key) is None]
        lacking = self.tenants.num_held(tenant) + len(new) - limit
        if not new or lacking <= 0:
            return keys
        protected = self._get_request_cache_access(req_context).seen_keys.union(keys)
        lacking -= self._evict_of(tenant, max(lacking, limit // _SLACK), protected)
        if lacking <= 0:
            return keys
        position = req_context.get_offload_key_position
        new.sort(key=lambda key: position(key) or 0)  # the head of a prompt is worth something without its tail
        refused = set(new[max(0, len(new) - lacking) :])
        self.tenants.count_rejected(tenant, refused)
        return [key for key in keys if key not in refused]

    @override
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        self.settle()  # first: else a row above the limit that has just become free would be taken again
        tenant = tenant_of(req_context)
        if (limit := self.tenants.limit(tenant)) is not None:
            keys = self._within_quota(keys, req_context, tenant, limit)
        planned: PrepareStoreOutput | None = super().prepare_store(keys, req_context)
        if planned is None:
            return None
        if planned.evicted_keys:
            self._forget(planned.evicted_keys)
        if self.tenants.counts(tenant):
            self.tenants.charge(tenant, planned.keys_to_store)
        return planned

    def take_in(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> tuple[Sequence[OffloadKey], list[int]]:
        """Give rows to chunks from a far tier; those that have one now, and their rows.

        The chunks are of one cache group, and none of them is here. All get one, or the first of them where their
        tenant may not have more; none does where there is no room.
        vLLM's `prepare_store` does the same for chunks that may be here, and takes half as long again.
        """
        self.settle()
        tenant, taken = tenant_of(req_context), keys
        if (limit := self.tenants.limit(tenant)) is not None:
            taken = list(self._within_quota(keys, req_context, tenant, limit))
        access = self._get_request_cache_access(req_context)
        if new := [key for key in taken if key not in access.store_miss_keys]:
            self._policy.on_store_miss(new, req_context)  # before anything is evicted: ARC learns from it
            access.store_miss_keys.update(new)
        lacking = len(taken) - self._get_num_free_chunks()
        if not taken or lacking > self._num_evictable_cache_chunks or self._evict(lacking) < lacking:
            return [], []
        chunks = self._allocate_chunks(taken)
        for key, chunk in zip(taken, chunks, strict=True):
            self._policy.insert(key, chunk)
        self._num_write_pending_chunks += len(taken)
        self.allocation_sizes_in_current_batch.append(len(taken))
        self._record_insertion(taken, access)
        if self.tenants.counts(tenant):
            self.tenants.charge(tenant, taken)
        return taken, [chunk.chunk_id for chunk in chunks]

    def _record_insertion(self, keys: Sequence[OffloadKey], access: _RequestCacheAccess) -> None:
        """vLLM's `_record_request_cache_access` of new chunks of one cache group."""
        access.inserted_keys.update(keys)
        if unseen := [key for key in keys if key not in access.seen_keys]:
            access.seen_keys.update(unseen)
            access.key_groups.setdefault(get_offload_group_idx(unseen[0]), []).extend(unseen)

    @override
    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        holdings = self.holdings if success else None
        new = [] if holdings is None else [key for key in keys if self._is_pending(key)]
        super().complete_store(keys, req_context, success)
        if not success:
            self.tenants.discharge([key for key in keys if self._policy.get(key) is None])
        if holdings is not None and new:
            chunks = [(key, self._policy.get(key).chunk_id) for key in new]
            holdings.add(chunks, adapter_of(req_context))

    def _is_pending(self, key: OffloadKey) -> bool:
        chunk = self._policy.get(key)
        return chunk is not None and not chunk.is_ready

    @override
    def get_stats(self) -> OffloadingConnectorStats | None:
        stats = super().get_stats()
        if stats is not None:
            self.tenants.count_into(stats)
        return stats

    @override
    def reset_cache(self) -> None:
        super().reset_cache()
        if self.holdings is not None:
            self.holdings.clear()
        self.tenants.clear()
        self._num_chunks = self._limit  # rows are numbered anew from 0
        self._withheld = list(range(self._limit, self.num_reserved))
