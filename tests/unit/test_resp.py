"""RESP without I/O: its bytes as literals, its stream cut anywhere, its lengths hostile; then names and manifests."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_ext.errors import StoreUnavailable
from lmcache_ext.stores.resp import (
    INCOMPLETE,
    MAX_BULK_BYTES,
    MAX_LINE_BYTES,
    MAX_REPLY_BYTES,
    Decoder,
    ErrorReply,
    Reply,
    encode,
)
from lmcache_ext.stores.resp_parts import Manifest, new_manifest, parse_manifest, redis_key, slot_of
from lmcache_ext.stores.sockets import after, cut

KEY = bytes(range(16)) + b"{a}"

texts = st.binary(max_size=40).filter(lambda text: b"\r\n" not in text and not text.endswith(b"\r"))
replies = st.recursive(
    st.one_of(
        st.none(),
        st.integers(-(2**63), 2**63 - 1),
        st.binary(max_size=60),
        st.text("ABCdef 123", max_size=20).map(ErrorReply),
    ),
    lambda items: st.lists(items, max_size=4),
    max_leaves=8,
)


def encoded(reply: Reply) -> bytes:
    """A server's side, written for this test alone."""
    match reply:
        case None:
            return b"$-1\r\n"
        case ErrorReply(text):
            return b"-" + text.encode() + b"\r\n"
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
    return b"*%d\r\n" % len(reply) + b"".join(map(encoded, reply))


def test_a_command_is_an_array_of_bulk_strings() -> None:
    value = [memoryview(b"ab"), memoryview(b""), memoryview(b"c")]
    buffers = encode((b"SET", b"k", value, b"EX", 600))
    assert b"".join(buffers) == b"*5\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\nabc\r\n$2\r\nEX\r\n$3\r\n600\r\n"
    assert buffers[1] is value[0], "a payload is passed on, not copied"


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"+OK\r\n", b"OK"),
        (b"-OOM command not allowed\r\n", ErrorReply("OOM command not allowed")),
        (b":-1\r\n", -1),
        (b"$0\r\n\r\n", b""),
        (b"$2\r\n\r\n\r\n", b"\r\n"),
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"*2\r\n:1\r\n*1\r\n$1\r\na\r\n", [1, [b"a"]]),
    ],
)
def test_a_reply_by_its_bytes(data: bytes, reply: Reply) -> None:
    decoder = Decoder()
    decoder.feed(data)
    assert decoder.reply() == reply
    assert len(decoder) == 0


@given(st.lists(replies, max_size=5), st.data())
def test_how_the_stream_is_cut_does_not_matter(expected: list[Reply], data: Any) -> None:
    stream = b"".join(map(encoded, expected))
    edges = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder, found = Decoder(), []
    for start, end in zip([0, *edges], [*edges, len(stream)], strict=True):
        decoder.feed(stream[start:end])
        while (reply := decoder.reply()) is not INCOMPLETE:
            found.append(reply)
    assert found == expected
    assert len(decoder) == 0


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_incomplete_or_unavailable(data: bytes) -> None:
    for read in (Decoder.reply, Decoder.bulk_length):
        decoder = Decoder()
        decoder.feed(data)
        try:
            while read(decoder) is not INCOMPLETE:
                decoder.take_into(memoryview(bytearray(1)))
        except StoreUnavailable:
            continue


@given(st.binary(max_size=100), st.integers(0, 100))
def test_a_payload_is_taken_raw(payload: bytes, size: int) -> None:
    decoder = Decoder()
    decoder.feed(encoded(payload) + b":7\r\n")
    assert decoder.bulk_length() == len(payload)
    size = min(size, len(payload))
    assert decoder.peek(size) == payload[:size]
    taken = memoryview(bytearray(len(payload)))
    assert decoder.take_into(taken[:size]) == size
    assert decoder.take_into(taken[size:]) == len(payload) - size
    assert bytes(taken) == payload
    assert decoder.take_into(memoryview(bytearray(2))) == 2
    assert decoder.reply() == 7


