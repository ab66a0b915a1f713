"""The fixed-rate kernels without a GPU: their device code lane by lane on the host, against the plain twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.errors import BadPayload, LengthMismatch, UnsupportedVersion
from lmcache_ext.ops import fixed, fixed_cuda, fixed_numpy
from lmcache_ext.ops.chunks_cuda import Chunk, Memory
from lmcache_ext.ops.layout import Layout
from tests.device import CSRC, aligned, built
from tests.unit.test_fixed import layouts, plain_layout, random_row


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """The Python face on kernels that were built for the host."""
    library = fixed_cuda.bind(built(CSRC / "fixed.cu", tmp_path_factory.mktemp("device") / "fixed.so"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed_cuda, "_library", lambda: library)
        yield library


def run(coder, layout: Layout, scheme, rows: list[np.ndarray], payloads: list[np.ndarray]) -> list[int]:
    tables, results = fixed_cuda.tables(layout), np.zeros(len(rows), dtype=np.int64)
    memory = Memory(tables.ctypes.data, results.ctypes.data)
    pairs = zip(rows, payloads, strict=True)
    chunks = [Chunk(row.ctypes.data, payload.ctypes.data, payload.size) for row, payload in pairs]
    coder(layout, scheme, memory, chunks, stream=0)
    return results.tolist()


def array(content: bytes) -> np.ndarray:
    held = aligned(len(content))
    held[:] = np.frombuffer(content, dtype=np.uint8)
    return held


@settings(max_examples=60, deadline=None)
@given(layouts(aligned=True), st.sampled_from(fixed.SCHEMES), st.booleans(), st.integers(0, 2**32))
def test_every_lane_together_does_what_the_twin_does(layout, scheme, noise, seed):
    row = np.random.default_rng(seed).bytes(layout.row_bytes) if noise else random_row(layout, seed)
    expected = fixed_numpy.encode(layout, scheme, row)
    out = np.full(len(expected) + 1, 0xA5, dtype=np.uint8)[1:]  # an odd address
    assert run(fixed_cuda.encode, layout, scheme, [array(row)], [out]) == [len(expected)]
    assert out.tobytes() == expected
    before = np.random.default_rng(seed + 1).bytes(layout.row_bytes)
    twin, target = bytearray(before), array(before)
    fixed_numpy.decode(layout, scheme, expected, twin)
    assert run(fixed_cuda.decode, layout, scheme, [target], [out]) == [0]
    assert target.tobytes() == bytes(twin)


@pytest.mark.parametrize("scheme", fixed.SCHEMES)
def test_more_chunks_than_one_launch_takes(scheme):
    layout = plain_layout(tokens=4, dim=8, layers=1)
    rows = [random_row(layout, seed) for seed in range(70)]
    payloads = [np.zeros(fixed.payload_bytes(layout, scheme), dtype=np.uint8) for _ in rows]
    run(fixed_cuda.encode, layout, scheme, [array(row) for row in rows], payloads)
    assert [out.tobytes() for out in payloads] == [fixed_numpy.encode(layout, scheme, row) for row in rows]


def test_payload_of_another_length_version_or_scheme_leaves_its_row_alone_and_hurts_no_other():
    layout = plain_layout(tokens=4, dim=8)
    honest = fixed_numpy.encode(layout, "fp8", random_row(layout))
    hostile = [honest[:-1], b"\x02" + honest[1:], honest[:1] + b"\x01" + honest[2:], honest]
    before = b"\xa5" * layout.row_bytes
    rows, twin = [array(before) for _ in hostile], bytearray(before)
    fixed_numpy.decode(layout, "fp8", honest, twin)
    results = run(fixed_cuda.decode, layout, "fp8", rows, [array(payload) for payload in hostile])
    refusals = [fixed_cuda.refusal(layout, "fp8", result, 1) for result in results]
    assert [type(refusal) for refusal in refusals[:3]] == [LengthMismatch, UnsupportedVersion, BadPayload]
    assert [row.tobytes() for row in rows] == [before] * 3 + [bytes(twin)]
    assert refusals[3] is None


def test_room_of_another_length_is_refused():
    layout = plain_layout(tokens=4, dim=8)
    out = np.full(fixed.payload_bytes(layout, "int8") - 1, 0xA5, dtype=np.uint8)
    results = run(fixed_cuda.encode, layout, "int8", [array(random_row(layout))], [out])
    assert isinstance(fixed_cuda.refusal(layout, "int8", results[0], out.size), LengthMismatch)
    assert (out == 0xA5).all()


def test_row_that_is_not_a_multiple_of_its_elements_is_refused():
    layout = plain_layout(tokens=4, dim=8)
    row, out = aligned(layout.row_bytes + 1), np.zeros(fixed.payload_bytes(layout, "int8"), dtype=np.uint8)
    with pytest.raises(ValueError, match="multiple"):
        run(fixed_cuda.encode, layout, "int8", [row[1:]], [out])
