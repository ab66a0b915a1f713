"""Checks a step's page copies on streams of their own on a real GPU: what they wait for, and that nobody waits.

Run: ``python benchmarks/gpu/launches.py [--mib 64]`` on a machine with an NVIDIA GPU, torch, NumPy, nvcc and this
checkout; vLLM is not needed. It builds the library where it is missing. This is what `CudaPageCopier` does without the
engine around it (`ops/launches_cuda.py`). Checked on the last GPU of the machine, as pages are and as eight bits, every
byte of rows and tensors: stores of several requests begun while the model is still writing what they read, loads begun
while it is still clearing what they write, both without waiting for it; one request among them that is refused. Then,
for a step's stores, loads and both at once: what beginning them takes of the host, GB/s until the host has learned that
they are over, and what a stream of matrix products loses meanwhile. Target: a loss of at most 2 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import device as machine
from benchmarks.gpu import pages_fp8
from benchmarks.gpu.device import describe, driver_of, judged, matmul_loss, on_a_stream, ready
from benchmarks.gpu.pages import table_of
from benchmarks.gpu.pages_fp8 import CHECKED, Form
from lmcache_ext.ops import pages_cuda, pages_fp8_cuda, pages_fp8_numpy, pages_numpy
from lmcache_ext.ops.launches_cuda import Finished, Launches
from lmcache_ext.ops.pages_cuda import Way
from lmcache_ext.ops.table import Int64s, PageTable, Part

TARGET_LOSS = 0.02
REQUESTS = 8
FORMS = (CHECKED[0], CHECKED[2], CHECKED[3], CHECKED[8])
TIMED = pages_fp8.TIMED[0]
LIMIT_S = 30.0  # for what takes milliseconds


class Scene:
    """Paged tensors on the device, pinned rows, requests with blocks of their own, and a stream for each way.

    The first half of the blocks is stored, and comes back in the second.
    """

    def __init__(self, form: Form, eight: bool, device: str, blocks_each: int) -> None:
        rng, dtype = np.random.default_rng(0), "bfloat16"
        self.shape, self.device = (form.shape(dtype) if eight else None), device
        self.page_bytes = form.layers * form.shape(dtype).page_bytes
        num_blocks = REQUESTS * blocks_each
        size = (form.num_tensors, 2 * num_blocks, self.page_bytes + form.gap)
        self.numbers = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        self.tensors = torch.zeros_like(self.numbers)
        self.table = table_of(self.tensors, self.page_bytes)
        self.block_bytes = self.table.block_bytes if self.shape is None else self.shape.block_bytes(self.table)
        self.kv_bytes = num_blocks * form.num_tensors * self.page_bytes
        rows = torch.zeros(num_blocks * self.block_bytes, dtype=torch.uint8)
        self.rows = rows.pin_memory() if device == "cuda" else rows
        self.blocks = rng.permutation(num_blocks).astype(np.int64)
        self.offsets = rng.permutation(num_blocks).astype(np.int64) * self.block_bytes
        self.busy = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) if device == "cuda" else None
        self.stores, self.loads = (
            Launches(partial(self.copy, way), driver_of(device)) for way in ("gather", "scatter")
        )

    def copy(self, way: Way, part: Part, stream: int) -> int:
        place = (part.table, part.block_ids, self.rows.data_ptr(), self.rows.nbytes, part.offsets)
        if self.shape is None:
            return pages_cuda.copy_pages(way, *place, stream=stream)
        return pages_fp8_cuda.copy_pages(way, self.shape, *place, stream=stream)

    def twin(self, way: Way, table: PageTable, blocks: Int64s) -> None:
        """The same on the host."""
        if self.shape is None:
            move = pages_numpy.gather_pages if way == "gather" else pages_numpy.scatter_pages
            move(table, blocks, self.rows.numpy(), self.offsets)
        else:
            fp8 = pages_fp8_numpy.gather_pages if way == "gather" else pages_fp8_numpy.scatter_pages
            fp8(self.shape, table, blocks, self.rows.numpy(), self.offsets)

    def submit(self, *, stores: bool) -> None:
        """Each request's blocks."""
        to, first = (self.stores, 0) if stores else (self.loads, self.blocks.size)
        parts = zip(np.array_split(self.blocks + first, REQUESTS), np.array_split(self.offsets, REQUESTS), strict=True)
        for job_id, (blocks, offsets) in enumerate(parts):
            to.submit(job_id, [Part(self.table, blocks, offsets)])

    def occupy(self) -> None:
        """Give the model's stream work of some milliseconds."""
        if self.busy is not None:
            for _ in range(50):
                torch.mm(self.busy, self.busy)

    def begin_behind_the_model(self, launches: Launches, name: str) -> None:
        launches.begin()
        if self.device == "cuda":
            assert not torch.cuda.current_stream().query(), f"{name}: beginning it waited for the model"
            assert not launches.finished(), f"{name}: over before the model's work that it must follow"


