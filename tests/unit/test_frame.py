"""The frame: literal bytes in both directions, then every attack by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext import errors, frame
from lmcache_ext.stores import base

NAMESPACE = bytes(range(16))
KEY = NAMESPACE + b"chunk-0"
PAYLOAD = b"the KV of one chunk"
HEADER = bytes.fromhex(
    "4b564346"  # magic
    "0100"  # version
    "03"  # serde tag
    "00"  # flags
    "000102030405060708090a0b0c0d0e0f"  # namespace
    "527219458dae24d7"  # XXH3-64 of the key
    "0010000000000000"  # raw length
    "1300000000000000"  # stored length
    "45f48b4afc666667ab89d54cf2071f10"  # checksum
)


def encode(payload: bytes = PAYLOAD, *, namespace: bytes = NAMESPACE, key: bytes = KEY) -> bytes:
    """A whole object: header and payload."""
    header = frame.encode(
        namespace=namespace, key=key, serde_tag=3, raw_length=4096, payload_parts=[memoryview(payload)]
    )
    return header + payload


def check(
    data: bytes, *, namespace: bytes = NAMESPACE, key: bytes = KEY, room: int | None = None, raw: int | None = None
) -> None:
    """Read `data` as a store would hand it over: header and payload in separate buffers."""
    header = frame.parse(data[: frame.FRAME_BYTES])
    payload = data[frame.FRAME_BYTES :]
    buffer = bytearray(len(payload) if room is None else room)
    buffer[: len(payload)] = payload[: len(buffer)]
    frame.verify(
        header,
        namespace=namespace,
        key=key,
        payload_parts=[memoryview(buffer)],
        object_length=len(data),
        raw_length=raw,
    )


def split(data: bytes, cuts: Sequence[int]) -> list[memoryview]:
    edges = [0, *sorted(cuts), len(data)]
    return [memoryview(data)[a:b] for a, b in pairwise(edges)]


def test_encode_writes_the_literal_bytes() -> None:
    assert encode() == HEADER + PAYLOAD


def test_parse_reads_the_literal_bytes() -> None:
    assert frame.parse(memoryview(HEADER)) == frame.Header(
        version=1,
        serde_tag=3,
        namespace=NAMESPACE,
        key_digest=HEADER[24:32],
        raw_length=4096,
        stored_length=19,
        checksum=HEADER[48:],
    )
    check(HEADER + PAYLOAD, raw=4096)


def test_the_namespace_is_as_long_as_the_stores_say() -> None:
    assert frame.NAMESPACE_BYTES == base.NAMESPACE_BYTES


def test_an_empty_payload_is_a_frame() -> None:
    check(encode(b""))


def test_a_buffer_larger_than_the_payload_is_judged_by_the_payload_alone() -> None:
    check(encode(), room=4096)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.lists(st.integers(0, 300), max_size=5))
def test_the_cut_into_parts_does_not_matter(payload: bytes, cuts: list[int], other_cuts: list[int]) -> None:
    parts = split(payload, [min(cut, len(payload)) for cut in cuts])
    data = frame.encode(namespace=NAMESPACE, key=KEY, serde_tag=0, raw_length=1, payload_parts=parts)
    frame.verify(
        frame.parse(data),
        namespace=NAMESPACE,
        key=KEY,
        payload_parts=split(payload, [min(cut, len(payload)) for cut in other_cuts]),
        object_length=frame.FRAME_BYTES + len(payload),
    )


def test_parts_may_be_views_of_signed_bytes() -> None:
    signed = memoryview(bytearray(PAYLOAD + b"tail")).cast("b")
    frame.verify(
        frame.parse(HEADER), namespace=NAMESPACE, key=KEY, payload_parts=[signed], object_length=64 + len(PAYLOAD)
    )


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_every_byte_is_found(bit: int) -> None:
    good = encode()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << bit
        with pytest.raises(errors.FrameError):
            check(bytes(bad), raw=4096)


def test_every_byte_inverted_is_found_without_knowing_the_row_length() -> None:
    good = encode()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0xFF
        with pytest.raises(errors.FrameError):
            check(bytes(bad))


def test_truncation_at_every_length() -> None:
    good = encode()
    for length in range(len(good)):
        with pytest.raises(errors.TruncatedFrame, match=rf"\b{length}\b"):
            check(good[:length])


def test_bytes_after_the_end() -> None:
    with pytest.raises(errors.OversizedFrame, match=r"84 bytes.*says 83"):
        check(encode() + b"x")


def test_length_beyond_limit() -> None:
    bad = bytearray(encode())
    bad[40:48] = b"\xff" * 8
    with pytest.raises(errors.TruncatedFrame, match="18446744073709551679"):
        check(bytes(bad))


def test_payload_larger_than_the_row() -> None:
    with pytest.raises(errors.OversizedFrame, match=r"19 bytes.*hold 18"):
        check(encode(), room=18)


def test_row_of_another_length() -> None:
    with pytest.raises(errors.LengthMismatch, match=r"4096 bytes.*has 8192"):
        check(encode(), raw=8192)


def test_namespace_of_another_model() -> None:
    other = bytes(16)
    with pytest.raises(errors.ForeignNamespace, match=other.hex()):
        check(encode(namespace=other))


def test_two_files_swapped() -> None:
    with pytest.raises(errors.ForeignKey):
        check(encode(key=NAMESPACE + b"chunk-1"))


def test_header_of_one_object_before_the_payload_of_another() -> None:
    with pytest.raises(errors.ChecksumMismatch):
        check(encode()[:64] + b"THE KV OF ONE CHUNK")


def test_key_whose_digest_collides_is_still_told_apart() -> None:
    """The checksum covers the key itself: forge the digest and it does not agree."""
    bad = bytearray(encode(key=NAMESPACE + b"chunk-1"))
    bad[24:32] = frame.key_digest(KEY)
    with pytest.raises(errors.ChecksumMismatch):
        check(bytes(bad))


def test_not_a_frame_at_all() -> None:
    with pytest.raises(errors.BadMagic, match=r"read magic b'\\x00.*expected b'KVCF'"):
        check(bytes(4096))


def test_frame_of_a_later_version() -> None:
    with pytest.raises(errors.UnsupportedVersion, match=r"version 2 .*expected 1"):
        frame.parse(HEADER[:4] + b"\x02\x00" + HEADER[6:])


def test_flags_are_promises_we_do_not_know() -> None:
    with pytest.raises(errors.UnsupportedVersion, match="flags 0x80"):
        frame.parse(HEADER[:7] + b"\x80" + HEADER[8:])


def test_lies_are_told_in_order() -> None:
    """An object with everything wrong is of another model first."""
    bad = encode(namespace=bytes(16), key=b"?")[:-1]
    with pytest.raises(errors.ForeignNamespace):
        check(bad)
    with pytest.raises(errors.ForeignKey):
        check(bad, namespace=bytes(16))
    with pytest.raises(errors.TruncatedFrame):
        check(bad, namespace=bytes(16), key=b"?")


@pytest.mark.parametrize(("namespace", "tag", "raw"), [(b"short", 0, 1), (NAMESPACE, 256, 1), (NAMESPACE, 0, 2**64)])
def test_a_field_that_does_not_fit_is_refused(namespace: bytes, tag: int, raw: int) -> None:
    with pytest.raises(ValueError, match=r"expected 16|does not fit"):
        frame.encode(namespace=namespace, key=KEY, serde_tag=tag, raw_length=raw, payload_parts=[])


def test_reads_random_bytes_without_ever_believing_them() -> None:
    for _ in range(200):
        with pytest.raises(errors.FrameError):
            check(b"KVCF\x01\x00" + os.urandom(100))


def test_frame_and_stores_import_without_torch_and_vllm() -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['vllm'] = None\n"
        "import lmcache_ext.frame, lmcache_ext.stores.disk, lmcache_ext.stores.guard\n"
        "import lmcache_ext.stores.jobs, lmcache_ext.stores.registry\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
