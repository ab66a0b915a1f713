"""Host memory as the tier next to the GPU: rows, some of which may be withheld while the engine runs.

Rows are reserved when the engine starts, pinned and mapped by every process; no more can be had later. How many
of them hold chunks can change: withheld rows stay reserved and are used by nobody.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from typing_extensions import override
from vllm.v1.kv_offload.base import OffloadingEvent, OffloadKey, PrepareStoreOutput, ReqContext
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager


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

    def _evict(self, num_rows: int) -> None:
        """Free up to `num_rows` rows, of those that are not pinned."""
        num_rows = min(num_rows, self._num_evictable_cache_chunks)
        evicted = self._policy.evict(num_rows, set()) if num_rows > 0 else None
        if not evicted:
            return
        self._num_evictable_cache_chunks -= len(evicted)
        for _, chunk in evicted:
            self._free_chunk(chunk)
        if self.events is not None:
            keys = [key for key, _ in evicted]
            self.events.append(OffloadingEvent(keys=keys, medium=self.medium, removed=True))

    @override
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        self.settle()  # first: else a row above the limit that has just become free would be taken again
        return super().prepare_store(keys, req_context)

    @override
    def reset_cache(self) -> None:
        super().reset_cache()
        self._num_chunks = self._limit  # rows are numbered anew from 0
        self._withheld = list(range(self._limit, self.num_reserved))
