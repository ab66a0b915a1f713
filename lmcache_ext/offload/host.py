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
from lmcache_ext.offload.policies import evict_among, finder, insert_ready, is_plain_lru, resident
from lmcache_ext.offload.tenants import Tenants, tenant_of

logger = init_logger("vllm.lmcache_ext.offload.host")

_LENDABLE_FRACTION = 0.5  # of all rows, at once;
_EVICTED_FRACTION = 0.125  # and of them, where chunks are evicted for what may be there
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
        self._num_lent = 0
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

    def room(self, spared: Iterable[OffloadKey] = ()) -> int:
        """How many rows new chunks may have: those that are free, and those that may be evicted, less `spared`."""
        return int(self._get_num_free_chunks() + self._num_evictable_cache_chunks) - len(self._evictable(spared))

    def find(self, keys: Iterable[OffloadKey]) -> list[ChunkStatus | None]:
        """What is known of each chunk; None where it is not here."""
        return list(map(finder(self._policy), keys))

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

    def _evict(self, num_rows: int, spared: Iterable[OffloadKey] = ()) -> int:
        """Free up to `num_rows` rows, of those that are not pinned, and not of `spared`; how many."""
        if num_rows <= 0:
            return 0
        protected = self._evictable(spared)
        num_rows = min(num_rows, self._num_evictable_cache_chunks - len(protected))
        return self._drop(self._policy.evict(num_rows, protected) or ()) if num_rows > 0 else 0

    def _evictable(self, keys: Iterable[OffloadKey]) -> set[OffloadKey]:
        get = finder(self._policy)
        return {key for key in keys if (chunk := get(key)) is not None and chunk.ref_cnt == 0}

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

    # -- rows on loan ----------------------------------------------------------------------------

    def lend(
        self, num_rows: int, req_context: ReqContext, spared: Iterable[OffloadKey], *, may_evict: bool
    ) -> list[int]:
        """Up to `num_rows` rows for chunks that a far tier may have; to be given back by `take_back`, once.

        A prompt that is not here needs them in any case, to be fetched or to be stored, so older chunks go for them
        now, but for `spared`; and only for so many at a time, for the requests that wait are many. None for who has a
        quota.
        """
        if self.tenants.limit(tenant_of(req_context)) is not None:
            return []
        self.settle()
        num_rows = min(num_rows, int(self._limit * _LENDABLE_FRACTION) - self._num_lent)
        lacking = num_rows - self._get_num_free_chunks()
        if may_evict and 0 < lacking <= int(self._limit * _EVICTED_FRACTION) - self._num_lent:
            lacking -= self._evict(lacking, spared)
        num_rows -= max(0, lacking)
        if num_rows <= 0:
            return []
        self._num_lent += num_rows
        self._num_write_pending_chunks += num_rows
        return self._take_rows(num_rows)

    def _take_rows(self, num_rows: int) -> list[int]:
        """As vLLM's `_allocate_chunks`: so many are free."""
        first = self._num_allocated_chunks
        self._num_allocated_chunks = min(first + num_rows, self._num_chunks)
        fresh = list(range(first, self._num_allocated_chunks))
        kept = len(self._free_list) - (num_rows - len(fresh))
        used: list[int] = self._free_list[kept:]
        del self._free_list[kept:]
        return fresh + used

    def take_back(
        self, rows: Sequence[int], read: dict[OffloadKey, ChunkStatus], req_context: ReqContext
    ) -> dict[OffloadKey, ChunkStatus]:
        """End a loan of `rows`; what was `read` into them, chunks of one cache group, is here from now on.

        Returns those that were not here already.
        """
        self._num_lent -= len(rows)
        self._num_write_pending_chunks -= len(rows)
        get = finder(self._policy)
        new = {key: chunk for key, chunk in read.items() if get(key) is None}
        if len(new) < len(rows):
            used = {chunk.chunk_id for chunk in new.values()}
            self._free_list.extend(row for row in rows if row not in used)
        if new:
            self._insert_read(new, req_context)
        return new

    def _insert_read(self, chunks: dict[OffloadKey, ChunkStatus], req_context: ReqContext) -> None:
        """What `take_in` and `complete_store` do, for chunks that are whole."""
        if is_plain_lru(self._policy):
            insert_ready(self._policy, chunks)
        else:
            self._insert_one_by_one(chunks, req_context)
        self._num_evictable_cache_chunks += len(chunks)
        self.allocation_sizes_in_current_batch.append(len(chunks))
        tenant = tenant_of(req_context)
        if self.tenants.counts(tenant):
            self.tenants.charge(tenant, list(chunks))
        if self.events is not None:
            self.events.append(OffloadingEvent(keys=list(chunks), medium=self.medium, removed=False))
        if self.holdings is not None:
            self.holdings.add([(key, chunk.chunk_id) for key, chunk in chunks.items()], adapter_of(req_context))

    def _insert_one_by_one(self, chunks: dict[OffloadKey, ChunkStatus], req_context: ReqContext) -> None:
        access, keys = self._get_request_cache_access(req_context), list(chunks)
        self._observe_misses(keys, access, req_context)
        for key, chunk in chunks.items():
            self._policy.insert(key, chunk)
        if not access.finished:
            self._record_insertion(keys, access)

    def _observe_misses(self, keys: Sequence[OffloadKey], access: _RequestCacheAccess, req_context: ReqContext) -> None:
        if new := [key for key in keys if key not in access.store_miss_keys]:
            self._policy.on_store_miss(new, req_context)
            access.store_miss_keys.update(new)

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

    def take_in(
        self, keys: Sequence[OffloadKey], req_context: ReqContext, spared: Iterable[OffloadKey] = ()
    ) -> tuple[Sequence[OffloadKey], list[int]]:
        """Give rows to chunks from a far tier; those that have one now, and their rows.

        The chunks are of one cache group, and none of them is here. All get one, or the first of them where their
        tenant may not have more; none does where there is no `room`.
        vLLM's `prepare_store` does the same for chunks that may be here, and takes half as long again.
        """
        self.settle()
        tenant, taken = tenant_of(req_context), keys
        if (limit := self.tenants.limit(tenant)) is not None:
            taken = list(self._within_quota(keys, req_context, tenant, limit))
        access = self._get_request_cache_access(req_context)
        self._observe_misses(taken, access, req_context)  # before anything is evicted: ARC learns from it
        lacking = len(taken) - self._get_num_free_chunks()
        if not taken or len(taken) > self.room(spared) or self._evict(lacking, spared) < max(0, lacking):
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
        assert not self._num_lent, f"{self._num_lent} rows are being read into"
        super().reset_cache()
        if self.holdings is not None:
            self.holdings.clear()
        self.tenants.clear()
        self._num_chunks = self._limit  # rows are numbered anew from 0
        self._withheld = list(range(self._limit, self.num_reserved))
