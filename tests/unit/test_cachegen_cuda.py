"""The cachegen kernels without a GPU: their device code lane by lane on the host, against the plain twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.errors import BadPayload, FrameError
from lmcache_ext.ops import cachegen, cachegen_cuda, cachegen_numpy
from lmcache_ext.ops.chunks_cuda import Chunk, Memory, judge
from lmcache_ext.ops.layout import DTYPES, Layout
from tests.device import CSRC, aligned, built
from tests.unit import test_cachegen
from tests.unit.test_cachegen import ROWS, bins_of, many_heads, of_one_stream, spiky_row
from tests.unit.test_fixed import layouts, plain_layout, random_row

STREAM_SYMBOLS = 500  # several streams in small parts


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory):
    """The Python face on kernels that were built for the host."""
    out = tmp_path_factory.mktemp("device") / "cachegen.so"
    library = cachegen_cuda.bind(built(CSRC / "cachegen.cu", out, f"-DKVX_STREAM_SYMBOLS={STREAM_SYMBOLS}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cachegen_cuda, "_library", lambda: library)
        patch.setattr(cachegen, "STREAM_SYMBOLS", STREAM_SYMBOLS)
        yield library


class Device:
    """Memory of a GPU that is not there: scratch of so many chunks, full of what others have left."""

    def __init__(self, layout: Layout, bins=None, *, encodes: bool, chunks: int = 1) -> None:
        self.layout = layout
        self.tables = cachegen_cuda.tables(layout, bins)
        self.scratch = aligned(chunks * cachegen_cuda.scratch_bytes(layout, encodes=encodes), 7)

    def memory(self, results: np.ndarray) -> Memory:
        return Memory(self.tables.ctypes.data, results.ctypes.data, self.scratch.ctypes.data, self.scratch.size)


def encode(layout: Layout, bins, rows: list[bytes], *, at_a_time: int = 1, room: int = 0) -> list[bytes | None]:
    device, results = Device(layout, bins, encodes=True, chunks=at_a_time), np.zeros(len(rows), dtype=np.int64)
    held = [aligned(layout.row_bytes) for _ in rows]
    for target, row in zip(held, rows, strict=True):
        target[:] = np.frombuffer(row, dtype=np.uint8)
    payloads = [np.full((room or cachegen.bound(layout)) + 1, 0xA5, dtype=np.uint8)[1:] for _ in rows]  # an odd address
    chunks = [Chunk(row.ctypes.data, out.ctypes.data, out.size) for row, out in zip(held, payloads, strict=True)]
    cachegen_cuda.encode(layout, device.memory(results), chunks, stream=0)
    for length, out in zip(cachegen_cuda.lengths(results), payloads, strict=True):
        assert (out[length or 0 :] == 0xA5).all(), "bytes behind the payload changed"
    return [
        None if length is None else out[:length].tobytes()
        for length, out in zip(cachegen_cuda.lengths(results), payloads, strict=True)
    ]


def decode(layout: Layout, payloads: list[bytes], before: bytes, *, at_a_time: int = 1) -> list[bytes | FrameError]:
    """The row of each payload, or why it was refused, in which case the row must be as before."""
    device, results = Device(layout, encodes=False, chunks=at_a_time), np.zeros(len(payloads), dtype=np.int64)
    rows = [aligned(layout.row_bytes) for _ in payloads]
    for row in rows:
        row[:] = np.frombuffer(before, dtype=np.uint8)
    held = [np.frombuffer(b"x" + payload, dtype=np.uint8)[1:] for payload in payloads]
    chunks = [
        Chunk(row.ctypes.data, payload.ctypes.data, payload.size) for row, payload in zip(rows, held, strict=True)
    ]
    cachegen_cuda.decode(layout, device.memory(results), chunks, stream=0)
    answers: list[bytes | FrameError] = []
    for row, payload, result in zip(rows, held, results.tolist(), strict=True):
        refusal = cachegen_cuda.refusal(result, payload.size)
        assert refusal is None or row.tobytes() == before
        answers.append(refusal or row.tobytes())
    return answers


def twin_row(layout: Layout, payload: bytes, before: bytes) -> bytes:
    row = bytearray(before)
    cachegen_numpy.decode(layout, payload, row)
    return bytes(row)


@settings(max_examples=40, deadline=None)
@given(layouts(aligned=True), st.sampled_from(sorted(ROWS)), st.sampled_from([3.0, 12.0, 48.0]), st.integers(0, 2**32))
def test_every_lane_together_does_what_the_twin_does(layout, kind, bins, seed):
    row = ROWS[kind](layout, seed)
    payload = cachegen_numpy.encode(layout, bins_of(layout, bins, bins), row)
    (coded,) = encode(layout, bins_of(layout, bins, bins), [row])
    if coded is not None:  # else the twin has halved the bins
        assert coded == payload
    before = np.random.default_rng(seed + 1).bytes(layout.row_bytes)
    assert decode(layout, [payload], before) == [twin_row(layout, payload, before)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_in_several_streams_and_lines_longer_than_a_batch_of_groups(dtype):
    layout = many_heads(5, 300, dim=33, dtype=dtype)
    row, before = spiky_row(layout), bytes(layout.row_bytes)
    payload = cachegen_numpy.encode(layout, bins_of(layout), row)
    assert encode(layout, bins_of(layout), [row]) == [payload]
    assert decode(layout, [payload], before) == [twin_row(layout, payload, before)]


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_chunks_take_turns_where_scratch_is_short(at_a_time):
    layout = plain_layout(tokens=40, dim=8)
    rows = [random_row(layout, seed) for seed in range(5)]
    payloads = encode(layout, bins_of(layout), rows, at_a_time=at_a_time)
    assert payloads == [cachegen_numpy.encode(layout, bins_of(layout), row) for row in rows]
    before = bytes(layout.row_bytes)
    expected = [twin_row(layout, payload, before) for payload in payloads]
    assert decode(layout, payloads, before, at_a_time=at_a_time) == expected


def test_payload_that_would_exceed_its_room_is_not_written():
    layout = plain_layout(tokens=40, dim=8)
    row = random_row(layout)
    (payload,) = encode(layout, bins_of(layout), [row])
    assert encode(layout, bins_of(layout), [row], room=len(payload)) == [payload]
    assert encode(layout, bins_of(layout), [row], room=len(payload) - 1) == [None]


def test_payloads_of_the_version_before_are_read():
    layout = plain_layout(tokens=40, dim=8)
    payload, before = cachegen_numpy.encode(layout, bins_of(layout), spiky_row(layout)), bytes(layout.row_bytes)
    assert decode(layout, [of_one_stream(payload)], before) == [twin_row(layout, payload, before)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["flip", "byte", "cut", "add"]))
def test_damaged_payload_is_refused_where_the_twin_refuses_it_and_no_other_chunk_notices(seed, how):
    layout, rng = many_heads(4, 40, dim=9), np.random.default_rng(seed)
    honest = cachegen_numpy.encode(layout, bins_of(layout), spiky_row(layout))
    damaged, at = bytearray(honest), int(rng.integers(0, len(honest) if rng.random() < 0.5 else 200))
    if how == "flip":
        damaged[at] ^= 1 << int(rng.integers(0, 8))
    elif how == "byte":
        damaged[at] = int(rng.integers(0, 256))
    elif how == "cut":
        del damaged[at:]
    else:
        damaged.insert(at, int(rng.integers(0, 256)))
    before = rng.bytes(layout.row_bytes)
    answers = decode(layout, [honest, bytes(damaged), honest], before, at_a_time=3)
    assert answers[0] == answers[2] == twin_row(layout, honest, before)
    assert told(answers[1]) == told(twin_answer(layout, bytes(damaged), before))


def twin_answer(layout: Layout, payload: bytes, before: bytes) -> bytes | FrameError:
    try:
        return twin_row(layout, payload, before)
    except FrameError as error:
        return error


def told(answer: bytes | FrameError) -> bytes | type[FrameError]:
    return answer if isinstance(answer, bytes) else type(answer)


class TestHostile(test_cachegen.TestHostile):
    """Every attack by name on the kernels, which leave the row alone."""

    def refused(self, payload: bytes, error: type[FrameError]) -> None:
        before = b"\xa5" * self.LAYOUT.row_bytes
        assert told(*decode(self.LAYOUT, [bytes(payload)], before)) is error


def test_what_is_unaligned_or_too_small_is_refused_before_anything_runs():
    layout = plain_layout(tokens=4, dim=8)
    device, results = Device(layout, encodes=False), np.full(1, 99, dtype=np.int64)
    row, payload = aligned(layout.row_bytes), aligned(64)
    memory = device.memory(results)
    with pytest.raises(ValueError, match="multiple"):
        cachegen_cuda.decode(layout, memory, [Chunk(row.ctypes.data + 1, payload.ctypes.data, 64)], stream=0)
    chunks = [Chunk(row.ctypes.data, payload.ctypes.data, 64)]
    moved = memory._replace(scratch_ptr=memory.scratch_ptr + 8)
    with pytest.raises(ValueError, match="multiple"):
        cachegen_cuda.decode(layout, moved, chunks, stream=0)
    small = memory._replace(scratch_bytes=memory.scratch_bytes - 1)
    with pytest.raises(ValueError, match="scratch"):
        cachegen_cuda.decode(layout, small, chunks, stream=0)
    odd = Layout(layout.row_bytes + 1, layout.dtype, layout.cells + 1, layout.k_index, layout.v_index)
    with pytest.raises(ValueError, match="multiple"):
        cachegen_cuda.tables(odd)
    with pytest.raises(ValueError, match="bins"):
        cachegen_cuda.tables(layout, np.zeros((2, 2), dtype=np.float32))
    assert results[0] == 99


def test_launch_that_fails_says_so():
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        judge(-(2**63) + 2 + 700)
    assert isinstance(cachegen_cuda.refusal(-5, 10), BadPayload)
