"""Builds kernels for the host, where every lane of every warp runs one after the other (csrc/stage.h)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from lmcache_ext.ops import pages_cuda, pages_fp8_cuda

CSRC = Path(__file__).resolve().parents[1] / "lmcache_ext" / "ops" / "csrc"
PAGES_DEVICE = Path(__file__).parent / "native" / "pages_device.cpp"  # pages.cu is launched by CUDA alone


def compiler() -> list[str]:
    """What `setup.py` would take; skips the test where there is none."""
    chosen = os.environ.get("CXX", "").split() or [next(filter(shutil.which, ("g++", "clang++")), "")]
    if not shutil.which(chosen[0]):
        pytest.skip("no C++ compiler: apt-get install g++")
    return chosen


def built(source: Path, out: Path, *flags: str) -> ctypes.CDLL:
    command = [*compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", *flags]
    subprocess.run([*command, "-x", "c++", str(source), "-o", str(out)], check=True, timeout=120)
    return ctypes.CDLL(str(out))


@cache
def page_libraries() -> tuple[ctypes.CDLL, ctypes.CDLL, TemporaryDirectory[str]]:
    """Those of the plain page copier and of the one to eight bits, built once; and where they lie until the end."""
    kept = TemporaryDirectory()
    plain = pages_cuda.bind(built(PAGES_DEVICE, Path(kept.name, "pages.so")))
    return plain, pages_fp8_cuda.bind(built(CSRC / "pages_fp8.cu", Path(kept.name, "pages_fp8.so"))), kept


@contextmanager
def page_kernels() -> Iterator[ctypes.CDLL]:
    """The Python faces of both page copiers on kernels built for the host; yields the library of the plain one."""
    plain, fp8, _ = page_libraries()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_cuda, "_library", lambda: plain)
        patch.setattr(pages_fp8_cuda, "_library", lambda: fp8)
        yield plain


def aligned(size: int, seed: int | None = None) -> np.ndarray:
    """Bytes that begin at a multiple of 16: random ones, or zeros without a seed."""
    raw = np.zeros(size + 16, np.uint8) if seed is None else np.random.default_rng(seed).integers(0, 256, size + 16)
    raw = raw.astype(np.uint8)
    return raw[-raw.ctypes.data % 16 :][:size]
