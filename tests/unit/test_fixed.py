"""The fixed-rate codecs: compiled and plain twin bit for bit, how far off they may be, and what they refuse."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.errors import BadPayload, LengthMismatch, UnsupportedVersion
from lmcache_ext.ops import fixed, fixed_numpy
from lmcache_ext.ops.layout import DTYPES, ELEMENT_BYTES, Layout

RUN = 16  # kRun in csrc/elements.h

if not fixed.available():
    pytest.skip("no compiler was there when the package was installed", allow_module_level=True)


@st.composite
def layouts(draw, *, aligned=False) -> Layout:
    """Cells in any order with gaps between them; addresses are odd unless aligned.

    Elements of a cell are in any order: each by itself, or in runs of RUN as those of most pages are.
    """
    dtype = draw(st.sampled_from(DTYPES))
    run = draw(st.sampled_from((1, RUN)))
    dims = st.integers(1, 40 if run == 1 else 5).map(lambda runs: runs * run)
    tokens, k_dim, v_dim = draw(st.integers(1, 40)), draw(dims), draw(dims)
    shape = draw(st.tuples(*[st.integers(1, 2)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    room = tokens * (k_dim + v_dim) + run * draw(st.integers(0, 3))
    runs = rng.permutation(room // run)[: tokens * (k_dim + v_dim) // run].astype(np.int32)
    places = (runs[:, None] * run + np.arange(run, dtype=np.int32)).reshape(-1)
    cell_bytes = room * ELEMENT_BYTES[dtype] + (0 if aligned else draw(st.integers(0, 3)))
    cells = rng.permutation(int(np.prod(shape))).reshape(shape).astype(np.int64) * cell_bytes
    k_index, v_index = places[: tokens * k_dim].reshape(tokens, k_dim), places[tokens * k_dim :].reshape(tokens, v_dim)
    return Layout(int(np.prod(shape)) * cell_bytes + draw(st.integers(0, 5)), dtype, cells, k_index, v_index)


def plain_layout(dtype="bfloat16", *, tokens=64, dim=64, layers=2) -> Layout:
    index = np.arange(tokens * 2 * dim, dtype=np.int32).reshape(tokens, 2, dim)
    cell_bytes = index.size * ELEMENT_BYTES[dtype]
    cells = np.arange(layers, dtype=np.int64).reshape(layers, 1, 1) * cell_bytes
    k_index, v_index = (np.ascontiguousarray(index[:, i]) for i in (0, 1))
    return Layout(layers * cell_bytes, dtype, cells, k_index, v_index)


def random_row(layout: Layout, seed: int = 0) -> bytes:
    """Normal numbers where the layout has elements, noise between them."""
    rng = np.random.default_rng(seed)
    row = np.frombuffer(bytearray(rng.bytes(layout.row_bytes)), dtype=np.uint8)
    for cell in layout.cells.reshape(-1).tolist():
        for index in (layout.k_index, layout.v_index):
            scale = 10.0 ** rng.integers(-4, 4)
            fixed_numpy.store_plane(layout, row, cell, index, (rng.normal(size=index.shape) * scale).astype(np.float32))
    return row.tobytes()


def planes(layout: Layout, row: bytes):
    flat = np.frombuffer(row, dtype=np.uint8)
    for cell in layout.cells.reshape(-1).tolist():
        for index in (layout.k_index, layout.v_index):
            yield fixed_numpy.load_plane(layout, flat, cell, index)


def decoded(layout, scheme, payload, row) -> bytes:
    """The row, which every instruction set must read alike."""
    targets = [bytearray(row) for _ in fixed.instruction_sets()]
    for isa, target in zip(fixed.instruction_sets(), targets, strict=True):
        fixed.decode(layout, scheme, memoryview(payload), memoryview(target), isa)
    assert all(target == targets[0] for target in targets)
    return bytes(targets[0])


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(fixed.SCHEMES), st.booleans(), st.integers(0, 2**32))
def test_both_write_the_same_payload_and_the_same_row(layout, scheme, noise, seed):
    row = np.random.default_rng(seed).bytes(layout.row_bytes) if noise else random_row(layout, seed)
    payload = fixed_numpy.encode(layout, scheme, row)
    for isa in fixed.instruction_sets():
        assert bytes(fixed.encode(layout, scheme, memoryview(row), isa)) == payload
    before = np.random.default_rng(seed + 1).bytes(layout.row_bytes)
    twin = bytearray(before)
    fixed_numpy.decode(layout, scheme, payload, twin)
    assert decoded(layout, scheme, payload, before) == bytes(twin)


@settings(max_examples=30, deadline=None)
@given(layouts(), st.sampled_from(fixed.SCHEMES), st.integers(0, 2**32))
def test_any_payload_of_the_right_length_decodes_within_the_elements(layout, scheme, seed):
    honest = fixed_numpy.encode(layout, scheme, bytes(layout.row_bytes))
    payload = honest[:16] + np.random.default_rng(seed).bytes(len(honest) - 16)
    before = np.random.default_rng(seed + 1).bytes(layout.row_bytes)
    twin = bytearray(before)
    fixed_numpy.decode(layout, scheme, payload, twin)
    assert decoded(layout, scheme, payload, before) == bytes(twin)


@pytest.mark.parametrize("scheme", ["kivi4", "kivi2"])
def test_zeros_of_both_signs_are_one_number(scheme):
    layout = plain_layout("float32", tokens=32, dim=32, layers=1)
    zeros = np.where(np.random.default_rng(0).random(layout.row_bytes // 4) < 0.5, 0.0, -0.0).astype("<f4")
    expected = fixed_numpy.encode(layout, scheme, bytes(layout.row_bytes))
    assert fixed_numpy.encode(layout, scheme, zeros.tobytes()) == expected
    for isa in fixed.instruction_sets():
        assert bytes(fixed.encode(layout, scheme, memoryview(zeros.tobytes()), isa)) == expected


# worst error of an element, as a share of the largest of its scale's neighbours
BOUNDS = {"fp8": 16 / 448 + 2**-8, "int8": 0.5 / 127 + 2**-8, "kivi4": 2 / 15 / 2 + 2**-6, "kivi2": 2 / 3 / 2 + 2**-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", fixed.SCHEMES)
def test_an_element_is_off_by_no_more_than_its_step(scheme, dtype):
    layout = plain_layout(dtype)
    row = random_row(layout)
    payload = bytes(fixed.encode(layout, scheme, memoryview(row)))
    for before, after in zip(planes(layout, row), planes(layout, decoded(layout, scheme, payload, row)), strict=True):
        assert np.abs(after - before).max() <= BOUNDS[scheme] * np.abs(before).max()
    assert len(payload) == fixed.payload_bytes(layout, scheme)


RATIOS = {"fp8": 2.0, "int8": 2.0, "kivi4": 16 / 5, "kivi2": 16 / 3}


@pytest.mark.parametrize("scheme", fixed.SCHEMES)
def test_payload_has_the_bits_that_its_name_says(scheme):
    layout = plain_layout()
    assert layout.row_bytes / fixed.payload_bytes(layout, scheme) == pytest.approx(RATIOS[scheme], rel=0.01)


def test_e4m3_is_the_one_torch_has():
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32) * np.float32(60)
    values = np.concatenate([values, fixed_numpy._E4M3[:127].astype(np.float32), np.float32([0, -0.0, 447, 2**-10])])
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fixed_numpy.to_e4m3(values), theirs)
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint8)
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(fixed_numpy.from_e4m3(codes), theirs)


@pytest.mark.parametrize("scheme", fixed.SCHEMES)
def test_what_is_no_number_becomes_zero_and_spoils_nothing(scheme):
    layout = plain_layout("float32", tokens=32, dim=32, layers=1)
    values = np.ones(layout.row_bytes // 4, dtype="<f4")
    values[[3, 700]] = np.nan, np.inf
    after = np.frombuffer(
        decoded(
            layout, scheme, bytes(fixed.encode(layout, scheme, memoryview(values.tobytes()))), bytes(values.nbytes)
        ),
        "<f4",
    )
    assert np.isfinite(after).all()
    assert np.abs(after[[3, 700]]).max() < 0.01
    assert np.abs(np.delete(after, [3, 700]) - 1).max() < 0.01


class TestHostile:
    LAYOUT = plain_layout(tokens=4, dim=8)

    def refused(self, payload, error, scheme="fp8"):
        row = bytearray(b"\xa5" * self.LAYOUT.row_bytes)
        with pytest.raises(error):
            fixed.decode(self.LAYOUT, scheme, memoryview(payload), memoryview(row))
        with pytest.raises(error):
            fixed_numpy.decode(self.LAYOUT, scheme, bytes(payload), row)
        assert row == b"\xa5" * self.LAYOUT.row_bytes

    def payload(self):
        return bytearray(fixed.encode(self.LAYOUT, "fp8", memoryview(random_row(self.LAYOUT))))

    @pytest.mark.parametrize("change", [0, 1, -1])
    def test_another_length(self, change):
        payload = self.payload()
        self.refused(payload[:-1] if change < 0 else payload + b"x" if change else b"", LengthMismatch)

    def test_another_version(self):
        payload = self.payload()
        payload[0] = 2
        self.refused(payload, UnsupportedVersion)

    @pytest.mark.parametrize("at", [1, 2, 4, 6, 8, 15])
    def test_another_layout(self, at):
        payload = self.payload()
        payload[at] ^= 1
        self.refused(payload, BadPayload)

    def test_another_scheme_of_the_same_length(self):
        self.refused(self.payload(), BadPayload, scheme="int8")


def test_the_bytes_are_as_specified():
    layout = plain_layout("float32", tokens=1, dim=2, layers=1)
    row = struct.pack("<4f", 1.0, -0.5, 2.0, 127.0)
    header = bytes.fromhex("01000100020002000100000000000000")
    expected = {
        "fp8": struct.pack(
            "<f2Bf2B", np.float32(1) / np.float32(448), 0x7E, 0xF6, np.float32(127) / np.float32(448), 0x4E, 0x7E
        ),
        "int8": struct.pack("<f2bf2b", np.float32(1) / np.float32(127), 127, -64, 1.0, 2, 127),
        # keys: a group of one token for each of two channels; values: both channels of the token
        "kivi4": bytes.fromhex("803f00000000bf00000000400541f0"),
    }
    for scheme, body in expected.items():
        head = bytes([1, fixed.SCHEMES.index(scheme)]) + header[2:]
        assert bytes(fixed.encode(layout, scheme, memoryview(row))).hex() == (head + body).hex(), scheme


class TestLayout:
    def test_that_leaves_its_row_is_refused(self):
        good = plain_layout()
        with pytest.raises(ValueError, match=rf"outside the row of \[0, {good.row_bytes - 1}\)"):
            Layout(good.row_bytes - 1, good.dtype, good.cells, good.k_index, good.v_index)
        with pytest.raises(ValueError, match=r"bytes \[-2,"):
            Layout(good.row_bytes, good.dtype, good.cells, good.k_index - np.int32(1), good.v_index)

    def test_of_another_row_is_refused(self):
        with pytest.raises(ValueError, match="row: 3 bytes, the layout is of"):
            fixed.encode(plain_layout(), "fp8", memoryview(b"abc"))
