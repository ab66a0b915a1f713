"""The CUDA kernels are built by nvcc, of which no GPU is asked."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.run import gpu
from lmcache_ext.ops import cachegen_cuda, fixed_cuda, pages_cuda, pages_fp8_cuda
from lmcache_ext.ops.launches_cuda import Finished, Launches
from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.table import PageTable, Part
from scripts.check_image import missing_kernels
from tests.cuda_streams import Driver
from tests.device import CSRC, aligned

pytestmark = pytest.mark.e2e  # ten seconds of nvcc

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("no nvcc: .ci/run shows what to install")
    out = tmp_path_factory.mktemp("cuda") / "cuda.so"
    command = [sys.executable, str(ROOT / "scripts" / "build_cuda.py"), "--out", str(out)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "sm_80, sm_86, sm_89, sm_90" in built.stdout  # and those that this nvcc knows of the later ones
    assert "and PTX" in built.stdout
    return out


def test_library_has_what_every_source_exports_and_no_more(library):
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    declared = [re.findall(r"^KVX_EXPORT \S+ (\w+)\(", path.read_text(), re.M) for path in CSRC.glob("*.cu")]
    assert all(declared)
    assert set(re.findall(r" T (\w+)", listed)) == {name for names in declared for name in names}


def test_check_of_an_image_misses_what_a_library_of_older_sources_lacks(library, tmp_path):
    newer = tmp_path / "newer.cu"
    newer.write_text("KVX_EXPORT int kvx_cuda_newer(int a) { return a; }\n")
    assert list(missing_kernels(sorted(CSRC.glob("*.cu")), library)) == []
    (line,) = missing_kernels([newer], library)
    assert line.startswith("kvx_cuda_newer of newer.cu is not in cuda.so")
    assert "were not compiled" in next(missing_kernels([newer], tmp_path / "none.so"))


@pytest.mark.parametrize("shape", [None, PageShape("bfloat16", heads=1, runs=1, k_run=16, v_run=16, heads_first=True)])
def test_launch_without_a_gpu_is_a_failed_copy(library, monkeypatch, shape):
    if gpu() is not None:
        pytest.skip("there is one")
    loaded = pages_fp8_cuda.bind(pages_cuda.bind(ctypes.CDLL(str(library))))
    for face in (pages_cuda, pages_fp8_cuda):
        monkeypatch.setattr(face, "_library", lambda: loaded)
    rows, pool, first = aligned(256), aligned(256, 1), np.zeros(1, dtype=np.int64)
    copy = pages_cuda.copy_pages if shape is None else partial(pages_fp8_cuda.copy_pages, shape=shape)

    def gather(part, stream):
        place = {"rows_ptr": rows.ctypes.data, "rows_bytes": rows.size, "row_offsets": part.offsets}
        return copy("gather", table=part.table, block_ids=part.block_ids, **place, stream=0)

    launches = Launches(gather, Driver())
    launches.submit(1, [Part(PageTable.of([(pool.ctypes.data, 4, 64, 64)]), first, first)])
    launches.wait()
    assert launches.finished() == [Finished(1, None, 0.0)]
    assert not rows.any()


def test_library_is_of_the_abi_that_its_faces_want(library):
    loaded = ctypes.CDLL(str(library))
    assert loaded.kvx_cuda_abi() == pages_cuda.ABI
    assert loaded.kvx_cuda_fp8_abi() == pages_fp8_cuda.ABI
    assert loaded.kvx_cuda_cachegen_abi() == cachegen_cuda.ABI
    assert loaded.kvx_cuda_fixed_abi() == fixed_cuda.ABI
