"""The cachegen codec: compiled and plain twin bit for bit, its bytes as literals, its attacks by name."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.errors import BadPayload, FrameError, TruncatedFrame, UnsupportedVersion
from lmcache_ext.ops import cachegen, cachegen_numpy, fixed_numpy
from lmcache_ext.ops.layout import DTYPES, ELEMENT_BYTES, Layout, token_rows
from tests.unit.test_fixed import layouts, plain_layout, planes, random_row

if not cachegen.available():
    pytest.skip("no compiler was there when the package was installed", allow_module_level=True)

ISAS = list(cachegen.instruction_sets())


def bins_of(layout: Layout, keys: float = 48, values: float = 12) -> cachegen.Bins:
    return np.tile(np.array([[keys, values]], dtype=np.float32), (layout.layers, 1))


def encode(layout: Layout, row: bytes, bins: cachegen.Bins | None = None) -> bytes:
    """The payload, which every instruction set must write alike."""
    bins = bins_of(layout) if bins is None else bins
    payload, *others = (bytes(cachegen.encode(layout, bins, memoryview(row), isa)) for isa in ISAS)
    assert all(other == payload for other in others)
    return payload


def decode(layout: Layout, payload: bytes, row: bytes, isa: int = 0) -> bytes:
    target = bytearray(row)
    cachegen.decode(layout, memoryview(payload), memoryview(target), isa)
    return bytes(target)


def smooth_row(layout: Layout, seed: int = 0) -> bytes:
    """Keys and values that hardly change from token to token, around means of their own."""
    rng, row = np.random.default_rng(seed), np.zeros(layout.row_bytes, dtype=np.uint8)
    for cell in layout.cells.reshape(-1).tolist():
        for index in (layout.k_index, layout.v_index):
            steps = rng.normal(size=index.shape).cumsum(axis=0) + 20 * rng.normal(size=index.shape[1])
            fixed_numpy.store_plane(layout, row, cell, index, steps.astype(np.float32))
    return row.tobytes()


def many_heads(heads: int, tokens: int, dim: int = 64, dtype="bfloat16") -> Layout:
    """One layer as GPUs lay it out: keys of all tokens and heads, then values."""
    size = ELEMENT_BYTES[dtype]
    cells = (size * np.arange(heads, dtype=np.int64) * dim).reshape(1, heads, 1)
    token = token_rows(tokens, dim, token_elements=heads * dim, first=0)
    return Layout(2 * size * tokens * heads * dim, dtype, cells, token, token + np.int32(tokens * heads * dim))


def spiky_row(layout: Layout, seed: int = 0) -> bytes:
    """Small numbers and a few that no model reaches."""
    rng, row = np.random.default_rng(seed), np.zeros(layout.row_bytes, dtype=np.uint8)
    for cell in layout.cells.reshape(-1).tolist():
        for index in (layout.k_index, layout.v_index):
            values = rng.normal(size=index.shape) * np.where(rng.random(index.shape) < 0.02, 1e4, 1)
            fixed_numpy.store_plane(layout, row, cell, index, values.astype(np.float32))
    return row.tobytes()


ROWS = {
    "normal": random_row,
    "noise": lambda layout, seed: np.random.default_rng(seed).bytes(layout.row_bytes),
    "zero": lambda layout, _: bytes(layout.row_bytes),
    "smooth": smooth_row,
    "spiky": spiky_row,
}


@settings(max_examples=50, deadline=None)
@given(layouts(), st.sampled_from(sorted(ROWS)), st.sampled_from([3.0, 12.0, 48.0, 1000.0]), st.integers(0, 2**32))
def test_both_write_the_same_payload_and_the_same_row(layout, kind, bins, seed):
    row = ROWS[kind](layout, seed)
    payload = encode(layout, row, bins_of(layout, bins, bins))
    assert payload == cachegen_numpy.encode(layout, bins_of(layout, bins, bins), row)
    assert len(payload) <= cachegen.bound(layout)
    before = np.random.default_rng(seed + 1).bytes(layout.row_bytes)
    twin = bytearray(before)
    cachegen_numpy.decode(layout, payload, twin)
    for isa in ISAS:
        assert decode(layout, payload, before, isa) == bytes(twin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "smooth", "spiky"])
def test_an_element_is_off_by_half_a_step_at_most(kind, dtype):
    layout = plain_layout(dtype)
    row = ROWS[kind](layout, 0)
    back = decode(layout, encode(layout, row, bins_of(layout, 32, 32)), bytes(layout.row_bytes))
    rounding = {"float32": 2**-20, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for before, after in zip(planes(layout, row), planes(layout, back), strict=True):
        step = (before - before.mean(axis=0)).std() * 8 / 32
        assert np.abs(after - before).max() <= step * 0.51 + np.abs(before).max() * rounding


def test_a_row_shrinks_to_what_its_bins_say():
    layout = plain_layout(tokens=256, dim=64)
    normal = layout.row_bytes / len(encode(layout, random_row(layout), bins_of(layout, 16, 16)))
    smooth = layout.row_bytes / len(encode(layout, smooth_row(layout), bins_of(layout, 16, 16)))
    assert normal > 4.7  # 3.05 bits of entropy, 0.1 of means and classes
    assert smooth > 1.3 * normal  # neighbours are alike


def test_row_that_no_bell_fits_gets_coarser_bins_rather_than_a_payload_longer_than_itself():
    layout = plain_layout(tokens=256, dim=32)
    row = random_row(layout)  # 512 steps to a standard deviation: most would escape
    payload = encode(layout, row, bins_of(layout, 4096, 4096))
    assert len(payload) <= cachegen.bound(layout) < 1.2 * layout.row_bytes
    assert payload == cachegen_numpy.encode(layout, bins_of(layout, 4096, 4096), row)
    assert payload == encode(layout, row, bins_of(layout, 512, 512))


def test_bins_are_those_of_their_layer_and_part():
    layout = plain_layout(tokens=64, layers=2)
    row = random_row(layout)
    bins = np.array([[100, 8], [8, 100]], dtype=np.float32)
    back = decode(layout, encode(layout, row, bins), row)
    errors = [
        np.abs(after - before).std() / before.std()
        for before, after in zip(planes(layout, row), planes(layout, back), strict=True)
    ]
    assert errors[0] < errors[1] / 5
    assert errors[3] < errors[2] / 5


LITERAL_LAYOUT = plain_layout("float32", tokens=33, dim=1, layers=1)
LITERAL_ROW = struct.pack("<66f", *(value for t in range(33) for value in (t - 16, 4 * (t % 2))))
LITERAL = bytes.fromhex(
    # version, reserved, tokens, elements of a key, of a value; layers, heads, blocks, heads of a stream
    "0200"
    "2100"
    "0100"
    "0100"
    "01000000"
    "01000000"
    "01000000"
    "01000000"
    "930000008f000000"  # directory: 147 and 143 bytes
    "b8591841"
    "81"
    "0000"  # keys: a step of 9.52, differences in class 1, a mean of 0
    "01000000"
    "80000000"  # escapes, bytes of the stream
    # states of 32 lanes
    "ff5f0b10b5000100fb3f3303b5000100b5000100b5000100b5000100b5000100b5000100b5000100b5000100b5000100"
    "fb3f3303b5000100b5000100b5000100b5000100b5000100b5000100b5000100b5000100fb3f3303b5000100b5000100"
    "b5000100b5000100b5000100b5000100b5000100b5000100b5000100fb3f3303"
    "feffffff"  # the escape: the first token lies 2 steps below the mean
    "e4e1ff3f"
    "0b"
    "0100"  # values: a step of 2.00, away from the mean in class 11, a mean of 1
    "00000000"
    "80000000"  # escapes, bytes of the stream
    # states of 32 lanes
    "d8541200bf4d0400c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400"
    "c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400"
    "c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400c8440400bf4d0400"
)


def test_the_bytes_are_as_specified():
    assert encode(LITERAL_LAYOUT, LITERAL_ROW, bins_of(LITERAL_LAYOUT, 8, 8)).hex() == LITERAL.hex()
    back = np.frombuffer(decode(LITERAL_LAYOUT, LITERAL, bytes(len(LITERAL_ROW))), dtype="<f4").reshape(33, 2)
    steps = np.frombuffer(LITERAL[32:36] + LITERAL[179:183], dtype="<f4")
    exact = np.frombuffer(LITERAL_ROW, dtype="<f4").reshape(33, 2)
    np.testing.assert_array_equal(back, np.rint(exact / steps) * steps)


def of_one_stream(payload: bytes) -> bytes:
    """The same as version 1 wrote it, where each part has one stream anyhow."""
    return b"\x01" + payload[1:20] + bytes(4) + payload[24:]


def test_payloads_of_the_version_before_are_read():
    layout = plain_layout(tokens=40, dim=8)
    payload, before = encode(layout, spiky_row(layout)), bytes(layout.row_bytes)
    for isa in ISAS:
        assert decode(layout, of_one_stream(payload), before, isa) == decode(layout, payload, before)
    twin = bytearray(before)
    cachegen_numpy.decode(layout, of_one_stream(payload), twin)
    assert decode(layout, payload, before) == bytes(twin)


@pytest.mark.parametrize(("heads", "tokens", "expected"), [(5, 256, 2), (3, 520, 1), (2, 16, 2)])
def test_heads_share_a_stream_until_it_is_long_enough(heads, tokens, expected):
    layout = many_heads(heads, tokens)
    row = random_row(layout)
    payload = encode(layout, row)
    assert struct.unpack_from("<I", payload, 20) == (expected,)
    assert payload == cachegen_numpy.encode(layout, bins_of(layout), row)
    before = np.random.default_rng(1).bytes(layout.row_bytes)
    twin = bytearray(before)
    cachegen_numpy.decode(layout, payload, twin)
    for isa in ISAS:
        assert decode(layout, payload, before, isa) == bytes(twin)


class TestHostile:
    LAYOUT = plain_layout(tokens=40, dim=8)
    BODY = 24 + 8 * 2  # the first layer's keys

    def payload(self) -> bytearray:
        return bytearray(encode(self.LAYOUT, spiky_row(self.LAYOUT)))

    def refused(self, payload: bytes, error: type[FrameError]) -> None:
        for isa in ISAS:
            with pytest.raises(error):
                decode(self.LAYOUT, bytes(payload), bytes(self.LAYOUT.row_bytes), isa)
        with pytest.raises(error):
            cachegen_numpy.decode(self.LAYOUT, bytes(payload), bytearray(self.LAYOUT.row_bytes))

    def test_another_version(self):
        payload = self.payload()
        payload[0] = 3
        self.refused(payload, UnsupportedVersion)

    @pytest.mark.parametrize("at", [1, 2, 4, 6, 8, 12, 16, 20, 23])
    def test_another_layout(self, at):
        payload = self.payload()
        payload[at] ^= 1
        self.refused(payload, BadPayload)

    def test_version_before_that_counts_heads_of_a_stream(self):
        payload = self.payload()
        payload[0] = 1
        self.refused(payload, BadPayload)

    def test_more_heads_in_a_stream_than_there_are(self):
        payload = self.payload()
        struct.pack_into("<I", payload, 20, 2**31 + 1)
        self.refused(payload, BadPayload)

    @pytest.mark.parametrize("length", [0, 23, 24, 39])
    def test_truncated_before_its_bodies(self, length):
        self.refused(self.payload()[:length], TruncatedFrame)

    @pytest.mark.parametrize("change", [-1, 1])
    def test_bodies_of_another_length(self, change):
        payload = self.payload()
        self.refused(payload[:change] if change < 0 else payload + b"x", BadPayload)

    def test_directory_that_moves_the_border_of_two_parts(self):
        payload = self.payload()
        first, second = struct.unpack_from("<II", payload, 24)
        struct.pack_into("<II", payload, 24, first - 4, second + 4)
        self.refused(payload, BadPayload)

    def test_part_too_short_for_its_lines(self):
        payload = self.payload()
        lengths = list(struct.unpack_from("<4I", payload, 24))
        lengths = [10, sum(lengths) - 10 - lengths[2] - lengths[3], *lengths[2:]]
        struct.pack_into("<4I", payload, 24, *lengths)
        self.refused(payload, BadPayload)

    def test_class_that_is_none(self):
        payload = self.payload()
        payload[self.BODY + 4] = 32
        self.refused(payload, BadPayload)

    @pytest.mark.parametrize("escapes", [0, 2**32 - 1])
    def test_another_number_of_escapes(self, escapes):
        payload = self.payload()
        struct.pack_into("<I", payload, self.BODY + 4 + 3 * 8, escapes)
        self.refused(payload, BadPayload)

    def test_escapes_and_words_in_each_others_place(self):
        payload = self.payload()
        at = self.BODY + 4 + 3 * 8
        escapes, stream = struct.unpack_from("<II", payload, at)
        struct.pack_into("<II", payload, at, escapes - 1, stream + 4)
        self.refused(payload, BadPayload)

    def test_words_or_escapes_that_are_left_over(self):
        payload = self.payload()
        at = self.BODY + 4 + 3 * 8
        escapes, stream = struct.unpack_from("<II", payload, at)
        (part,) = struct.unpack_from("<I", payload, 24)
        ends = (at, escapes + 1, self.BODY + part, bytes(4)), (at + 4, stream + 2, at + 8 + stream, bytes(2))
        for field, count, end, more in ends:
            longer = bytearray(payload)
            longer[end:end] = more
            struct.pack_into("<I", longer, field, count)
            struct.pack_into("<I", longer, 24, part + len(more))
            self.refused(longer, BadPayload)

    @pytest.mark.parametrize("stream_bytes", [0, 2, 126, 127])
    def test_stream_without_room_for_its_states(self, stream_bytes):
        """The last part of a payload, so that nothing lies behind it."""
        payload = self.payload()
        lengths = struct.unpack_from("<4I", payload, 24)
        begin = self.BODY + sum(lengths[:3])
        sizes = begin + 4 + 3 * 8
        struct.pack_into("<II", payload, sizes, 0, stream_bytes)
        struct.pack_into("<I", payload, 36, sizes + 8 + stream_bytes - begin)
        self.refused(payload[: sizes + 8 + stream_bytes], BadPayload)

    def test_flipped_bit_of_a_stream_never_passes(self):
        honest, rng = self.payload(), np.random.default_rng(0)
        begin = self.BODY + 4 + 3 * 8 + 8
        (stream_bytes,) = struct.unpack_from("<I", honest, begin - 4)
        for _ in range(50):
            payload = bytearray(honest)
            payload[int(rng.integers(begin, begin + stream_bytes))] ^= 1 << int(rng.integers(0, 8))
            self.refused(payload, BadPayload)

    @pytest.mark.parametrize("step", [np.inf, np.nan, -np.inf, 3e38])
    def test_step_that_is_no_number_makes_numbers_all_the_same(self, step):
        payload = self.payload()
        struct.pack_into("<f", payload, self.BODY, step)
        back = decode(self.LAYOUT, bytes(payload), bytes(self.LAYOUT.row_bytes))
        twin = bytearray(self.LAYOUT.row_bytes)
        cachegen_numpy.decode(self.LAYOUT, bytes(payload), twin)
        assert back == bytes(twin)


def test_arguments_out_of_range_are_refused():
    layout = plain_layout()
    with pytest.raises(ValueError, match=r"bins: float32 \(1, 2\), expected positive float32 \(2, 2\)"):
        encode(layout, bytes(layout.row_bytes), np.ones((1, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="bins"):
        encode(layout, bytes(layout.row_bytes), np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="row: 1 bytes"):
        encode(layout, b"x")
