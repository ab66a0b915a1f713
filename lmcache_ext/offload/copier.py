"""Moves KV pages between vLLM's paged tensors and rows, on hosts without a GPU.

`offload.parts` says what lies where.

Threads:  vLLM's worker thread submits and polls; one thread of ours copies, on cores that the
          model's compute threads do not use. Whoever waits for a copy lends a hand: a job is cut into
          pieces, and the waiting thread takes every other one instead of sleeping.
Order:    jobs run in the order they were submitted, so a load submitted after a store of the same
          row sees it. The pieces of one job run in any order.
Owner:    the KV tensors and the region outlive the copier; `shutdown` stops touching them.
Failure:  a job never raises into vLLM. One that could not be copied is reported finished *and*
          listed by `take_failed`; who asked decides (`lmcache_ext.connector`).
"""

from __future__ import annotations

import queue
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from typing_extensions import override
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from lmcache_ext.offload.cores import leave_compute_cores
from lmcache_ext.offload.parts import Parts
from lmcache_ext.ops import pages, pages_fp8
from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.table import Bytes, Part
from lmcache_ext.ops.tiles import ask_for_tiles

logger = init_logger("vllm.lmcache_ext.offload.copier")

# 1 MiB: 0.1 ms of one core, long against the locks around it and short against a whole load
_PIECE_BYTES = 1024 * 1024


class PageCopier(OffloadingWorker):
    """A copier of ours: what the connector asks of it beyond vLLM's contract."""

    def begin(self) -> None:
        """All of a step that there will be has been submitted, for a copier that begins with it together."""

    @abstractmethod
    def has_news(self) -> bool:
        """Whether `get_finished` or `take_failed` may have something to give; quick enough for every step."""

    @abstractmethod
    def take_failed(self) -> set[int]:
        """Finished jobs whose bytes were not copied, since the last call."""


class _Job(NamedTuple):
    job_id: int
    store: bool
    paged: GPULoadStoreSpec
    rows: BlockIDsLoadStoreSpec


class _Work:
    """The job under way; all but `store` under the copier's lock."""

    def __init__(self, job: _Job, pieces: deque[Part]) -> None:
        self.job_id = job.job_id
        self.store = job.store
        self.left = pieces
        self.running = 0
        self.copied_bytes: int | None = 0  # None once a piece failed


