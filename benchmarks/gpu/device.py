"""What the scripts of this folder share: whether they can run here, on which stream, and how time is taken."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lmcache_ext.ops import native
from lmcache_ext.ops.launches_cuda import Driver

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 9


def ready(device: str, faces: Sequence[ModuleType]) -> str | None:
    """Why nothing can be run here, or None. Builds the kernels that `faces` call where they were not built yet."""
    if device == "cpu":  # the kernels as plain C++; tests/unit/test_gpu_benchmarks.py
        return None
    if not torch.cuda.is_available():
        return (
            f"no CUDA device here, as torch {torch.__version__} (CUDA {torch.version.cuda or 'not built in'}) sees it"
        )
    if not native.CUDA_LIBRARY.exists():
        built = subprocess.run([sys.executable, ROOT / "scripts" / "build_cuda.py"], check=False)
        if built.returncode != 0:
            return f"{native.CUDA_LIBRARY} was not built"
    lacking = [face.__name__ for face in faces if not face.available()]
    if lacking:
        return f"{native.CUDA_LIBRARY} does not load here or is of other sources: nothing for {', '.join(lacking)}"
    return None


def describe(device: str) -> str:
    if device == "cpu":
        return "the kernels on the host"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def judged(target: str, reached: bool) -> bool:
    """Print what became of a target."""
    print(f"target, {target}: {'reached' if reached else 'missed'}", flush=True)
    return reached


def on_a_stream(device: str) -> AbstractContextManager[object]:
    """A stream of our own: the driver takes no batch of copies on the default one."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


def stream_of(device: str) -> int:
    """The current ``cudaStream_t``."""
    return torch.cuda.current_stream().cuda_stream if device == "cuda" else 0


class AtOnce:
    """The host as `ops.launches_cuda` sees a device: what is asked of it has been done."""

    class Stream:
        cuda_stream = 0

        def wait_stream(self, stream: object, /) -> None:
            pass

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at_s = 0.0

        def record(self, stream: object, /) -> None:
            self.at_s = time.perf_counter()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any, /) -> float:
            return (end.at_s - self.at_s) * 1e3

    def current_stream(self) -> Stream:
        return self.Stream()


def driver_of(device: str) -> Driver:
    return torch.cuda if device == "cuda" else AtOnce()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_once(work: Callable[[], object], device: str, beside: Callable[[], object] = lambda: None) -> float:
    """What the work takes on the current stream; `beside` is what was begun just before, on another."""
    wait(device)
    beside()
    if device == "cpu":
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    wait(device)
    return begin.elapsed_time(end) / 1e3


def seconds(work: Callable[[], object], device: str) -> float:
    """The median of several; the first warms up."""
    return statistics.median([seconds_once(work, device) for _ in range(REPEATS + 1)][1:])


def matmul_loss(copy: Callable[[], object]) -> float:
    """By how much longer matrix products take beside copies on another stream, which go on until the last is done.

    By turns without and with copies, so that a GPU that grows warm slows both.
    """
    side, left = torch.cuda.Stream(), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(20):
            torch.mm(left, left, out=out)

    num_copies = 2 + int(2 * seconds(multiply, "cuda") / seconds(copy, "cuda"))

    def copies() -> None:
        with torch.cuda.stream(side):
            for _ in range(num_copies):
                copy()

    pairs = [(seconds_once(multiply, "cuda"), seconds_once(multiply, "cuda", copies)) for _ in range(REPEATS)]
    return statistics.median(beside / alone for alone, beside in pairs) - 1


def time_beside(copiers: Mapping[str, Callable[[str], Callable[[], object]]]) -> float:
    """Print what matrix products lose beside the copies of each copier, by the heads of its columns; the worst of the
    first. A copier makes the copy of a way, "gather" or "scatter"."""
    print("\n| beside matrix products | " + " | ".join(copiers) + " |" + "\n|---" + "|---" * len(copiers) + "|")
    first = []
    for way in ("gather", "scatter"):
        losses = [matmul_loss(copy_of(way)) for copy_of in copiers.values()]
        print(f"| {way} | " + " | ".join(f"{loss:+.1%}" for loss in losses) + " |", flush=True)
        first.append(losses[0])
    return max(first)
