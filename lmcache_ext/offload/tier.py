"""StoredTier: any store, behind any serde, as a secondary tier of vLLM's offloading framework.

Threads:  every public method runs in the scheduler's thread and returns at once; store work runs in
          the `JobPool`, existence checks in vLLM's `AsyncLookupManager` thread.
Order:    none between jobs.
Owner:    rows named by a job are pinned by the framework until the job is reported. Every job is
          reported exactly once, failed ones too: a job unreported pins its rows for ever.
Failure:  a failed fetch is a miss, a failed store is a drop; both are counted, neither raises.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    OffloadPolicy,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import (
    JobId,
    JobResult,
    SecondaryTierManager,
    TieringOffloadingMetrics,
    TransferJob,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmcache_ext.errors import StoreTimeout
from lmcache_ext.offload import metrics
from lmcache_ext.offload.admission import Admission
from lmcache_ext.offload.ahead import Loan, ReadAhead
from lmcache_ext.offload.backing import Backing
from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.offload.lookups import Lookups, adapter_of, far_key, settle
from lmcache_ext.offload.progress import Progress
from lmcache_ext.offload.serdes import readable_serdes
from lmcache_ext.serde.base import Serde
from lmcache_ext.stores.base import Usage
from lmcache_ext.stores.guard import READ, Guarded
from lmcache_ext.stores.jobs import JobPool

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

logger = init_logger("vllm.lmcache_ext.offload.tier")

_SOURCES = {"disk": CacheHitSource.DISK, "peer": CacheHitSource.P2P}
"""By the store's name; of other stores vLLM's metrics have no word."""

CHUNKS_PER_TASK = 4  # small enough that a fetch overtakes a long write-behind
_GAUGE_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class TierLimits:
    """Bounds of one tier. Seconds, and chunks written behind that may be pinned at once."""

    lookup_timeout_s: float
    fetch_timeout_s: float
    flush_timeout_s: float
    max_pending_stores: int
    min_uses: int = 1
    """A chunk is written once so many requests have used it lately."""
    keeps_promoted: bool = True
    """Whether what was found in a tier farther away is written here, too."""
    takes_chunks: bool = True
    """Whether anything is written here at all."""


@dataclass(slots=True)
class _Job:
    """A job on its way through the pool, in tasks."""

    job_id: JobId
    backing: Backing
    chunks_per_task: int
    num_tasks: int
    begin: float
    num_keys: int
    done: list[OffloadKey] = field(default_factory=list)


class StoredTier(SecondaryTierManager):
    """See the module's docstring."""

    def __init__(
        self,
        spec: OffloadingSpec,
        primary_kv_view: memoryview,
        *,
        store: Guarded,
        serde: Serde,
        namespace: bytes,
        pool: JobPool,
        limits: TierLimits,
    ) -> None:
        super().__init__(spec, primary_kv_view, store.name)
        self.medium = Medium.STORAGE  # the framework reads it off the instance
        self._rows: np.ndarray[Any, np.dtype[np.uint8]] | None = np.asarray(primary_kv_view).view(np.uint8)
        self._namespace = namespace
        self._pool = pool
        self.limits = limits
        self.progress = Progress()
        """Told of answers and ended jobs; one for all tiers, once they have a manager."""
        self.present = True
        """Whether there is a store; without one every lookup is a miss, and nothing may be submitted."""
        self._retired: list[Backing] = []
        self._ahead = ReadAhead(pool, self._views, self._tell, CHUNKS_PER_TASK)
        self._backing = self._put(store, serde)
        self._loading: dict[JobId, TransferJob] = {}
        self._due: dict[OffloadKey, float] = {}
        self._abandoned: set[OffloadKey] = set()
        self._num_abandoned = 0
        self._num_queries = 0
        self._num_hits = 0
        self._reads: list[Loan] = []
        self._pending_stores = 0
        self._lock = threading.Lock()
        self._finished: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._usage = Usage(None, None, None)
        self._gauges_due = 0.0
        self._was_up = True

    # -- the store -------------------------------------------------------------------------------

    def _put(self, store: Guarded, serde: Serde) -> Backing:
        self.tier_type = store.name
        self._admission = Admission()  # what was written to another store is not in this one
        self.cache_hit_source = _SOURCES.get(store.name, CacheHitSource.EXTERNAL_UNSPECIFIED)
        chunks = ChunkIO(store, serde, self._namespace, readable_serdes())
        return Backing(store, chunks, Lookups(store.name, chunks, self._tell, self._ahead.begin))

    def replace(self, store: Guarded | None, serde: Serde | None = None) -> None:
        """Put another store in place, or none, between two steps.

        Jobs of the old one finish on it, then it is closed. What was looked up there is looked up again.
        """
        if self.present:
            self._backing.lookups.flush()  # what has been lent comes back
            self._backing.retire()
            self._retired.append(self._backing)
        self.present = store is not None
        if store is not None and serde is not None:
            self._backing = self._put(store, serde)
            self._gauges_due = 0.0
            self._usage = Usage(None, None, None)

    @property
    def store(self) -> Guarded:
        """The store of jobs that begin now; the last one while there is none."""
        return self._backing.store

    # -- lookups ---------------------------------------------------------------------------------

    @override
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        (is_there,) = self.ask([key], req_context)
        if is_there is None:
            return LookupResult.RETRY
        return LookupResult.HIT if is_there else LookupResult.MISS

    def ask(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> list[bool | None]:
        """Whether the store has each chunk; None while it is being asked, which the end of the step begins."""
        if not self._can_ask(req_context):
            return [False] * len(keys)
        found = self._backing.lookups.ask(keys, req_context, self.limits.lookup_timeout_s)
        self._count(found)
        return found

    def _can_ask(self, req_context: ReqContext) -> bool:
        return self.present and adapter_of(req_context) != "" and not self.store.is_open(READ)

    def _count(self, found: Sequence[bool | None]) -> None:
        wanted = found[: found.index(False) + 1] if False in found else found  # nobody needs what is behind it
        self._num_queries += len(wanted) - wanted.count(None)
        self._num_hits += wanted.count(True)

    def would_read_ahead(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> bool:
        """Whether the store can be asked, and has not been asked for any of the chunks yet."""
        return self._can_ask(req_context) and self._backing.lookups.is_new(keys)

    def read_ahead(self, keys: list[OffloadKey], rows: list[int], req_context: ReqContext) -> None:
        """Ask for chunks, and read what is there into `rows`, lent for the first of them until `take_loans`."""
        backing, limits = self._backing, self.limits
        backing.hold()
        self._ahead.lend()
        due = time.monotonic() + limits.lookup_timeout_s
        backing.lookups.ask_for(
            Loan(keys, req_context, due, rows, release=backing.release, fetch_timeout_s=limits.fetch_timeout_s)
        )

    def take_loans(self) -> list[Loan]:
        """Those that are back; what they found is the answer to whoever asks."""
        loans = self._ahead.take()
        for loan in loans:
            settle(loan, loan.found)
            self._count(loan.found)
            if loan.num_read:
                self._reads.append(loan)
        return loans

    def verdict(self, key: OffloadKey) -> str:
        """What is known here of a chunk: has, miss, slow (asked, no answer), off (its breaker is open), not asked."""
        if self.store.is_open(READ):
            return "off"
        return self._backing.lookups.verdict(key)

    def is_overdue(self, key: OffloadKey) -> bool:
        """Whether the chunk is being fetched for longer than anybody should wait."""
        due = self._due.get(key)
        if due is None or time.monotonic() < due:
            return False
        if key not in self._abandoned:
            self._abandoned.add(key)
            self._num_abandoned += 1
        return True

    @override
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """With admission, every request offers all of its chunks: those that are in host memory already, too."""
        counts = self.present and self.limits.min_uses > 1
        return RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL if counts else OffloadPolicy.CHUNK_LEVEL)

    @override
    def on_request_finished(self, req_context: ReqContext) -> None:
        self._backing.lookups.cleanup(req_context.req_id)

    @override
    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._backing.lookups.flush()

    # -- jobs ------------------------------------------------------------------------------------

    @override
    def submit_load(self, job_metadata: TransferJob) -> None:
        decodes = self._backing.chunks.decodes
        job = self._start(job_metadata, 1 if decodes else CHUNKS_PER_TASK)  # one is decoded while the next arrives
        self._loading[job.job_id] = job_metadata
        due = job.begin + self.limits.fetch_timeout_s
        self._due.update(dict.fromkeys(job_metadata.keys, due))
        self._submit(job, job_metadata, _in_order(job_metadata), self._fetch, urgent=True)

    @override
    def submit_store(self, job_metadata: TransferJob) -> None:
        job = self._start(job_metadata)
        offered = self._admitted(job, _in_order(job_metadata))
        room, refused = self._room(job_metadata)
        if len(offered) > room:
            job.backing.chunks.count_dropped(refused, len(offered) - max(room, 0))
        kept = offered[: max(room, 0)]
        if job.num_keys and not kept:
            job.num_tasks = 1
            self._finish(job, ())
            return
        job.num_tasks = _num_tasks(len(kept), job.chunks_per_task)
        with self._lock:
            self._pending_stores += len(kept)
        self._submit(job, job_metadata, kept, self._keep, urgent=False)

    @override
    def get_finished_jobs(self) -> Iterable[JobResult]:
        results: list[JobResult] = []
        while not self._finished.empty():
            result = self._finished.get_nowait()
            if result.job_id in self._loading:
                self._forget_load(result)
            elif self.limits.min_uses > 1:
                self._admission.written(result.successful_keys or ())
            results.append(result)
        return results

    @override
    def drain_jobs(self) -> None:
        self._backing.lookups.flush()
        self._ahead.drain()
        self._pool.drain()

    @override
    def shutdown(self) -> None:
        if self._rows is None:
            return
        self._backing.lookups.stop(self.limits.lookup_timeout_s)
        self._ahead.close()
        flushed = self._pool.drain(self.limits.flush_timeout_s)
        if self.present:
            self.store.close()
        if not flushed:  # a thread is still inside a row: the region must stay mapped
            raise StoreTimeout(f"{self.tier_type}: work left after {self.limits.flush_timeout_s} s of flushing")
        self._rows = None
        self._primary_kv_view = memoryview(b"")

    # -- statistics ------------------------------------------------------------------------------

    @override
    def get_stats(self) -> OffloadingConnectorStats | None:
        stats = OffloadingConnectorStats()
        tier = self.tier_type
        for backing in (self._backing, *self._retired):
            _count(backing, stats)
        self._retired = [backing for backing in self._retired if not backing.closed]
        if self._num_queries:
            stats.increase_counter(TieringOffloadingMetrics.CHUNK_QUERIES, self._num_queries, (tier,))
            stats.increase_counter(TieringOffloadingMetrics.CHUNK_HITS, self._num_hits, (tier,))
            self._num_queries = self._num_hits = 0
        for loan in self._reads:
            self._count_read(loan, stats)
        self._reads.clear()
        if self._num_abandoned:
            stats.increase_counter(metrics.ABANDONED_CHUNKS, self._num_abandoned, (tier,))
            self._num_abandoned = 0
        if self.present:
            self._gauge(stats)
        return stats

    def _count_read(self, loan: Loan, stats: OffloadingConnectorStats) -> None:
        """As vLLM counts a job; it numbers tiers from 1, and the first is the one that reads ahead."""
        label, num_read = (f"1:{self.tier_type}",), len(loan.read)
        stats.increase_counter(TieringOffloadingMetrics.READ_BYTES, num_read * self.block_size_bytes, label)
        stats.increase_counter(TieringOffloadingMetrics.READ_TIME, loan.seconds, label)
        if num_read < loan.num_read:
            stats.increase_counter(TieringOffloadingMetrics.PROMOTION_JOB_FAILURES, 1, label)
        if loan.is_late:
            self._num_abandoned += loan.num_read

    def _gauge(self, stats: OffloadingConnectorStats) -> None:
        now, is_up = time.monotonic(), not self.store.is_open(READ)
        if now < self._gauges_due and is_up == self._was_up:
            return
        self._gauges_due, self._was_up = now + _GAUGE_INTERVAL_S, is_up
        self._backing.hold()
        if not self._pool.submit(self._look_at_usage, self._backing):
            self._backing.release()
        tier, usage = self.tier_type, self._usage
        stats.set_gauge(metrics.TIER_UP, int(is_up), (tier,))
        if usage.used_bytes is not None:
            stats.set_gauge(metrics.TIER_USED_BYTES, usage.used_bytes, (tier,))
        if usage.capacity_bytes is not None:
            stats.set_gauge(metrics.TIER_CAPACITY_BYTES, usage.capacity_bytes, (tier,))

    def _look_at_usage(self, backing: Backing) -> None:
        """In a pool thread: a walk over a directory, or a round trip."""
        try:
            self._usage = backing.store.usage()
        finally:
            backing.release()

    # -- what the pool's threads run -------------------------------------------------------------

    def _fetch(self, job: _Job, keys: list[OffloadKey], rows: list[memoryview], adapter: str | None) -> None:
        done = []
        try:
            good = job.backing.chunks.fetch([far_key(key, adapter) for key in keys], rows)
            done = [key for key, is_good in zip(keys, good, strict=True) if is_good]
        finally:
            rows.clear()  # the pool may hold on to its arguments for longer than `drain` waits
            self._finish(job, done)

    def _keep(self, job: _Job, keys: list[OffloadKey], rows: list[memoryview], adapter: str | None) -> None:
        done = []
        try:
            good = job.backing.chunks.keep([far_key(key, adapter) for key in keys], rows)
            done = [key for key, is_good in zip(keys, good, strict=True) if is_good]
        finally:
            rows.clear()
            with self._lock:
                self._pending_stores -= len(keys)
            self._finish(job, done)

    def _finish(self, job: _Job, done: Sequence[OffloadKey]) -> None:
        with self._lock:
            job.done.extend(done)
            job.num_tasks -= 1
            if job.num_tasks:
                return
        job.backing.release()
        self._finished.put(
            JobResult(
                job.job_id,
                success=len(job.done) == job.num_keys,
                successful_keys=job.done,
                transfer_time=time.monotonic() - job.begin,
                transfer_bytes=len(job.done) * self.block_size_bytes,
            )
        )
        self._tell()

    def _tell(self) -> None:
        self.progress.advance()

    # -- inside ----------------------------------------------------------------------------------

    def _start(self, job_metadata: TransferJob, chunks_per_task: int = CHUNKS_PER_TASK) -> _Job:
        num_keys = len(job_metadata.keys)
        num_tasks = _num_tasks(num_keys, chunks_per_task)
        self._backing.hold()
        return _Job(job_metadata.job_id, self._backing, chunks_per_task, num_tasks, time.monotonic(), num_keys)

    def _submit(
        self,
        job: _Job,
        job_metadata: TransferJob,
        chunks: Sequence[tuple[OffloadKey, int]],
        task: Any,  # noqa: ANN401
        *,
        urgent: bool,
    ) -> None:
        """Queue chunks (key, row), a few per task."""
        keys, rows = [key for key, _ in chunks], self._views([row for _, row in chunks])
        adapter = adapter_of(job_metadata.req_context)
        for begin in range(0, max(1, len(keys)), job.chunks_per_task):
            part = slice(begin, begin + job.chunks_per_task)
            if not self._pool.submit(task, job, keys[part], rows[part], adapter, urgent=urgent):
                self._refuse(job, len(keys[part]), urgent)

    def _views(self, rows: Sequence[int]) -> list[memoryview]:
        assert self._rows is not None
        size, all_rows = self._rows.shape[1], self._rows.data.cast("B")
        return [all_rows[row * size : (row + 1) * size] for row in rows]

    def _refuse(self, job: _Job, num_keys: int, urgent: bool) -> None:
        if not urgent:
            job.backing.chunks.count_dropped("queue_full", num_keys)
            with self._lock:
                self._pending_stores -= num_keys
        self._finish(job, ())

    def _room(self, job_metadata: TransferJob) -> tuple[int, str]:
        """How many chunks may be queued, and why not more.

        Writes whose breaker is open are queued all the same: one of them is the trial that closes it.
        """
        if adapter_of(job_metadata.req_context) == "":
            return 0, "unidentified_adapter"
        if self.store.is_open(READ):
            return 0, "circuit_open"
        return self.limits.max_pending_stores - self._pending_stores, "backlog"

    def _admitted(self, job: _Job, chunks: list[tuple[OffloadKey, int]]) -> list[tuple[OffloadKey, int]]:
        """The chunks that enough requests have used, and that were not written since."""
        if self.limits.min_uses <= 1:
            return chunks
        found = [chunk for chunk in chunks if self._admission.admits(chunk[0], self.limits.min_uses)]
        if len(found) < len(chunks):
            job.backing.chunks.count_dropped("not_admitted", len(chunks) - len(found))
        return found

    def _forget_load(self, result: JobResult) -> None:
        job = self._loading.pop(result.job_id)
        for key in job.keys:
            self._due.pop(key, None)
        self._abandoned.difference_update(job.keys)
        if not result.success:
            self._backing.lookups.mark_miss(set(job.keys) - set(result.successful_keys or ()))


def _count(backing: Backing, stats: OffloadingConnectorStats) -> None:
    """Add what a store did since the last call."""
    tier = backing.store.name
    corrupt, dropped = backing.chunks.take_counts()
    for cause, count in corrupt.items():
        stats.increase_counter(metrics.CORRUPT_CHUNKS, count, (tier, cause))
    for cause, count in dropped.items():
        stats.increase_counter(metrics.DROPPED_CHUNKS, count, (tier, cause))
    for cause, count in backing.take_failures().items():
        stats.increase_counter(metrics.STORE_FAILURES, count, (tier, cause))


def _in_order(job_metadata: TransferJob) -> list[tuple[OffloadKey, int]]:
    """The job's chunks (key, row) in the order of their prompt: a part of a prefix is worth something."""
    position = job_metadata.req_context.get_offload_key_position
    chunks = zip(job_metadata.keys, job_metadata.chunk_ids.tolist(), strict=True)
    return sorted(chunks, key=lambda chunk: position(chunk[0]) or 0)


def _num_tasks(num_keys: int, chunks_per_task: int) -> int:
    return max(1, -(-num_keys // chunks_per_task))
