"""How fast pages move between paged tensors and rows, next to one memcpy of the same bytes.

Run: ``python benchmarks/copy_pages.py [--mib 64] [--repeats 9] [--core 0]``. Each repeat copies
random blocks of a pool four times as large as the copy, so neither side is in the cache;
all columns are measured in turn within each repeat, and medians are printed. The target
is at least 70 % of memcpy. The fp8 columns copy bfloat16 into rows of eight bits and back
(`host_kv_dtype: fp8`), and count the bytes of the pages.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from lmcache_ext.ops import pages, pages_fp8, pages_numpy
from lmcache_ext.ops.page_shape import PageShape

NUM_TENSORS = 8
HEADS = 4
POOL_TIMES_COPY = 4
TARGET = 0.70
PAGE_KIB = (4, 16, 64, 128, 256)


class Scene:
    """A pool of paged tensors, rows twice the size of one copy, and random blocks to copy."""

    def __init__(self, page_bytes: int, copy_bytes: int) -> None:
        self.copy_bytes = copy_bytes
        self.block_bytes = NUM_TENSORS * page_bytes
        self.num_blocks = copy_bytes // self.block_bytes
        self.pool_blocks = self.num_blocks * POOL_TIMES_COPY
        self.pool = np.full(self.pool_blocks * self.block_bytes, 0x3F, dtype=np.uint8)  # as bfloat16: 0.75
        self.rows = np.ones(2 * copy_bytes, dtype=np.uint8)
        run = page_bytes // HEADS // 4  # a head's keys, or values, of all tokens: pages that the CPU's attention packs
        self.shape = PageShape("bfloat16", HEADS, 1, run, run, heads_first=True)
        starts = (self.pool.ctypes.data + j * self.pool_blocks * page_bytes for j in range(NUM_TENSORS))
        self.table = pages.PageTable.of((start, self.pool_blocks, page_bytes, page_bytes) for start in starts)
        self.shuffle(np.random.default_rng(0), 0)

    def shuffle(self, rng: np.random.Generator, repeat: int) -> None:
        """Choose other blocks, other places in the rows, another part of the pool for memcpy."""
        self.block_ids = rng.permutation(self.pool_blocks)[: self.num_blocks].astype(np.int64)
        self.offsets = rng.permutation(2 * self.num_blocks)[: self.num_blocks].astype(np.int64) * self.block_bytes
        self.offsets_fp8 = self.offsets // self.block_bytes * self.shape.block_bytes(self.table)
        self.part = self.pool.ctypes.data + repeat % POOL_TIMES_COPY * self.copy_bytes

    def copies(self) -> dict[str, Callable[[], object]]:
        """The things to time, by column."""
        arguments = (self.table, self.block_ids, self.rows, self.offsets)
        fp8 = (self.shape, self.table, self.block_ids, self.rows, self.offsets_fp8)
        return {
            "memcpy": lambda: ctypes.memmove(self.rows.ctypes.data, self.part, self.copy_bytes),
            "gather": lambda: pages.gather_pages(*arguments),
            "scatter": lambda: pages.scatter_pages(*arguments),
            "fp8 gather": lambda: pages_fp8.gather_pages(*fp8),
            "fp8 scatter": lambda: pages_fp8.scatter_pages(*fp8),
            "numpy gather": lambda: pages_numpy.gather_pages(*arguments),
            "numpy scatter": lambda: pages_numpy.scatter_pages(*arguments),
        }


def gigabytes_per_second(scene: Scene, repeats: int) -> dict[str, float]:
    """Median speed of each copy; the first repeat warms up and is not counted."""
    rng, speeds = np.random.default_rng(1), {name: [] for name in scene.copies()}
    for repeat in range(repeats + 1):
        scene.shuffle(rng, repeat)
        for name, copy in scene.copies().items():
            started = time.perf_counter()
            copy()
            speeds[name].append(scene.copy_bytes / (time.perf_counter() - started) / 1e9)
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}


def print_row(page_kib: int, speeds: dict[str, float]) -> bool:
    """Print one line of the table; return whether both directions reach the target."""
    base = speeds["memcpy"]
    cells = [f"{page_kib:>5} KiB", f"{base:>8.1f}"]
    cells += [f"{speed:>8.1f} ({speed / base:>4.0%})" for name, speed in speeds.items() if name != "memcpy"]
    reached = min(speeds["gather"], speeds["scatter"]) >= TARGET * base
    print("  ".join(cells) + ("" if reached else "  below target"), flush=True)
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="MiB per copy; choose more than the cache holds")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="run on this core alone")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    print(f"copier: {pages.backend()}; {arguments.mib} MiB per copy, GB/s (share of memcpy), core {arguments.core}")
    columns = ("gather", "scatter", "fp8 gather", "fp8 scatter", "numpy gather", "numpy scatter")
    print("  ".join((f"{'page':>9}", f"{'memcpy':>8}", *(f"{column:>15}" for column in columns))))
    reached = True
    for page_kib in PAGE_KIB:
        scene = Scene(page_kib << 10, arguments.mib << 20)
        reached &= print_row(page_kib, gigabytes_per_second(scene, arguments.repeats))
    print(f"target of {TARGET:.0%} of memcpy: {'reached' if reached else 'missed'}")
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
