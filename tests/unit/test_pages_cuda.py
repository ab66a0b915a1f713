"""The CUDA page copier without a GPU: its device code lane by lane on the host, its build, its refusals."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.ops import pages_cuda, pages_numpy
from lmcache_ext.ops.table import PageTable

ROOT = Path(__file__).resolve().parents[2]
UNALIGNED = -(2**63)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """gather and scatter of csrc/pages_transfer.h, run on the host."""
    compiler = os.environ.get("CXX", "").split() or [next(filter(shutil.which, ("g++", "clang++")), "")]
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler: apt-get install g++")
    library = tmp_path_factory.mktemp("device") / "device.so"
    source = ROOT / "tests" / "native" / "pages_device.cpp"
    command = [*compiler, "-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(library))


def run(function, table, block_ids, rows, row_offsets):
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, ctypes.c_int32, pointer, pointer, int64, pointer, int64]
    function.restype = int64
    tables = (table.layout.ctypes.data, len(table.tensors), block_ids.ctypes.data, row_offsets.ctypes.data)
    return function(*tables, block_ids.size, rows.ctypes.data, rows.size)


def aligned(size: int, seed: int) -> np.ndarray:
    """Random bytes that begin at a multiple of 16."""
    raw = np.random.default_rng(seed).integers(0, 256, size + 16, dtype=np.uint8)
    return raw[-raw.ctypes.data % 16 :][:size]


@st.composite
def cases(draw):
    """Tensors of one pool, blocks and offsets, all in multiples of 16 bytes; some beyond what one launch takes."""
    num_blocks, num_tensors = draw(st.sampled_from([(1, 1), (5, 3), (9, 2), (3, 130), (1100, 1)]))
    shapes, end = [], 0
    for _ in range(num_tensors):
        page = 16 * draw(st.sampled_from([1, 2, 7, 256, 257, 600]) if num_blocks * num_tensors < 100 else st.just(2))
        stride = page + 16 * draw(st.sampled_from([0, 0, 1]))
        shapes.append((end, num_blocks, stride, page))
        end += num_blocks * stride
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    block_bytes = sum(shape[3] for shape in shapes)
    chosen = rng.permutation(num_blocks)[: draw(st.integers(0, num_blocks))].astype(np.int64)
    offsets = 16 + rng.permutation(len(chosen)).astype(np.int64) * block_bytes
    return shapes, end, chosen, offsets, 32 + len(chosen) * block_bytes


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans(), st.integers(0, 2**32))
def test_every_lane_together_does_what_the_twin_does(device, case, gathers, seed):
    shapes, pool_bytes, block_ids, offsets, rows_bytes = case
    pools, rows = [aligned(pool_bytes, seed) for _ in range(2)], [aligned(rows_bytes, seed + 1) for _ in range(2)]
    tables = [PageTable.of((pool.ctypes.data + start, *rest) for start, *rest in shapes) for pool in pools]
    twin = pages_numpy.gather_pages if gathers else pages_numpy.scatter_pages
    expected = twin(tables[0], block_ids, rows[0], offsets)
    assert run(device.gather if gathers else device.scatter, tables[1], block_ids, rows[1], offsets) == expected
    np.testing.assert_array_equal(pools[0], pools[1])
    np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize(
    ("shape", "offset", "refusal"),
    [
        ((8, 4, 32, 32), 0, UNALIGNED),
        ((0, 4, 40, 32), 0, UNALIGNED),
        ((0, 4, 32, 24), 0, UNALIGNED),
        ((0, 4, 32, 32), 8, UNALIGNED),
        ((0, 4, 32, 32), 112, -1),
        ((0, 1, 32, 32), 0, -1),
    ],
)
def test_what_is_unaligned_or_outside_is_refused_before_a_byte_moves(device, shape, offset, refusal):
    pool, rows = aligned(256, 0), aligned(128, 1)
    before = rows.copy()
    table = PageTable.of([(pool.ctypes.data + shape[0], *shape[1:])])
    assert run(device.gather, table, np.array([1]), rows, np.array([offset])) == refusal
    np.testing.assert_array_equal(rows, before)


def test_refusals_are_told_apart():
    assert pages_cuda.judge(4096) == 4096
    with pytest.raises(ValueError, match="multiple of 16"):
        pages_cuda.judge(UNALIGNED)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        pages_cuda.judge(UNALIGNED + 1 + 700)
    with pytest.raises(ValueError, match="block or tensor 3"):
        pages_cuda.judge(-4)