class HostPageCopier(PageCopier):
    """An `OffloadingWorker` for the CPU platform; with a `shape`, rows hold eight bits for each element."""

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        region: SharedOffloadRegion,
        *,
        blocks_per_chunk: int,
        shape: PageShape | None = None,
    ) -> None:
        self._caches = kv_caches  # keeps the tensors behind the tables alive
        self._parts = Parts(kv_caches, region, blocks_per_chunk=blocks_per_chunk, shape=shape)
        self._region: SharedOffloadRegion | None = region
        self._rows: Bytes | None = region.base_tensor.numpy().view(np.uint8)
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._pending: set[int] = set()
        self._work: _Work | None = None
        self._failed: set[int] = set()
        ask_for_tiles()
        logger.info("Copying KV pages with the %s copier%s", pages.backend(), "" if shape is None else ", as fp8")
        self._thread = threading.Thread(target=self._run, name="lmcache_ext-copier", daemon=True)
        self._thread.start()

    @override
    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        assert isinstance(dst_spec, BlockIDsLoadStoreSpec)
        return self._submit(_Job(job_id, True, src_spec, dst_spec))

    @override
    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, BlockIDsLoadStoreSpec)
        return self._submit(_Job(job_id, False, dst_spec, src_spec))

    @override
    def get_finished(self) -> list[TransferResult]:
        results = []
        while True:
            try:
                results.append(self._finished.get_nowait())
            except queue.Empty:
                return results

    @override
    def wait(self, job_ids: set[int]) -> None:
        self.wait_for(job_ids, timeout_s=None)

    def wait_for(self, job_ids: set[int], timeout_s: float | None) -> bool:
        """Help until none of `job_ids` is pending, at most about `timeout_s` seconds; whether that came true."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._pending.isdisjoint(job_ids):
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    return False
                if self._work is not None and self._work.left:
                    self._copy_piece(self._work)
                else:
                    self._changed.wait(left_s)
            return True

    def is_pending(self, job_id: int) -> bool:
        """Whether the job was submitted and has not finished."""
        with self._changed:
            return job_id in self._pending

    @override
    def has_news(self) -> bool:
        return not self._finished.empty() or bool(self._failed)

    @override
    def take_failed(self) -> set[int]:
        with self._changed:
            failed, self._failed = self._failed, set()
        return failed

    @override
    def shutdown(self) -> None:
        if self._region is None:
            return
        self._queue.put(None)
        self._thread.join()
        self._rows = None
        region, self._region = self._region, None
        region.cleanup()

    def _submit(self, job: _Job) -> bool:
        with self._changed:
            self._pending.add(job.job_id)
        self._queue.put(job)
        return True

    def _run(self) -> None:
        leave_compute_cores()
        while (job := self._queue.get()) is not None:
            begin = time.perf_counter()
            try:
                num_bytes = self._copy(job)
            except Exception:  # the top of this thread: the job fails, the thread lives
                logger.exception("KV copy job %d failed", job.job_id)
                num_bytes = None
            self._finish(job.job_id, num_bytes, time.perf_counter() - begin)

    def _finish(self, job_id: int, num_bytes: int | None, seconds: float) -> None:
        if num_bytes is None:
            with self._changed:
                self._failed.add(job_id)  # before it counts as finished: nobody may take it for good
        self._finished.put(TransferResult(job_id, True, num_bytes or 0, seconds))
        with self._changed:
            self._pending.discard(job_id)
            self._changed.notify_all()

    def _copy(self, job: _Job) -> int | None:
        """Copy all pieces, with whoever helps; bytes, or None where a piece failed."""
        work = _Work(job, deque(self._pieces(job)))
        with self._changed:
            self._work = work
            self._changed.notify_all()
            while work.left or work.running:
                if work.left:
                    self._copy_piece(work)
                else:
                    self._changed.wait()
            self._work = None
            return work.copied_bytes

    def _copy_piece(self, work: _Work) -> None:
        """Take one piece and copy it with the lock let go; called and left with the lock held."""
        piece = work.left.popleft()
        work.running += 1
        self._changed.release()
        copied = None
        try:
            copied = self._move(piece, store=work.store)
        except Exception:  # of a job, not of the thread that helps with it
            logger.exception("KV copy job %d failed", work.job_id)
        finally:
            self._changed.acquire()
            work.running -= 1
            if copied is None or work.copied_bytes is None:
                work.copied_bytes = None
                work.left.clear()
            else:
                work.copied_bytes += copied
            if not work.left and not work.running:
                self._changed.notify_all()

    def _move(self, piece: Part, *, store: bool) -> int:
        rows, shape = self._rows, self._parts.shape
        assert rows is not None
        if shape is not None:
            move = pages_fp8.gather_pages if store else pages_fp8.scatter_pages
            return move(shape, piece.table, piece.block_ids, rows, piece.offsets)
        if not store:
            return pages.scatter_pages(piece.table, piece.block_ids, rows, piece.offsets)
        copied = pages.gather_pages(piece.table, piece.block_ids, rows, piece.offsets)
        self._parts.clear_rest(piece, rows)
        return copied

    def _pieces(self, job: _Job) -> Iterator[Part]:
        for table, block_ids, offsets in self._parts.of(job.paged, job.rows):
            size = max(1, _PIECE_BYTES // table.block_bytes)
            for begin in range(0, block_ids.size, size):
                yield Part(table, block_ids[begin : begin + size], offsets[begin : begin + size])
