"""Checks the CUDA page copier against its twin on a real GPU, then times it against the driver's batch of copies.

Run: ``python benchmarks/gpu/pages.py [--mib 256]`` on a machine with an NVIDIA GPU, torch, nvcc and this checkout;
nothing else is needed. It builds the library where it is missing. GB/s of pinned host memory, both ways: our launch,
with several numbers of thread blocks, and ``cudaMemcpyBatchAsync``, as vLLM's own copier uses it, next to the ceiling
that one large copy of the same bytes reaches in the same run. Last, what a stream of matrix products loses while a
gather runs beside it. Targets: 90 % of the ceiling at 64 KiB, 80 % at 4 KiB, a loss of at most 2 %.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.device import describe, judged, on_a_stream, ready, seconds, stream_of, time_beside
from lmcache_ext.ops import pages_cuda, pages_numpy
from lmcache_ext.ops.table import PageTable

NUM_TENSORS = 32
PAGE_KIB = (4, 16, 64, 256)
CTAS = (4, 8, 16, 32, 64)
TARGET_LOSS = 0.02

# (name, tensors, page bytes, gap between blocks): what vLLM's layouts and models make of a page
LAYOUTS = (
    ("LBHNC, a tensor for each layer", 32, 65536, 0),
    ("LBNHC of a small head", 28, 8192, 0),
    ("BLHNC, all layers in one page", 1, 2 << 20, 0),
    ("MLA, 576 elements of bfloat16", 61, 18432, 0),
    ("MLA as fp8_ds_mla", 61, 10496, 0),
    ("padded pages", 16, 6160, 48),
    ("more tensors than a launch takes", 200, 4096, 0),
)


class Scene:
    """Paged tensors on the GPU, pinned rows, and random blocks to copy between them."""

    def __init__(self, num_tensors: int, page_bytes: int, gap: int, num_blocks: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        pool_blocks = 2 * num_blocks
        self.stride, self.page_bytes, self.num_tensors = page_bytes + gap, page_bytes, num_tensors
        self.tensors = torch.randint(0, 256, (num_tensors, pool_blocks, self.stride), dtype=torch.uint8, device="cuda")
        self.block_ids = rng.permutation(pool_blocks)[:num_blocks].astype(np.int64)
        self.block_bytes = num_tensors * page_bytes
        self.offsets = rng.permutation(num_blocks).astype(np.int64) * self.block_bytes
        self.rows = torch.zeros(num_blocks * self.block_bytes, dtype=torch.uint8).pin_memory()
        self.table = table_of(self.tensors, page_bytes)

    def copy(self, way: str, num_ctas: int = pages_cuda.DEFAULT_CTAS) -> None:
        pages_cuda.copy_pages(
            way,  # type: ignore[arg-type]
            self.table,
            self.block_ids,
            self.rows.data_ptr(),
            self.rows.nbytes,
            self.offsets,
            stream=stream_of("cuda"),
            num_ctas=num_ctas,
        )

    def batch(self, way: str) -> Callable[[], None]:
        """The same copies as one cudaMemcpyBatchAsync; its arrays are made beforehand."""
        starts = np.array([tensor.data_ptr() for tensor in self.tensors], dtype=np.uint64)
        paged = (starts[None, :] + (self.block_ids[:, None] * self.stride).astype(np.uint64)).reshape(-1)
        in_row = np.arange(self.num_tensors) * self.page_bytes
        rows = (self.rows.data_ptr() + self.offsets[:, None] + in_row[None, :]).astype(np.uint64).reshape(-1)
        sizes = np.full(paged.size, self.page_bytes, dtype=np.uint64)
        to, source = (rows, paged) if way == "gather" else (paged, rows)
        library = pages_cuda._library()
        assert library is not None

        def copy() -> None:
            stream = ctypes.c_void_p(stream_of("cuda"))
            arrays = (to.ctypes.data, source.ctypes.data, sizes.ctypes.data)
            error = library.kvx_cuda_copy_batch(*arrays, paged.size, stream)
            assert error == 0, f"cudaMemcpyBatchAsync: CUDA error {error}"

        return copy

    def ceiling(self, way: str) -> Callable[[], None]:
        """One copy of as many bytes."""
        buffer = torch.empty(self.rows.nbytes, dtype=torch.uint8, device="cuda")
        if way == "gather":
            return lambda: self.rows.copy_(buffer, non_blocking=True)  # type: ignore[return-value]
        return lambda: buffer.copy_(self.rows, non_blocking=True)  # type: ignore[return-value]


def table_of(tensors: torch.Tensor, page_bytes: int) -> PageTable:
    return PageTable.of((tensor.data_ptr(), tensor.shape[0], tensor.shape[1], page_bytes) for tensor in tensors)


def check(name: str, num_tensors: int, page_bytes: int, gap: int) -> None:
    """Both ways against the twin, every byte of tensors and rows."""
    scene = Scene(num_tensors, page_bytes, gap, num_blocks=max(3, min(1500, (64 << 20) // (num_tensors * page_bytes))))
    before = scene.tensors.cpu()
    twin_rows = np.zeros(scene.rows.nbytes, dtype=np.uint8)
    pages_numpy.gather_pages(table_of(before, page_bytes), scene.block_ids, twin_rows, scene.offsets)
    scene.copy("gather")
    torch.cuda.synchronize()
    assert np.array_equal(scene.rows.numpy(), twin_rows), f"{name}: gathered rows differ from the twin's"
    scene.rows.copy_(torch.randint(0, 256, scene.rows.shape, dtype=torch.uint8))
    pages_numpy.scatter_pages(table_of(before, page_bytes), scene.block_ids, scene.rows.numpy(), scene.offsets)
    scene.copy("scatter")
    assert torch.equal(scene.tensors.cpu(), before), f"{name}: scattered pages differ from the twin's"
    print(f"  as the twin: {name}")


def time_pages(page_bytes: int, copy_bytes: int) -> bool:
    """Print one page size, both ways; whether it reaches its target with the default number of thread blocks."""
    scene = Scene(NUM_TENSORS, page_bytes, 0, num_blocks=max(1, copy_bytes // (NUM_TENSORS * page_bytes)))
    target = 0.9 if page_bytes >= 65536 else 0.8
    reached = True
    for way in ("gather", "scatter"):
        total = scene.rows.nbytes
        ceiling = total / seconds(scene.ceiling(way), "cuda") / 1e9
        batch = total / seconds(scene.batch(way), "cuda") / 1e9
        ours = {
            ctas: total / seconds(lambda way=way, ctas=ctas: scene.copy(way, ctas), "cuda") / 1e9  # type: ignore[misc]
            for ctas in CTAS
        }
        cells = [f"{speed:6.1f} ({speed / ceiling:4.0%})" for speed in (batch, *ours.values())]
        print(f"| {page_bytes >> 10} KiB | {way} | {ceiling:6.1f} | " + " | ".join(cells) + " |")
        reached &= ours[pages_cuda.DEFAULT_CTAS] >= target * ceiling
    return reached


def is_harmless(num_blocks: int = 256) -> bool:
    """Whether matrix products beside copies of 64 KiB pages stay within the target."""
    scene = Scene(NUM_TENSORS, 65536, 0, num_blocks=num_blocks)
    copiers = {
        "they lose with our copies": lambda way: partial(scene.copy, way),
        "with the driver's batch": scene.batch,
    }
    return time_beside(copiers) <= TARGET_LOSS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="of one copy")
    options = parser.parse_args()
    if (reason := ready("cuda", [pages_cuda])) is not None:
        print(reason, file=sys.stderr)
        return 2
    print(describe("cuda"))
    with on_a_stream("cuda"):
        for layout in LAYOUTS:
            check(*layout)
        print("\n| page | way | one copy, GB/s | driver's batch | " + " | ".join(f"{n} blocks" for n in CTAS) + " |")
        print("|---" * (4 + len(CTAS)) + "|")
        reached = [time_pages(kib << 10, options.mib << 20) for kib in PAGE_KIB]
        harmless = is_harmless()
    print()
    ours = f"{pages_cuda.DEFAULT_CTAS} blocks"
    fast = judged(f"90 % of one copy at 64 KiB, 80 % at 4 KiB, {ours}", all(reached))
    gentle = judged(f"matrix products lose {TARGET_LOSS:.0%} at most beside a copy of {ours}", harmless)
    return 0 if fast and gentle else 1


if __name__ == "__main__":
    raise SystemExit(main())
