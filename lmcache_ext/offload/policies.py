"""Which row goes first: LMCache's replacement policies that vLLM does not bring (it has LRU and ARC).

Each differs from LRU only in the rank a row gets; the row with the smallest rank leaves first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from itertools import chain, islice

from typing_extensions import override
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.arc import ARCCachePolicy
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy


class FIFOCachePolicy(LRUCachePolicy):
    """First in, first out: a row keeps the rank of its insertion."""

    @override
    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        return

    @override
    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        return


class MRUCachePolicy(LRUCachePolicy):
    """Most recently used leaves first: ranks count downwards."""

    @override
    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        self._next_rank -= 2  # the parent adds one
        super().insert(key, chunk)

    @override
    def _assign_new_rank(self, key: OffloadKey) -> bool:
        if key in self.chunks:
            self._next_rank -= 2
        evictable: bool = super()._assign_new_rank(key)
        return evictable


class LFUCachePolicy(LRUCachePolicy):
    """Least frequently used leaves first; among equals, the least recently used."""

    _TICK_BITS = 48  # ticks last for 2**48 uses before they would spill into the count

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._uses: Counter[OffloadKey] = Counter()

    @override
    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        super().insert(key, chunk)
        self._uses[key] = 1
        self._ranks[key] |= 1 << self._TICK_BITS

    @override
    def _assign_new_rank(self, key: OffloadKey) -> bool:
        evictable: bool = super()._assign_new_rank(key)
        if key in self.chunks:
            self._uses[key] += 1
            self._ranks[key] |= self._uses[key] << self._TICK_BITS
        return evictable

    @override
    def remove(self, key: OffloadKey) -> None:
        super().remove(key)
        self._uses.pop(key, None)

    @override
    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        evicted: list[tuple[OffloadKey, ChunkStatus]] | None = super().evict(n, protected)
        for key, _ in evicted or ():
            self._uses.pop(key, None)
        return evicted

    @override
    def clear(self) -> None:
        super().clear()
        self._uses.clear()


# -- of many keys at once ------------------------------------------------------------------------------


def finder(policy: CachePolicy) -> Callable[[OffloadKey], ChunkStatus | None]:
    """What finds a chunk, as `get` does; for most policies without a call of Python."""
    get: Callable[[OffloadKey], ChunkStatus | None]
    get = policy.chunks.get if isinstance(policy, LRUCachePolicy) else policy.get
    return get


def insert_ready(policy: LRUCachePolicy, chunks: Mapping[OffloadKey, ChunkStatus]) -> None:
    """Insert chunks of one prompt, in its order, that are whole and that nothing pins, into plain LRU.

    As so many calls of `insert`, and then of `touch`: the head of a prompt leaves after its tail.
    """
    ranks = range(policy._next_rank + len(chunks), policy._next_rank, -1)
    policy._next_rank += len(chunks)
    policy.chunks.update(chunks)
    policy._ranks.update(zip(chunks, ranks, strict=True))
    policy._evictable.update(chunks)
    policy._heap.extend(zip(reversed(ranks), reversed(chunks), strict=True))  # in order, and no rank is above these


def is_plain_lru(policy: CachePolicy) -> bool:
    """Whether it is LRU and no more than that: what a request did not load it has not used."""
    return type(policy) is LRUCachePolicy


# -- of some keys only ---------------------------------------------------------------------------------


def resident(policy: CachePolicy) -> list[OffloadKey]:
    """The keys of all chunks."""
    if isinstance(policy, ARCCachePolicy):
        return [*policy.t1, *policy.t2]
    assert isinstance(policy, LRUCachePolicy)
    return list(policy.chunks)


def evict_among(
    policy: CachePolicy, keys: Collection[OffloadKey], num: int, protected: Set[OffloadKey]
) -> list[tuple[OffloadKey, ChunkStatus]]:
    """Evict up to `num` chunks of `keys` that nothing pins, those first that the policy values least.

    Takes 0.1 us for each of `keys` (ARC: of all chunks). ARC's ghost lists do not hear of it: that one tenant has
    too many chunks does not mean that recency or frequency counts for too little.
    """
    chosen: Iterable[OffloadKey]
    if isinstance(policy, ARCCachePolicy):
        in_order = chain(policy.t1.items(), policy.t2.items())
        chosen = islice(
            (key for key, chunk in in_order if chunk.ref_cnt == 0 and key in keys and key not in protected), num
        )
    else:
        assert isinstance(policy, LRUCachePolicy)
        evictable = policy._evictable
        free = (key for key in keys if key in evictable and key not in protected)
        chosen = heapq.nsmallest(num, free, key=policy._ranks.__getitem__)
    evicted = []
    for key in list(chosen):
        chunk = policy.get(key)
        assert chunk is not None
        policy.remove(key)
        evicted.append((key, chunk))
    return evicted
