"""Host memory as the tier next to the GPU: rows, some of which may be withheld while the engine runs.

Rows are reserved when the engine starts, pinned and mapped by every process; no more can be had later. How many
of them hold chunks can change: withheld rows stay reserved and are used by nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from typing_extensions import override
from vllm.v1.kv_offload.base import OffloadingEvent, OffloadKey, PrepareStoreOutput, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager

from lmcache_ext.offload.holdings import Holdings
from lmcache_ext.offload.lookups import adapter_of


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

    def settle(self) -> None:
        """Withhold rows above the limit, as far as nothing pins them; give back those below it."""
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
        evicted = self._policy.evict(num_rows, set()) if num_rows > 0 else None
        if not evicted:
            return 0
        self._num_evictable_cache_chunks -= len(evicted)
        for _, chunk in evicted:
            self._free_chunk(chunk)
        keys = [key for key, _ in evicted]
        if self.holdings is not None:
            self.holdings.remove(keys)
        if self.events is not None:
            self.events.append(OffloadingEvent(keys=keys, medium=self.medium, removed=True))
        return len(evicted)

    @override
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        self.settle()  # first: else a row above the limit that has just become free would be taken again
        planned: PrepareStoreOutput | None = super().prepare_store(keys, req_context)
        if self.holdings is not None and planned is not None and planned.evicted_keys:
            self.holdings.remove(planned.evicted_keys)
        return planned

    @override
    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        holdings = self.holdings if success else None
        new = [] if holdings is None else [key for key in keys if self._is_pending(key)]
        super().complete_store(keys, req_context, success)
        if holdings is not None and new:
            chunks = [(key, self._policy.get(key).chunk_id) for key in new]
            holdings.add(chunks, adapter_of(req_context))

    def _is_pending(self, key: OffloadKey) -> bool:
        chunk = self._policy.get(key)
        return chunk is not None and not chunk.is_ready

    @override
    def reset_cache(self) -> None:
        super().reset_cache()
        if self.holdings is not None:
            self.holdings.clear()
        self._num_chunks = self._limit  # rows are numbered anew from 0
        self._withheld = list(range(self._limit, self.num_reserved))
