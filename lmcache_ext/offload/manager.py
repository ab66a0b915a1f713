"""vLLM's tiering manager, with the promises it does not make.

* A fetch that outlives its deadline is a miss for whoever waits, not a wait without end.
* A request never promotes so many chunks that it evicts its own prefix.
* A row whose copy failed is never published.
* A load pins all of its rows or none.
* The nearest tier that has a chunk gives it, and the tiers nearer than that one are given it, too.

All methods run in the scheduler's thread.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from operator import itemgetter

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
from vllm.v1.kv_offload.tiering.manager import (
    JobMetadata,
    PendingPromotion,
    TieringOffloadingManager,
    _SecondaryTierFacingParent,
)
from vllm.v1.kv_offload.tiering.metrics import TieringMetricsTracker, _TierState

from lmcache_ext.config import Config
from lmcache_ext.offload.far import FarTiers, Opened
from lmcache_ext.offload.host import HostTier
from lmcache_ext.offload.progress import Progress
from lmcache_ext.offload.recent import Recent
from lmcache_ext.offload.tier import StoredTier

_PROMOTABLE_FRACTION = 0.75  # of all rows, for one request
_PROMOTIONS_PER_KEY = 2  # once, and once more if another request evicted it meanwhile

SKIP_SAVE = "lmcache.skip_save"
"""Key in a request's ``kv_transfer_params``, LMCache's: true where what it computes is not to be stored."""


class BoundedTieringManager(TieringOffloadingManager):
    """See the module's docstring."""

    def __init__(
        self, primary_tier: HostTier, secondary_tiers: Sequence[StoredTier], far: FarTiers | None = None
    ) -> None:
        super().__init__(primary_tier, list[SecondaryTierManager](secondary_tiers))
        self.host = primary_tier
        self.far = far
        """Opens and changes the secondary tiers; None where there can be none."""
        self._stored_tiers = list(secondary_tiers)
        self.progress = Progress()
        """Of all far tiers: what requests wait for."""
        for tier in self._stored_tiers:
            tier.progress = self.progress
        self._max_promotions = _max_promotions(primary_tier)
        self._promotions: dict[str, dict[OffloadKey, int]] = {}
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
            far = self._ask_far([key], req_context, exclude_tier_idx)
            if key not in far:
                return LookupResult.MISS
            if (place := far[key]) is None:
                return LookupResult.RETRY
            return LookupResult.HIT_PENDING if self._promote([(place, key)], req_context) else LookupResult.MISS
        if found is LookupResult.HIT_PENDING and self._is_overdue(key):
            return LookupResult.MISS
        return found

    def lookup_prefix(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> int | None:
        """How many of `keys`, from the first on, can be loaded; None while that is not known.

        The same as one `lookup` after the other, until one misses, for less.
        """
        self._maybe_process_finished_jobs()
        chunks = self.host.find(keys)
        missing = [key for key, chunk in zip(keys, chunks, strict=True) if chunk is None]
        if not missing and min([chunk.ref_cnt for chunk in chunks if chunk is not None], default=0) >= 0:
            return len(keys)
        begun = bool(missing) and self._read_ahead(missing, req_context, keys)
        if begun and len(self._stored_tiers) == 1 and len(missing) == len(keys):
            return None
        far = self._ask_far(missing, req_context, 0 if begun else None) if missing else {}
        if begun:
            far = dict.fromkeys(missing)  # what the others say counts once the nearest has answered
        num_ready, waits = 0, False
        promotable: list[tuple[int, OffloadKey]] = []
        for key, chunk in zip(keys, chunks, strict=True):
            if chunk is None:
                if key not in far:
                    break
                if (place := far[key]) is not None:
                    promotable.append((place, key))
                    continue
            elif chunk.is_ready:
                num_ready += not promotable
                continue
            elif self._is_overdue(key):
                break
            waits = waits or not promotable
        if promotable and self._promote(promotable, req_context, keys):
            return None
        return None if waits else num_ready

    def _is_overdue(self, key: OffloadKey) -> bool:
        return any(tier.is_overdue(key) for tier in self._stored_tiers)

    def _ask_far(
        self, keys: Sequence[OffloadKey], req_context: ReqContext, exclude_tier_idx: int | None = None
    ) -> dict[OffloadKey, int | None]:
        """The place of the nearest tier that has each chunk; None while a tier near enough has not answered."""
        found: dict[OffloadKey, int | None] = {}
        for index, tier in enumerate(self._stored_tiers):
            if index == exclude_tier_idx or not req_context.load_tier_filter.allows(tier.medium, tier.locality):
                continue
            asked = [key for key in keys if found.get(key) is None] if found else keys
            for key, is_there in zip(asked, tier.ask(asked, req_context), strict=True):
                if is_there is None:
                    found[key] = None
                elif is_there:
                    found.setdefault(key, index)  # a nearer tier may have it, too, and answers soon
        return found

    def _read_ahead(self, keys: list[OffloadKey], req_context: ReqContext, prefix: Sequence[OffloadKey]) -> bool:
        """Ask the first tier for chunks and lend it rows for them; False where it is to be asked without."""
        tier = self._stored_tiers[0] if self._stored_tiers else None
        if tier is None or not req_context.load_tier_filter.allows(tier.medium, tier.locality):
            return False
        if not tier.would_read_ahead(keys, req_context):
            return False
        num_rows = min(len(keys), self._max_promotions)
        rows = self.host.lend(num_rows, req_context, prefix, may_evict=not self._stores_nothing_of(req_context))
        if rows:
            tier.read_ahead(keys, rows, req_context)
        return bool(rows)

    def _take_loans(self) -> None:
        """Take in what the first tier has read ahead."""
        tier = self._stored_tiers[0]
        for loan in tier.take_loans():
            keys = self.host.take_back(loan.rows, loan.read, loan.req_context)
            if keys and (req_id := loan.req_context.req_id) in self._req_state:
                self._request_load_sources.setdefault(req_id, {}).update(dict.fromkeys(keys, tier.cache_hit_source))
                self._promotions.setdefault(req_id, {}).update(dict.fromkeys(keys, 1))

    @override
    def _process_finished_jobs(self) -> None:
        super()._process_finished_jobs()
        if self._stored_tiers:
            self._take_loans()

    def _promote(
        self, wanted: Sequence[tuple[int, OffloadKey]], req_context: ReqContext, prefix: Sequence[OffloadKey] = ()
    ) -> int:
        """Begin to fetch chunks (tier, key) into host memory, in order; how many there was leave and room for.

        Nothing of their own `prefix` has to go for them.
        """
        promotions = self._promotions.setdefault(req_context.req_id, {})
        num_started = 0
        for place, run in groupby(wanted, itemgetter(0)):
            keys: list[OffloadKey] = []
            for _, key in run:
                times = promotions.get(key, 0)
                if times >= _PROMOTIONS_PER_KEY or len(promotions) >= self._max_promotions:
                    return num_started + self._fetch(place, keys, req_context, prefix)
                promotions[key] = times + 1
                keys.append(key)
            num_fetched = self._fetch(place, keys, req_context, prefix)
            num_started += num_fetched
            if num_fetched < len(keys):
                break
        return num_started

    def _fetch(self, place: int, keys: list[OffloadKey], req_context: ReqContext, prefix: Sequence[OffloadKey]) -> int:
        """vLLM's `_initiate_promotion` for several chunks at once: as many of the first as there are rows for."""
        fitting = keys[: self.host.room(prefix)]
        taken, rows = self.host.take_in(fitting, req_context, prefix)  # fewer, where a quota leaves room for no more
        if len(fitting) < len(keys) or not taken:
            self._metrics.on_promotion_allocation_failure()
        if not taken:
            return 0
        source = self._stored_tiers[place].cache_hit_source
        self._request_load_sources.setdefault(req_context.req_id, {}).update(dict.fromkeys(taken, source))
        pending = self._pending_load_submissions.setdefault(place, {})
        if (entry := pending.get(req_context.req_id)) is None:
            entry = pending[req_context.req_id] = PendingPromotion(req_context)
        entry.keys.extend(taken)
        entry.chunk_ids.extend(rows)
        return len(taken)

    @override
    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """Raises KeyError where a chunk that was found is gone: a promotion may have taken its row since."""
        gone = sum(self.primary_tier.lookup(key, req_context) is not LookupResult.HIT for key in keys)
        if gone:
            raise KeyError(f"request {req_context.req_id}: {gone} of {len(keys)} chunks left host memory after lookup")
        return super().prepare_load(keys, req_context)

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

    def _stores_nothing_of(self, req_context: ReqContext) -> bool:
        return self.frozen or _skips_save(req_context)

    @override
    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        if self._stores_nothing_of(req_context):  # as if all were there: None would be a failure, and tried again
            return PrepareStoreOutput([], self.primary_tier._get_load_store_spec([], []), [])
        return super().prepare_store(keys, req_context)

    @override
    def _should_store_to_tier(self, tier: SecondaryTierManager, num_blocks: int) -> bool:
        if isinstance(tier, StoredTier) and not (tier.present and tier.limits.takes_chunks):
            return False
        wanted: bool = super()._should_store_to_tier(tier, num_blocks)
        return wanted

    @override
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        super().on_schedule_end(context)
        self.host.settle()

    @override
    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        super().complete_load(keys, req_context)
        self.progress.advance()  # another request may wait for the same chunks

    @override
    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        if not self._unwritten.isdisjoint(keys):
            self._unwritten.difference_update(keys)
            success = False
        if success and self.stored is not None:
            self.stored.add(keys)
        super().complete_store(keys, req_context, success)
        self.progress.advance()

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


def _skips_save(req_context: ReqContext) -> bool:
    params = req_context.kv_transfer_params
    value = params.get(SKIP_SAVE) if params else None
    return bool(value) and str(value).lower() not in ("false", "0", "no", "off")
