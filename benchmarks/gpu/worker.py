"""Checks the worker that `cuda_page_copier: kernels` gives an engine on a real GPU, and times it beside vLLM's own.

Run: ``python benchmarks/gpu/worker.py [--mib 256]`` on a machine with an NVIDIA GPU, this checkout and vLLM for CUDA;
without that vLLM it says so and ends. It builds the library where it is missing. Checked: stores and loads through
vLLM's interface and a region of ``/dev/shm`` that is pinned as an engine pins it, pages as they are and as eight bits,
every byte of rows and tensors. GB/s of KV as the GPU has it, from the submission of a step's requests until the worker
has reported them: ours, with eight bits too, and vLLM's (``CPUOffloadingWorker``: the driver's batch of copies, or its
Triton kernel for loads of small pages), by the size of a page. No target: the table says where ours is worth choosing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import device as machine
from benchmarks.gpu.device import describe, driver_of, on_a_stream, ready
from benchmarks.gpu.pages import table_of
from benchmarks.gpu.pages_fp8 import CHECKED, Form
from lmcache_ext.ops import pages_cuda, pages_fp8_cuda, pages_fp8_numpy, pages_numpy

try:
    from vllm.platforms import current_platform
    from vllm.utils.math_utils import round_up
    from vllm.v1.kv_offload.base import (
        CanonicalKVCacheRef,
        CanonicalKVCaches,
        CanonicalKVCacheTensor,
        GPULoadStoreSpec,
    )
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    from lmcache_ext.offload.copier import PageCopier
    from lmcache_ext.offload.cuda_copier import CudaPageCopier
except ImportError as error:
    LACKING = f"vLLM is not here ({error})"
else:
    LACKING = ""

Kind = Literal["kernels", "kernels, eight bits", "vLLM's own"]
KINDS: tuple[Kind, ...] = ("kernels", "kernels, eight bits", "vLLM's own")
REQUESTS, BLOCKS_PER_CHUNK = 8, 4
PAGES = (
    Form("4 KiB", 32, 1, 16, 64, 64, heads_first=True),
    Form("16 KiB", 32, 2, 16, 128, 128, heads_first=True),
    Form("64 KiB", 32, 8, 16, 128, 128, heads_first=True),
    Form("2 MiB, all layers in one", 1, 8, 16, 128, 128, heads_first=True, layers=32),
)
LIMIT_S = 30.0  # for what takes milliseconds


class Scene:
    """A KV cache on the device, one worker of a kind, and requests of so many chunks each.

    The first half of the blocks is stored, and comes back in the second. `close` it.
    """

    def __init__(self, form: Form, kind: Kind, device: str, chunks_each: int) -> None:
        self.shape = form.shape("bfloat16") if kind == "kernels, eight bits" else None
        self.page_bytes = form.layers * form.shape("bfloat16").page_bytes
        num_chunks = REQUESTS * chunks_each
        num_blocks = num_chunks * BLOCKS_PER_CHUNK
        size = (form.num_tensors, 2 * num_blocks, self.page_bytes)
        self.tensors = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        self.kv_bytes = num_blocks * form.num_tensors * self.page_bytes
        rng = np.random.default_rng(0)
        self.blocks, self.rows = rng.permutation(num_blocks), rng.permutation(num_chunks)
        table = table_of(self.tensors, self.page_bytes)
        self.block_bytes = table.block_bytes if self.shape is None else self.shape.block_bytes(table)
        worker_bytes = BLOCKS_PER_CHUNK * self.block_bytes
        self.row_bytes = round_up(worker_bytes, SharedOffloadRegion.BLOCK_SIZE_ALIGNMENT)
        self.region = SharedOffloadRegion(
            engine_id=f"benchmark-{uuid.uuid4().hex}",
            num_chunks=num_chunks,
            rank=0,
            kv_bytes_per_chunk=self.row_bytes,
            cpu_page_size=worker_bytes,
        )
        self.worker = self._worker(kind, device, num_chunks)

    def _worker(self, kind: Kind, device: str, num_chunks: int) -> Any:
        caches = CanonicalKVCaches(
            [CanonicalKVCacheTensor(tensor.view(torch.int8), self.page_bytes) for tensor in self.tensors],
            [[CanonicalKVCacheRef(i, self.page_bytes) for i in range(len(self.tensors))]],
        )
        options = {"blocks_per_chunk": BLOCKS_PER_CHUNK}
        if kind == "vLLM's own":
            return CPUOffloadingWorker(caches, **options, num_cpu_chunks=num_chunks, mmap_region=self.region)
        return CudaPageCopier(caches, self.region, **options, shape=self.shape, driver=driver_of(device))

    def close(self) -> None:
        self.worker.shutdown()

    def step(self, *, stores: bool) -> None:
        """Submit each request's copies, and ask as an engine's steps do until all were reported."""
        first = 0 if stores else self.blocks.size
        requests = zip(np.array_split(self.blocks + first, REQUESTS), np.array_split(self.rows, REQUESTS), strict=True)
        for job_id, (blocks, rows) in enumerate(requests):
            paged = GPULoadStoreSpec(blocks.tolist(), group_sizes=[blocks.size], block_indices=[0])
            if stores:
                self.worker.submit_store(job_id, paged, CPULoadStoreSpec(rows.tolist()))
            else:
                self.worker.submit_load(job_id, CPULoadStoreSpec(rows.tolist()), paged)
        if isinstance(self.worker, PageCopier):
            self.worker.begin()
        left, deadline = set(range(REQUESTS)), time.monotonic() + LIMIT_S
        while left:
            left -= {result.job_id for result in self.worker.get_finished()}
            assert time.monotonic() < deadline, "a copy never finished"
        failed = self.worker.take_failed() if isinstance(self.worker, PageCopier) else set()
        assert not failed, f"copies {failed} failed"

    def twin(self, way: str, tensors: torch.Tensor, blocks: np.ndarray[Any, Any], rows: torch.Tensor) -> None:
        """What the kernels should do, on the host."""
        in_row = np.arange(BLOCKS_PER_CHUNK) * self.block_bytes
        offsets = (self.rows[:, None] * self.row_bytes + in_row[None, :]).reshape(-1)
        place = (table_of(tensors, self.page_bytes), blocks, rows.numpy(), offsets)
        if self.shape is None:
            (pages_numpy.gather_pages if way == "gather" else pages_numpy.scatter_pages)(*place)
        else:
            fp8 = pages_fp8_numpy.gather_pages if way == "gather" else pages_fp8_numpy.scatter_pages
            fp8(self.shape, *place)


def check(form: Form, kind: Kind, device: str) -> None:
    with closing(Scene(form, kind, device, chunks_each=2)) as scene:
        tensors, found = scene.tensors.cpu().clone(), scene.region.base_tensor.view(torch.uint8)
        rows = torch.zeros_like(found)
        scene.twin("gather", tensors, scene.blocks, rows)
        scene.step(stores=True)
        assert torch.equal(found, rows), f"{form.name}, {kind}: stored rows differ from the twin's"
        scene.twin("scatter", tensors, scene.blocks + scene.blocks.size, rows)
        scene.step(stores=False)
        assert torch.equal(scene.tensors.cpu(), tensors), f"{form.name}, {kind}: loaded pages differ from the twin's"
        del found  # the region is not closed while anybody looks at it
    print(f"  as the twin: {form.name}, {kind}", flush=True)


def speed(form: Form, kind: Kind, device: str, num_bytes: int, *, stores: bool) -> float:
    """GB/s of KV."""
    block_bytes = form.num_tensors * form.layers * form.shape("bfloat16").page_bytes
    chunks_each = max(1, num_bytes // block_bytes // BLOCKS_PER_CHUNK // REQUESTS)
    with closing(Scene(form, kind, device, chunks_each)) as scene:
        taken_s = []
        for _ in range(machine.REPEATS + 1):
            machine.wait(device)
            begun = time.perf_counter()
            scene.step(stores=stores)
            taken_s.append(time.perf_counter() - begun)
        return float(scene.kv_bytes / statistics.median(taken_s[1:]) / 1e9)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="of KV in a step")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    lacking = LACKING or ("" if options.device == "cpu" or current_platform.is_cuda() else "vLLM is not built for CUDA")
    if lacking:
        print(f"skipped: {lacking}; launches.py checks what the worker does without it")
        return 0
    if (reason := ready(options.device, [pages_cuda, pages_fp8_cuda])) is not None:
        print(reason, file=sys.stderr)
        return 2
    print(describe(options.device))
    kinds, faster = KINDS if options.device == "cuda" else KINDS[:2], []
    with on_a_stream(options.device):
        for form in (CHECKED[0], CHECKED[2]):
            for kind in KINDS[:2]:
                check(form, kind, options.device)
        print("\n| page | way | " + " | ".join(kinds) + " |\n|---|---" + "|---" * len(kinds) + "|")
        for form in PAGES:
            for way in ("store", "load"):
                speeds = [speed(form, kind, options.device, options.mib << 20, stores=way == "store") for kind in kinds]
                print(f"| {form.name} | {way} | " + " | ".join(f"{each:6.1f}" for each in speeds) + " |", flush=True)
                faster += [f"{form.name} {way}"] if speeds[0] > speeds[-1] else []
    print(f"\nfaster than vLLM's own: {'; '.join(faster) or 'nowhere'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