def awaited(launches: Launches) -> list[Finished]:
    """What has finished, asked for as a step does, until nothing that was submitted is left."""
    over, deadline = [], time.monotonic() + LIMIT_S
    launches.begin()
    while launches.is_busy():
        over += launches.finished()
        assert time.monotonic() < deadline, "a copy never finished"
    return over


def check(form: Form, eight: bool, device: str) -> None:
    scene = Scene(form, eight, device, blocks_each=3)
    name = f"{form.name}, {'eight bits' if eight else 'as it is'}"
    numbers = scene.numbers.cpu()
    for launches in (scene.stores, scene.loads):  # CUDA loads a kernel when it is first launched, and may wait for it
        scene.submit(stores=launches is scene.stores)
        awaited(launches)
    scene.twin("gather", table_of(numbers, scene.page_bytes), scene.blocks)
    expected_rows = scene.rows.clone()
    scene.rows.zero_()
    scene.occupy()
    scene.tensors.copy_(scene.numbers)
    scene.submit(stores=True)
    scene.begin_behind_the_model(scene.stores, name)
    over = awaited(scene.stores)
    assert [job.num_bytes for job in over] == [3 * scene.block_bytes] * REQUESTS, f"{name}: {over}"
    assert torch.equal(scene.rows, expected_rows), f"{name}: stored rows differ from the twin's"

    cleared = torch.zeros_like(numbers)
    scene.twin("scatter", table_of(cleared, scene.page_bytes), scene.blocks + scene.blocks.size)
    scene.occupy()
    scene.tensors.zero_()
    scene.submit(stores=False)
    scene.begin_behind_the_model(scene.loads, name)
    awaited(scene.loads)
    assert torch.equal(scene.tensors.cpu(), cleared), f"{name}: loaded pages differ from the twin's"

    scene.submit(stores=True)
    nowhere = np.array([cleared.shape[1]], dtype=np.int64)
    scene.stores.submit(REQUESTS, [Part(scene.table, nowhere, np.zeros(1, dtype=np.int64))])
    failed = [job.job_id for job in awaited(scene.stores) if job.num_bytes is None]
    assert failed == [REQUESTS], f"{name}: a block that is not there failed {failed}"
    print(f"  as the twin, behind the model: {name}", flush=True)


def time_step(form: Form, eight: bool, device: str, step_bytes: int) -> Scene:
    """Print what a step's copies take; the scene that they were taken in."""
    block_bytes = form.num_tensors * form.layers * form.shape("bfloat16").page_bytes
    scene = Scene(form, eight, device, blocks_each=max(1, step_bytes // block_bytes // REQUESTS))
    name = f"{form.name}, {'eight bits' if eight else 'as it is'}"
    for ways in (("stores",), ("loads",), ("stores", "loads")):
        begin_us, speeds = [], []
        for _ in range(machine.REPEATS + 1):
            machine.wait(device)
            begun = time.perf_counter()
            for way in ways:
                scene.submit(stores=way == "stores")
            launches = [getattr(scene, way) for way in ways]
            for each in launches:
                each.begin()
            begin_us.append((time.perf_counter() - begun) * 1e6)
            for each in launches:
                awaited(each)
            speeds.append(scene.kv_bytes * len(ways) / (time.perf_counter() - begun) / 1e9)
        cells = f"{statistics.median(begin_us[1:]):6.0f} | {statistics.median(speeds[1:]):6.1f}"
        print(f"| {name} | {' and '.join(ways)} | {scene.kv_bytes >> 20} | {cells} |", flush=True)
    return scene


def loss_beside(scene: Scene) -> float:
    """What matrix products lose beside stores and loads at once."""

    def step() -> None:
        for launches in (scene.stores, scene.loads):
            launches.finished()
            scene.submit(stores=launches is scene.stores)
            launches.begin()
            torch.cuda.current_stream().wait_stream(launches._stream)  # only here: that the next step comes after it

    return matmul_loss(step)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="of KV in a step, each way")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (reason := ready(options.device, [pages_cuda, pages_fp8_cuda])) is not None:
        print(reason, file=sys.stderr)
        return 2
    if options.device == "cuda":  # with more than one, a launch that went to the first would be seen
        torch.cuda.set_device(torch.cuda.device_count() - 1)
    print(describe(options.device))
    with on_a_stream(options.device):
        for form in FORMS:
            for eight in (False, True):
                check(form, eight, options.device)
        print(f"\n| pages | {REQUESTS} requests' | MiB each way | begun in, us | GB/s |\n|---|---|---|---|---|")
        scenes = [time_step(TIMED, eight, options.device, options.mib << 20) for eight in (False, True)]
        losses = [0.0]
        if options.device == "cuda":
            losses = [loss_beside(scene) for scene in scenes]
            print("\n| beside matrix products, stores and loads at once | they lose |\n|---|---|")
            print(f"| as they are | {losses[0]:+.1%} |\n| eight bits | {losses[1]:+.1%} |")
    print()
    gentle = judged(
        f"matrix products lose {TARGET_LOSS:.0%} at most beside a step's copies", max(losses) <= TARGET_LOSS
    )
    return 0 if gentle else 1


if __name__ == "__main__":
    raise SystemExit(main())
