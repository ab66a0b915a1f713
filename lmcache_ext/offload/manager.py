"""vLLM's tiering manager, with the promises it does not make.

* A fetch that outlives its deadline is a miss for whoever waits, not a wait without end.
* A request never promotes so many chunks that it evicts its own prefix.
* A row whose copy failed is never published.
* A load pins all of its rows or none.
* The nearest tier that has a chunk gives it, and the tiers nearer than that one are given it, too.

All methods run in the scheduler's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from typing_extensions import override
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
from vllm.v1.kv_offload.tiering.manager import JobMetadata, TieringOffloadingManager, _SecondaryTierFacingParent
from vllm.v1.kv_offload.tiering.metrics import TieringMetricsTracker, _TierState

from lmcache_ext.config import Config
from lmcache_ext.offload.far import FarTiers, Opened
from lmcache_ext.offload.host import HostTier
from lmcache_ext.offload.progress import Progress
from lmcache_ext.offload.recent import Recent
from lmcache_ext.offload.tier import StoredTier

_PROMOTABLE_FRACTION = 0.75  # of all rows, for one request
_PROMOTIONS_PER_KEY = 2  # once, and once more if another request evicted it meanwhile


class BoundedTieringManager(TieringOffloadingManager):
    """See the module's docstring."""

    def __init__(
        self, primary_tier: HostTier, secondary_tiers: list[SecondaryTierManager], far: FarTiers | None = None
    ) -> None:
        super().__init__(primary_tier, secondary_tiers)
        self.host = primary_tier
        self.far = far
        """Opens and changes the secondary tiers; None where there can be none."""
        self._stored_tiers = [tier for tier in secondary_tiers if isinstance(tier, StoredTier)]
        self.progress = Progress()
        """Of all far tiers: what requests wait for."""
        for tier in self._stored_tiers:
            tier.progress = self.progress
        self._max_promotions = _max_promotions(primary_tier)
        self._promotions: dict[str, Counter[OffloadKey]] = {}
        self._unwritten: set[OffloadKey] = set()
        self.stored: Recent | None = None
        """Where somebody wants to know, the keys that were stored lately."""
        self.frozen = False
        """Whether no new chunk is taken in. What is there is found and loaded, from far tiers too."""

    @property
    def far_tiers(self) -> list[StoredTier]:
        """The tiers behind host memory that have a store, nearest first."""
        return [tier for tier in self._stored_tiers if tier.present]

    def set_num_rows(self, num_rows: int) -> None:
        """Let so many rows of host memory hold chunks, between two steps."""
        self.host.set_limit(num_rows)
        self._max_promotions = _max_promotions(self.host)

    def set_busy(self, busy: bool) -> None:
        """Whether the engine computes in this step: what is written behind it waits a little, if so."""
        if self.far is not None:
            self.far.pool.set_busy(busy)

    def change_far(self, before: Config, after: Config, opened: Opened | None) -> None:
        """Bring the far tiers of `after` into effect, between two steps."""
        if self.far is None:
            return
        new = self.far.change(before, after, opened, self.host.limit)
        if new is not None:
            self._append(new)
        self._metrics._tier_types[:] = [tier.tier_type for tier in self.secondary_tiers]
        TieringMetricsTracker.tier_label.cache_clear()

    def _append(self, tier: StoredTier) -> None:
        """One more place at the end: nothing that runs refers to places behind its own."""
        index = len(self.secondary_tiers)
        tier.progress = self.progress
        self.secondary_tiers.append(tier)
        self._stored_tiers.append(tier)
        self._tier_parents[tier] = _SecondaryTierFacingParent(self, index)
        self._tier_index[tier] = index
        self._metrics._tier_states.append(_TierState())

    def mark_unwritten(self, keys: Collection[OffloadKey]) -> None:
        """The rows of `keys` did not get their bytes: their store job will complete as a failure."""
        self._unwritten.update(keys)

    @override
    def lookup(self, key: OffloadKey, req_context: ReqContext, *, exclude_tier_idx: int | None = None) -> LookupResult:
        # vLLM's own lookup also times every chunk in every tier, which costs more than the lookup; the
        # tiers count queries and hits themselves.
        self._maybe_process_finished_jobs()
        found = self.primary_tier.lookup(key, req_context)
        if found is LookupResult.MISS:
            return self._lookup_far(key, req_context, exclude_tier_idx)
        if found is LookupResult.HIT_PENDING:
            for tier in self._stored_tiers:
                if tier.is_overdue(key):
                    return LookupResult.MISS
        return found

    def _lookup_far(self, key: OffloadKey, req_context: ReqContext, exclude_tier_idx: int | None) -> LookupResult:
        retry = False
        for index, tier in enumerate(self.secondary_tiers):
            if index == exclude_tier_idx or not req_context.load_tier_filter.allows(tier.medium, tier.locality):
                continue
            found = tier.lookup(key, req_context)
            if found is LookupResult.HIT and not retry:  # a nearer tier may have it, and answers soon
                promoted = self._initiate_promotion(index, key, req_context)
                return LookupResult.HIT_PENDING if promoted else LookupResult.MISS
            retry |= found is LookupResult.RETRY
        return LookupResult.RETRY if retry else LookupResult.MISS

    @override
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """Raises KeyError where a chunk that was found is gone: a promotion may have taken its row since."""
        gone = sum(self.primary_tier.lookup(key, req_context) is not LookupResult.HIT for key in keys)
        if gone:
            raise KeyError(f"request {req_context.req_id}: {gone} of {len(keys)} chunks left host memory after lookup")
        return super().prepare_load(keys, req_context)

    @override
    def _initiate_promotion(self, tier_idx: int, key: OffloadKey, req_context: ReqContext) -> bool:
        promotions = self._promotions.setdefault(req_context.req_id, Counter())
        if promotions[key] >= _PROMOTIONS_PER_KEY or len(promotions) >= self._max_promotions:
            return False
        promotions[key] += 1
        started: bool = super()._initiate_promotion(tier_idx, key, req_context)
        return started

    @override
    def _complete_promotion(self, job_metadata: JobMetadata, completed_job: JobResult) -> None:
        super()._complete_promotion(job_metadata, completed_job)
        job = job_metadata.transfer_job
        keys = list(job.keys if completed_job.success else completed_job.successful_keys or ())
        if not keys or self.frozen:
            return
        for index, tier in enumerate(self.secondary_tiers[: job_metadata.tier_idx]):
            keeps = isinstance(tier, StoredTier) and tier.limits.keeps_promoted
            if keeps and self._should_store_to_tier(tier, len(keys)):
                tier.submit_store(self.create_store_job(keys, job.req_context, index))

    @override
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        if self.frozen:  # as if all of them were there: None would be a failure, and tried again
            return PrepareStoreOutput([], self.primary_tier._get_load_store_spec([], []), [])
        return super().prepare_store(keys, req_context)

    @override
    def _should_store_to_tier(self, tier: SecondaryTierManager, num_blocks: int) -> bool:
        if isinstance(tier, StoredTier) and not tier.present:
            return False
        wanted: bool = super()._should_store_to_tier(tier, num_blocks)
        return wanted

    @override
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        super().on_schedule_end(context)
        self.host.settle()

    @override
    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        if not self._unwritten.isdisjoint(keys):
            self._unwritten.difference_update(keys)
            success = False
        if success and self.stored is not None:
            self.stored.add(keys)
        super().complete_store(keys, req_context, success)

    @override
    def on_request_finished(self, req_context: ReqContext, *, exclude_tier_idx: int | None = None) -> None:
        self._promotions.pop(req_context.req_id, None)
        super().on_request_finished(req_context, exclude_tier_idx=exclude_tier_idx)

    @override
    def reset_cache(self) -> None:
        self._unwritten.clear()
        super().reset_cache()


def _max_promotions(host: HostTier) -> int:
    return max(1, int(host.limit * _PROMOTABLE_FRACTION))