@pytest.mark.parametrize("length", [b"-2", b"", b"1.5", b"1e3", b" 1", b"+1", b"0x10", b"9" * 19, b"9" * 20, b"1_0"])
def test_a_hostile_length_is_refused(length: bytes) -> None:
    for kind in (b"$", b"*"):
        decoder = Decoder()
        decoder.feed(kind + length + b"\r\n")
        with pytest.raises(StoreUnavailable):
            decoder.reply()
    decoder = Decoder()
    decoder.feed(b"$" + length + b"\r\n")
    with pytest.raises(StoreUnavailable):
        decoder.bulk_length()


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_come() -> None:
    decoder = Decoder()
    decoder.feed(b"$%d\r\n" % (MAX_REPLY_BYTES + 1))
    with pytest.raises(StoreUnavailable, match=f"length of {MAX_REPLY_BYTES + 1}, expected 0 to {MAX_REPLY_BYTES}"):
        decoder.reply()
    decoder = Decoder()
    decoder.feed(b"$%d\r\n$%d\r\n" % (MAX_BULK_BYTES, MAX_BULK_BYTES + 1))
    assert decoder.bulk_length() == MAX_BULK_BYTES
    with pytest.raises(StoreUnavailable):
        decoder.bulk_length()


@pytest.mark.parametrize("data", [b"+" + b"x" * MAX_LINE_BYTES, b":" + b"1" * MAX_LINE_BYTES, b"x", b"\r\n"])
def test_a_line_without_end_is_refused(data: bytes) -> None:
    decoder = Decoder()
    decoder.feed(data)
    with pytest.raises(StoreUnavailable):
        decoder.reply()


def test_a_reply_without_end_is_refused() -> None:
    decoder = Decoder()
    decoder.feed(b"*262144\r\n")
    for _ in range(4):
        decoder.feed(b":10000\r\n" * 30_000)
        assert decoder.reply() is INCOMPLETE
    decoder.feed(b":10000\r\n" * 30_000)
    with pytest.raises(StoreUnavailable, match="more than"):
        decoder.reply()


def test_a_payload_that_does_not_end_where_it_should_is_refused() -> None:
    decoder = Decoder()
    decoder.feed(b"$1\r\nabc\r\n")
    with pytest.raises(StoreUnavailable, match="another length than told"):
        decoder.reply()


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_cutting_views_is_slicing_their_concatenation(pieces: list[bytes], start: int, length: int) -> None:
    whole = b"".join(pieces)
    found = cut([memoryview(piece) for piece in pieces], start, length)
    assert b"".join(found) == whole[start : start + length]
    assert all(view.nbytes for view in found)
    assert b"".join(after(found, start)) == whole[start : start + length][start:]


def test_the_name_of_an_object_is_readable() -> None:
    assert redis_key(KEY) == b"kv:000102030405060708090a0b0c0d0e0f:7b617d"


def test_an_object_and_its_parts_share_a_slot() -> None:
    parts = Manifest(b"g" * 16, 2500, 1000).part_keys(KEY)
    assert parts[1] == b"{kv:000102030405060708090a0b0c0d0e0f:7b617d}:" + b"67" * 16 + b":2"
    assert len(parts) == 2, "the first is with the manifest"
    assert slot_of(KEY) == 1358  # as CLUSTER KEYSLOT says


def test_a_manifest_by_its_bytes() -> None:
    manifest = Manifest(b"g" * 16, 9 * 1024**2, 4 * 1024**2)
    data = manifest.encode(KEY)
    assert data[:40] == (
        b"KVCP\x02\x00\x03\x00" + b"g" * 16 + b"\x00\x00\x90\x00\x00\x00\x00\x00" + b"\x00\x00\x40\x00\x00\x00\x00\x00"
    )
    assert len(data) == 48
    assert parse_manifest(data, KEY) == manifest
    assert parse_manifest(data + b"the first part", KEY) == manifest
    assert parse_manifest(data, KEY + b"x") is None
    assert parse_manifest(data[:-1], KEY) is None


@given(st.integers(0, 47), st.integers(1, 255))
def test_a_manifest_with_any_byte_changed_is_none(at: int, flip: int) -> None:
    data = bytearray(new_manifest(10_000_000).encode(KEY))
    data[at] ^= flip
    assert parse_manifest(bytes(data), KEY) is None


def test_a_frame_before_a_row_makes_no_part_of_its_own() -> None:
    assert [new_manifest(size * 1024**2 + 64).num_parts for size in (1, 2, 4, 32)] == [4, 8, 16, 128]
    assert new_manifest(2 * 1024**2 + 64).part_bytes == 256 * 1024 + 8


@given(st.integers(1, 2**50), st.integers(1, 2**31))
def test_parts_add_up(num_bytes: int, part_bytes: int) -> None:
    manifest = new_manifest(num_bytes, part_bytes)
    last = manifest.num_parts - 1
    assert last < 2**16 - 1
    assert last == 0 or manifest.part_bytes * 2 > part_bytes
    assert last * manifest.part_bytes + manifest.length_of(last) == num_bytes
    assert parse_manifest(manifest.encode(KEY), KEY) == manifest
