"""Moves KV pages between vLLM's paged tensors on an NVIDIA GPU and rows with our kernels, where that was asked for.

The default on GPUs is vLLM's own copier, a batch of copies by the driver. `offload.parts` says what lies where: in rows
as `HostPageCopier` leaves them, not as vLLM does, so that engines with one and with the other never share chunks.

Thread:  vLLM's worker thread submits, begins and polls; the GPU copies. No thread of ours.
Order:   stores, and loads, in the order they were submitted, each behind what the model had been given by then. A store
         and a load are not ordered against each other: vLLM names a row in a load only once its store has finished.
Owner:   the KV tensors and the region outlive the copier; `shutdown` waits for the GPU before it lets go of them.
Failure: as for `HostPageCopier`: finished *and* listed by `take_failed`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from typing_extensions import override
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.gpu_worker import pin_mmap_region
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from lmcache_ext.offload.copier import PageCopier
from lmcache_ext.offload.parts import Parts
from lmcache_ext.ops import pages_cuda, pages_fp8_cuda
from lmcache_ext.ops.launches_cuda import Driver, Launches
from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.pages_cuda import Way
from lmcache_ext.ops.table import Part

logger = init_logger("vllm.lmcache_ext.offload.cuda_copier")


class CudaPageCopier(PageCopier):
    """An `OffloadingWorker` for CUDA; with a `shape`, rows hold eight bits for each element.

    Pins the region. Raises ValueError where the kernels cannot copy these tensors or these rows; the region is then
    still the caller's.
    """

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        region: SharedOffloadRegion,
        *,
        blocks_per_chunk: int,
        shape: PageShape | None = None,
        driver: Driver = torch.cuda,
    ) -> None:
        self._caches = kv_caches  # keeps the tensors behind the tables alive
        self._parts = Parts(kv_caches, region, blocks_per_chunk=blocks_per_chunk, shape=shape)
        for table in self._parts.tables:
            if shape is None:
                pages_cuda.check_table(table)
            else:
                shape.block_bytes(table)
        pin_mmap_region(region)
        if not region.is_pinned:
            raise ValueError(f"{region.total_size_bytes} bytes of host memory could not be pinned for the GPU")
        self._region: SharedOffloadRegion | None = region
        self._rows = region.base_tensor.numpy().view(np.uint8)
        self._stores = Launches(partial(self._copy, "gather"), driver)
        self._loads = Launches(partial(self._copy, "scatter"), driver)
        self._failed: set[int] = set()
        logger.info("Copying KV pages with the CUDA kernels%s", "" if shape is None else ", as fp8")

    @override
    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        assert isinstance(dst_spec, BlockIDsLoadStoreSpec)
        self._stores.submit(job_id, self._parts.of(src_spec, dst_spec))
        return True

    @override
    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, BlockIDsLoadStoreSpec)
        self._loads.submit(job_id, self._parts.of(dst_spec, src_spec))
        return True

    @override
    def begin(self) -> None:
        self._stores.begin()
        self._loads.begin()

    @override
    def get_finished(self) -> list[TransferResult]:
        self.begin()
        over = self._stores.finished() + self._loads.finished()
        self._failed.update(job.job_id for job in over if job.num_bytes is None)
        return [TransferResult(job.job_id, True, job.num_bytes or 0, job.seconds) for job in over]

    @override
    def wait(self, job_ids: set[int]) -> None:
        self._stores.wait(job_ids)
        self._loads.wait(job_ids)

    @override
    def has_news(self) -> bool:
        return bool(self._failed) or self._stores.is_busy() or self._loads.is_busy()

    @override
    def take_failed(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    @override
    def shutdown(self) -> None:
        if self._region is None:
            return
        self._stores.wait()
        self._loads.wait()
        self._rows = np.empty(0, dtype=np.uint8)
        region, self._region = self._region, None
        region.cleanup()

    def _copy(self, way: Way, part: Part, stream: int) -> int:
        rows, shape = self._rows, self._parts.shape
        place = (part.table, part.block_ids, rows.ctypes.data, rows.size, part.offsets)
        if shape is not None:
            return pages_fp8_cuda.copy_pages(way, shape, *place, stream=stream)
        copied = pages_cuda.copy_pages(way, *place, stream=stream)
        if way == "gather":
            self._parts.clear_rest(part, rows)
        return copied
