"""The lossless codec: compiled and plain twin bit for bit, its bytes as literals, its attacks by name."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.errors import BadPayload, FrameError, LengthMismatch, TruncatedFrame, UnsupportedVersion
from lmcache_ext.ops import lossless, lossless_numpy

if not lossless.available():
    pytest.skip("no compiler was there when the package was installed", allow_module_level=True)

ISAS = list(lossless.instruction_sets())
DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def bfloat16(values) -> bytes:
    """Float32 values, cut to bfloat16."""
    return (np.asarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()


def normal_row(elements: int, seed: int = 0) -> bytes:
    return bfloat16(np.random.default_rng(seed).normal(size=elements))


def encode(row: bytes, element_bytes: int, segment: int = 1 << 16) -> bytes:
    """The payload, which every instruction set must write alike."""
    payload, *others = (bytes(lossless.encode(memoryview(row), element_bytes, segment, isa)) for isa in ISAS)
    assert all(other == payload for other in others)
    return payload


def decode(payload: bytes, raw_bytes: int, isa: int = 0) -> bytes:
    """The row, from a buffer with guards on both sides."""
    buffer = bytearray(b"\xa5" * (raw_bytes + 128))
    try:
        lossless.decode(memoryview(payload), memoryview(buffer)[64 : 64 + raw_bytes], isa)
    finally:
        assert buffer[:64] == buffer[64 + raw_bytes :] == b"\xa5" * 64
    return bytes(buffer[64 : 64 + raw_bytes])


@st.composite
def rows(draw) -> tuple[bytes, int, int]:
    """A row with what a plane can look like in it, the size of its elements and of a segment."""
    element_bytes, rng = draw(st.sampled_from([1, 2, 4])), np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = []
    for kind in draw(st.lists(st.sampled_from(["normal", "noise", "constant", "two", "skewed"]), max_size=4)):
        count = draw(st.integers(1, 900))
        if kind == "normal":
            parts.append(bfloat16(rng.normal(size=count)))
        elif kind == "noise":
            parts.append(rng.bytes(count))
        elif kind == "constant":
            parts.append(bytes([draw(st.integers(0, 255))]) * count)
        else:
            parts.append((rng.random(count) < (0.5 if kind == "two" else 0.004)).astype(np.uint8).tobytes())
    return b"".join(parts), element_bytes, draw(st.sampled_from([1, 33, 512, 4096]))


@settings(max_examples=60, deadline=None)
@given(rows())
def test_both_write_the_same_bytes_and_read_them_back(case):
    row, element_bytes, segment = case
    payload = lossless_numpy.encode(row, element_bytes, segment)
    assert encode(row, element_bytes, segment) == payload
    assert len(payload) <= lossless.bound(len(row), element_bytes, segment)
    assert lossless_numpy.decode(payload, len(row)) == row
    for isa in ISAS:
        assert decode(payload, len(row), isa) == row


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("elements", [1, 31, 32, 33, 5000, 65536, 65537, 200_001])
def test_every_length_comes_back_on_every_instruction_set(elements, isa):
    row = normal_row(elements) + b"\x01"  # and half an element
    assert decode(encode(row, 2), len(row), isa) == row


@pytest.mark.parametrize("element_bytes", DTYPES)
def test_every_bit_pattern_survives(element_bytes):
    row = np.random.default_rng(1).integers(0, 256, 1 << 17, dtype=np.uint8).tobytes() + b"\x00\xff\x7f\x80" * 1000
    assert decode(encode(row, element_bytes), len(row)) == row


def test_normal_bfloat16_shrinks_by_a_third_and_noise_grows_by_its_directory_only():
    row = normal_row(1 << 18)
    assert len(row) / len(encode(row, 2)) > 1.45
    noise = np.random.default_rng(0).bytes(1 << 18)
    assert len(encode(noise, 2)) == lossless.bound(len(noise), 2)


def test_no_bytes_are_a_header():
    assert decode(encode(b"", 2), 0) == b""
    assert encode(b"", 2) == bytes.fromhex("01020000 00000100 0000000000000000".replace(" ", ""))


LITERAL_ROW = bytes([1, 0, 0, 0] * 90 + [2])
LITERAL = bytes.fromhex(
    # version, element bytes, reserved; elements per segment; raw bytes
    "01010000"
    "00000100"
    "6901000000000000"
    "9b000080"  # mode 2 in the two highest bits, 155 bytes
    "0300"
    "000102"
    "f80bfd030b00"  # three symbols; their names; their frequencies
    # states of the 32 lanes
    "428e120130d51f0030d51f0030d51f00428e120130d51f0030d51f0030d51f00"
    "354cb36148d1170048d1170048d11700d26e440048d1170048d1170048d11700"
    "d26e440048d1170048d1170048d11700d26e440048d1170048d1170048d11700"
    "d26e440048d1170048d1170048d11700d26e440048d1170048d1170048d11700"
    "44bd44bd44bd44bd44bd44bd44bddb6f"  # words
)


def test_the_bytes_are_as_specified():
    assert encode(LITERAL_ROW, 1).hex() == LITERAL.hex()
    assert lossless_numpy.encode(LITERAL_ROW, 1, 1 << 16).hex() == LITERAL.hex()
    for isa in ISAS:
        assert decode(LITERAL, len(LITERAL_ROW), isa) == LITERAL_ROW


def test_plane_that_would_not_save_a_32nd_is_stored_as_it_is():
    row = bytes([5, 5, 5, 6] * 20)
    assert encode(row, 1)[16:] == struct.pack("<I", 80) + row


def test_plane_of_one_byte_is_stored_as_one():
    assert encode(b"\x80\x3f" * 1000, 2)[16:] == struct.pack("<II", 1 << 30 | 1, 1 << 30 | 1) + b"\x00\x7f"


class TestHostile:
    ROW = normal_row(3000) + b"\0"

    def payload(self) -> bytearray:
        return bytearray(encode(self.ROW, 2, 1024))

    def refused(self, payload: bytes, error: type[FrameError]) -> None:
        for isa in ISAS:
            with pytest.raises(error):
                decode(bytes(payload), len(self.ROW), isa)
        with pytest.raises(error):
            lossless_numpy.decode(bytes(payload), len(self.ROW))

    def test_another_version(self):
        payload = self.payload()
        payload[0] = 2
        self.refused(payload, UnsupportedVersion)

    @pytest.mark.parametrize(("at", "value"), [(1, 0), (1, 3), (1, 8), (2, 1), (3, 128), (6, 255)])
    def test_header_with_a_value_nobody_writes(self, at, value):
        payload = self.payload()
        payload[at] = value
        self.refused(payload, BadPayload)

    def test_segment_of_nothing(self):
        payload = self.payload()
        payload[4:8] = bytes(4)
        self.refused(payload, BadPayload)

    @pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 2**64 - 1])
    def test_another_raw_length(self, length):
        payload = self.payload()
        payload[8:16] = struct.pack("<Q", length)
        self.refused(payload, LengthMismatch)

    @pytest.mark.parametrize("length", [0, 15, 16, 39])
    def test_truncated_before_its_bodies(self, length):
        self.refused(self.payload()[:length], TruncatedFrame)

    @pytest.mark.parametrize("change", [-1, 1])
    def test_bodies_of_another_length(self, change):
        payload = self.payload()
        self.refused(payload[:change] if change < 0 else payload + b"x", BadPayload)

    def test_directory_that_shifts_bytes_from_one_plane_to_the_next(self):
        payload = self.payload()
        first, second = struct.unpack_from("<II", payload, 16)
        struct.pack_into("<II", payload, 16, first - 2, second + 2)
        self.refused(payload, BadPayload)

    def test_mode_nobody_writes(self):
        payload = self.payload()
        payload[19] |= 0xC0
        self.refused(payload, BadPayload)

    @pytest.mark.parametrize("symbols", [0, 1, 257, 65535])
    def test_table_of_another_size(self, symbols):
        payload = self.payload()
        struct.pack_into("<H", payload, self.coded_body(payload), symbols)
        self.refused(payload, BadPayload)

    def test_table_that_does_not_sum_to_the_total(self):
        payload = self.payload()
        body = self.coded_body(payload)
        at = body + 2 + struct.unpack_from("<H", payload, body)[0]
        struct.pack_into("<H", payload, at, struct.unpack_from("<H", payload, at)[0] + 1)
        self.refused(payload, BadPayload)

    def test_table_with_a_symbol_twice(self):
        payload = self.payload()
        body = self.coded_body(payload)
        payload[body + 3] = payload[body + 2]
        self.refused(payload, BadPayload)

    def test_flipped_bit_of_a_stream_never_passes_unless_it_changes_the_row(self):
        honest, rng = self.payload(), np.random.default_rng(0)
        body = self.coded_body(honest)
        refused = 0
        for _ in range(200):
            payload = bytearray(honest)
            payload[int(rng.integers(body + 60, body + 400))] ^= 1 << int(rng.integers(0, 8))
            try:
                assert decode(bytes(payload), len(self.ROW)) != self.ROW
            except BadPayload:
                refused += 1
        assert refused == 200  # every lane must end in the state it began from

    def coded_body(self, payload: bytes) -> int:
        """Where the first coded body begins: the exponents of the first segment."""
        raw, coded = struct.unpack_from("<II", payload, 16)
        assert (raw >> 30, coded >> 30) == (0, 2)
        return 16 + 3 * 2 * 4 + raw


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="8 bytes per element"):
        lossless.encode(memoryview(b"x" * 64), 8)
    with pytest.raises(ValueError, match="isa 9"):
        lossless.decode(memoryview(b""), memoryview(bytearray(1)), 9)
    with pytest.raises(ValueError, match="read-only"):
        lossless.decode(memoryview(b""), memoryview(b"x"))
