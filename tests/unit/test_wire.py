"""The frames of `lm://`: bytes as literals in both directions, then what a hostile peer may send."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_ext.wire import lm, v2
from lmcache_ext.wire.names import name_of
from lmcache_ext.wire.stream import Decoder, WireError

LLAMA = "meta-llama/Llama-3.1-8B-Instruct@1@0@1a2b@bfloat16"
KV = lm.Meta(fmt=1, dtype=3, shape=(2, 32, 256, 1024))


def head_of(decoder: Decoder[Any], data: bytes) -> Any:
    decoder.feed(data)
    return decoder.head()


# -- golden vectors of LMCache 0.5.6

OLD_REQUESTS = {
    "01000000 10000000 01000000 03000000 00000000 02000000 20000000 00010000 00040000": lm.Request(
        lm.Command.PUT, LLAMA, 16, KV
    ),
    "02000000 00000000 01000000 02000000 00000000 00000000 00000000 00000000 00000000": lm.Request(
        lm.Command.GET, "m@2@1@-1a2b@half"
    ),
    "03000000 00000000 01000000 02000000 00000000 00000000 00000000 00000000 00000000": lm.Request(
        lm.Command.EXIST, "m@2@1@5@half@user%bob"
    ),
    "04000000 00000000 01000000 02000000 00000000 00000000 00000000 00000000 00000000": lm.Request(
        lm.Command.LIST, "a@b@c@d@e"
    ),
    "05000000 00000000 04000000 06000000 02000000 00000000 00000000 00000000 00000000": lm.Request(
        lm.Command.HEALTH, "not five parts", meta=lm.Meta(fmt=4, dtype=6, shape=(0, 0, 0, 0), location=2)
    ),
}
OLD_REPLIES = {
    "c8000000 10000000 01000000 03000000 02000000 20000000 00010000 00040000 00000000": lm.Reply(200, 16, KV),
    "90010000 00000000 01000000 02000000 00000000 00000000 00000000 00000000 00000000": lm.Reply(400),
    "c8000000 00000000 01000000 02000000 00000000 00000000 00000000 00000000 00000000": lm.Reply(200),
    "c8000000 00000000 01000000 02000000 4b564346 02000000 00000000 00000000 00000000": v2.hello_reply(),
}


@pytest.mark.parametrize(("fields", "request_"), OLD_REQUESTS.items())
def test_old_requests_are_these_bytes(fields: str, request_: lm.Request) -> None:
    data = bytes.fromhex(fields) + request_.name.encode() + b"\x20" * (150 - len(request_.name))
    assert len(data) == lm.REQUEST_BYTES == 186
    assert request_.encode() == data
    decoder = lm.RequestDecoder()
    assert head_of(decoder, data) == request_
    assert decoder.body_left == request_.length


@pytest.mark.parametrize(("fields", "reply"), OLD_REPLIES.items())
def test_old_replies_are_these_bytes(fields: str, reply: lm.Reply) -> None:
    data = bytes.fromhex(fields)
    assert len(data) == lm.REPLY_BYTES == 36
    assert reply.encode() == data
    assert head_of(lm.ReplyDecoder(), data) == reply


def test_the_question_for_version_2_has_five_parts_and_says_which() -> None:
    request = v2.hello_request()
    assert request == lm.Request(lm.Command.HEALTH, "kvcf-wire@2@0@0@uint8")
    assert v2.speaks_v2(v2.hello_reply())
    assert not v2.speaks_v2(lm.Reply(lm.OK))
    assert not v2.speaks_v2(lm.Reply(lm.FAILED, meta=v2.hello_reply().meta))


V2_REQUESTS = {
    "c2 01 0000 01000000 0300000000000000 0000000000000000": v2.Request(v2.Op.HELLO, 1, body_bytes=3),
    "c2 02 0300 2a000000 0001000000000000 0000000000000000 6b6579": v2.Request(v2.Op.PUT, 42, b"key", 256),
    "c2 03 0100 ffffffff 0000000000000000 0000002000000000 00": v2.Request(v2.Op.GET, 2**32 - 1, b"\0", 0, 0x20000000),
    "c2 04 0000 00000000 0500000000000000 0000000000000000": v2.Request(v2.Op.EXISTS, 0, body_bytes=5),
    "c2 05 0000 07000000 0000000000000000 0000000000000000": v2.Request(v2.Op.DELETE, 7),
    "c2 06 0000 08000000 0000000000000000 0000000000000000": v2.Request(v2.Op.STATS, 8),
    "c2 07 0000 09000000 0000000000000000 0000000000000000": v2.Request(v2.Op.PING, 9),
}
V2_REPLIES = {
    "c3 00 0000 2a000000 0001000000000000 0002000000000000": v2.Reply(v2.Status.OK, 42, 256, 512),
    "c3 01 0000 01000000 0000000000000000 0000000000000000": v2.Reply(v2.Status.MISS, 1),
    "c3 05 0000 01000000 0300000000000000 0000000000000000": v2.Reply(v2.Status.FAILED, 1, 3),
}


@pytest.mark.parametrize(("data", "request_"), V2_REQUESTS.items())
def test_requests_of_version_2_are_these_bytes(data: str, request_: v2.Request) -> None:
    assert request_.encode() == bytes.fromhex(data)
    decoder = v2.RequestDecoder()
    assert head_of(decoder, bytes.fromhex(data)) == request_
    assert decoder.body_left == request_.body_bytes


@pytest.mark.parametrize(("data", "reply"), V2_REPLIES.items())
def test_replies_of_version_2_are_these_bytes(data: str, reply: v2.Reply) -> None:
    assert reply.encode() == bytes.fromhex(data)
    assert head_of(v2.ReplyDecoder(), bytes.fromhex(data)) == reply


def test_batches_and_capabilities_are_these_bytes() -> None:
    assert v2.encode_keys([b"ab", b"c"]) == bytes.fromhex("0200 6162 0100 63")
    assert v2.decode_keys(bytes.fromhex("0200 6162 0100 63")) == [b"ab", b"c"]
    assert v2.decode_keys(b"") == []
    can = v2.Capabilities(2**30, 4096, 128)
    assert can.encode() == bytes.fromhex("0000004000000000 00100000 80000000")
    assert v2.Capabilities.decode(can.encode() + b"said by a later version") == can


def test_names_are_hexadecimal_until_they_would_not_fit() -> None:
    assert name_of(b"\x00\xffz") == "kvcf@1@0@00ff7a@uint8"
    assert len(name_of(b"k" * 67)) == 149
    assert name_of(b"k" * 68).startswith("kvch@1@0@")
    for key in (b"", b"k" * 67, b"k" * 68, b"k" * 1024):
        name = name_of(key)
        model, world, worker, digits, dtype = name.split("@")
        assert lm.is_name(name)
        assert (world, worker, dtype) == ("1", "0", "uint8")
        assert model in ("kvcf", "kvch")
        assert digits == "" or int(digits, 16) >= 0


# -- attacks by name


def old_request(command: int = 2, length: int = 0, key: bytes = b"a@b@c@d@e") -> bytes:
    return struct.pack("<9i", command, length, 1, 2, 0, 0, 0, 0, 0) + key.ljust(150)


@pytest.mark.parametrize(
    "data",
    [
        old_request(command=0),
        old_request(command=6),
        old_request(command=-1),
        old_request(command=1, length=-1),
        old_request(command=1, length=-(2**31)),
        old_request(command=2, length=1),
        old_request(command=5, length=2**31 - 1),
        old_request(key=b""),
        old_request(key="schlüssel@1@0@0@half".encode("latin-1")),
        old_request(key=("x" * 149 + "ü").encode()[:150]),
        old_request(key=b"\xff" * 150),
        old_request(key=b"a@b@c@d@e\nf"),
        old_request(key=b"a\0b@b@c@d@e"),
        b"GET / HTTP/1.1\r\n".ljust(186, b"."),
        b"\x16\x03\x01".ljust(186, b"\0"),
    ],
)
def test_old_requests_that_are_none(data: bytes) -> None:
    with pytest.raises(WireError):
        head_of(lm.RequestDecoder(), data)


@pytest.mark.parametrize("code", [0, 201, -200, 2**31 - 1])
def test_old_replies_with_another_code(code: int) -> None:
    with pytest.raises(WireError, match="code"):
        head_of(lm.ReplyDecoder(), struct.pack("<9i", code, *[0] * 8))


@pytest.mark.parametrize(("code", "length"), [(200, -1), (400, 1)])
def test_old_replies_with_a_length_that_cannot_be(code: int, length: int) -> None:
    with pytest.raises(WireError, match="length"):
        head_of(lm.ReplyDecoder(), struct.pack("<9i", code, length, *[0] * 7))


def v2_request(magic: int = 0xC2, op: int = 3, key_bytes: int = 1, body: int = 0) -> bytes:
    return struct.pack("<BBHIQQ", magic, op, key_bytes, 1, body, 0) + b"k" * key_bytes


@pytest.mark.parametrize(
    "data",
    [
        v2_request(magic=0xC3),
        v2_request(op=0),
        v2_request(op=8),
        v2_request(key_bytes=0),
        v2_request(key_bytes=1025),
        v2_request(op=4, key_bytes=1),
        v2_request(op=3, body=1),
        v2_request(op=2, body=2**40 + 1),
        v2_request(op=2, body=2**64 - 1),
        v2_request(op=1, key_bytes=0, body=4097),
        v2_request(op=4, key_bytes=0, body=2**20 + 1),
        v2_request(op=5, key_bytes=0, body=2**63),
        v2_request(op=6, key_bytes=0, body=1),
        v2_request(op=7, key_bytes=0, body=1),
    ],
)
def test_requests_of_version_2_that_are_none(data: bytes) -> None:
    with pytest.raises(WireError):
        head_of(v2.RequestDecoder(), data)


@pytest.mark.parametrize(
    "fields",
    [(0xC2, 0, 0, 1, 0, 0), (0xC3, 6, 0, 1, 0, 0), (0xC3, 0, 1, 1, 0, 0), (0xC3, 0, 0, 1, 2**40 + 1, 0)],
)
def test_replies_of_version_2_that_are_none(fields: Sequence[int]) -> None:
    with pytest.raises(WireError):
        head_of(v2.ReplyDecoder(), struct.pack("<BBHIQQ", *fields))


@pytest.mark.parametrize("body", ["01", "0000", "0200 61", "0100 61 00", "ffff 61", "0104" + "00" * 1025])
def test_batches_that_are_none(body: str) -> None:
    with pytest.raises(WireError):
        v2.decode_keys(bytes.fromhex(body))


def test_a_batch_of_one_key_too_many() -> None:
    keys = [b"k"] * v2.MAX_BATCH_KEYS
    assert v2.decode_keys(v2.encode_keys(keys)) == keys
    with pytest.raises(WireError):
        v2.decode_keys(v2.encode_keys([*keys, b"k"]))


@pytest.mark.parametrize("body", [b"", b"\0" * 15, struct.pack("<QII", 1, 0, 1), struct.pack("<QII", 1, 4097, 1)])
def test_capabilities_that_are_none(body: bytes) -> None:
    with pytest.raises(WireError):
        v2.Capabilities.decode(body)


@pytest.mark.parametrize("name", ["", "x" * 151, "ä" * 76, "a\nb", "a "])
def test_a_name_that_cannot_travel_is_not_sent(name: str) -> None:
    with pytest.raises(ValueError, match="printable UTF-8"):
        lm.Request(lm.Command.GET, name).encode()


@pytest.mark.parametrize("request_", [v2.Request(v2.Op.GET, 1, b"k" * 1025), v2.Request(v2.Op.PUT, 1, b"k", 2**41)])
def test_a_request_beyond_the_limits_is_not_sent(request_: v2.Request) -> None:
    with pytest.raises(ValueError, match="beyond the limits"):
        request_.encode()


def test_a_decoder_that_is_used_wrongly_says_so() -> None:
    decoder = lm.RequestDecoder()
    decoder.feed(lm.Request(lm.Command.PUT, "a@b@c@d@e", 10).encode() + b"12")
    assert decoder.head() is not None
    with pytest.raises(ValueError, match="10 bytes of the last body"):
        decoder.head()
    with pytest.raises(ValueError, match="landed"):
        decoder.landed(1)
    assert decoder.drain(memoryview(bytearray(10))) == 2
    with pytest.raises(ValueError, match="landed"):
        decoder.landed(9)
    decoder.landed(8)
    assert decoder.head() is None


# -- any split, any bytes

keys = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=150)
metas = st.builds(
    lm.Meta,
    fmt=st.integers(-(2**31), 2**31 - 1),
    dtype=st.integers(-(2**31), 2**31 - 1),
    shape=st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 4),
    location=st.integers(-(2**31), 2**31 - 1),
)
old_messages = st.one_of(
    st.builds(
        lambda n, m, body: (lm.Request(lm.Command.PUT, n, len(body), m), body), keys, metas, st.binary(max_size=99)
    ),
    st.builds(
        lambda c, n: (lm.Request(c, n), b""), st.sampled_from([c for c in lm.Command if c != lm.Command.PUT]), keys
    ),
)
ids = st.integers(0, 2**32 - 1)
v2_messages = st.one_of(
    st.builds(
        lambda i, key, body: (v2.Request(v2.Op.PUT, i, key, len(body)), body),
        ids,
        st.binary(min_size=1, max_size=1024),
        st.binary(max_size=99),
    ),
    st.builds(
        lambda i, key, n: (v2.Request(v2.Op.GET, i, key, 0, n), b""), ids, st.binary(min_size=1), st.integers(0, 9)
    ),
    st.builds(
        lambda op, i, body: (v2.Request(op, i, b"", len(body)), body),
        st.sampled_from([v2.Op.HELLO, v2.Op.EXISTS, v2.Op.DELETE]),
        ids,
        st.binary(max_size=99),
    ),
    st.builds(lambda op, i: (v2.Request(op, i), b""), st.sampled_from([v2.Op.STATS, v2.Op.PING]), ids),
)


def decode(decoder: Decoder[Any], pieces: Sequence[bytes]) -> list[tuple[Any, bytes]]:
    """All messages of a stream that comes in these pieces; large rests of bodies land past the decoder."""
    found: list[tuple[Any, bytes]] = []
    head, body = None, b""
    for piece in pieces:
        if head is not None and decoder.body_left >= len(piece) and not decoder.buffered_bytes:
            decoder.landed(len(piece))
            body += piece
        else:
            decoder.feed(piece)
        while True:
            if head is None:
                head = decoder.head()
                if head is None:
                    break
            body += _drain(decoder)
            if decoder.body_left:
                break
            found.append((head, body))
            head, body = None, b""
    return found


def _drain(decoder: Decoder[Any]) -> bytes:
    room = bytearray(decoder.body_left)
    return bytes(room[: decoder.drain(memoryview(room))])


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(at % (len(data) + 1) for at in cuts)})
    return [data[start:end] for start, end in pairwise(edges)]


splits = st.lists(st.integers(0, 10_000), max_size=30)


@given(st.lists(old_messages, max_size=5), splits)
def test_old_requests_come_out_however_they_are_split(
    messages: list[tuple[lm.Request, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(request.encode() + body for request, body in messages)
    assert decode(lm.RequestDecoder(), cut(stream, cuts)) == messages


@given(st.lists(v2_messages, max_size=5), splits)
def test_requests_of_version_2_come_out_however_they_are_split(
    messages: list[tuple[v2.Request, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(request.encode() + body for request, body in messages)
    assert decode(v2.RequestDecoder(), cut(stream, cuts)) == messages


@given(st.lists(st.tuples(metas, st.binary(max_size=99)), max_size=5), splits)
def test_old_replies_come_out_however_they_are_split(messages: list[tuple[lm.Meta, bytes]], cuts: list[int]) -> None:
    expected = [(lm.Reply(200, len(body), meta), body) for meta, body in messages]
    stream = b"".join(reply.encode() + body for reply, body in expected)
    assert decode(lm.ReplyDecoder(), cut(stream, cuts)) == expected


@given(st.sampled_from([lm.RequestDecoder, lm.ReplyDecoder, v2.RequestDecoder, v2.ReplyDecoder]), st.data())
def test_hostile_bytes_are_frames_or_wire_errors_and_nothing_else(
    kind: type[Decoder[Any]], data: st.DataObject
) -> None:
    decoder = kind()
    start = data.draw(st.sampled_from([b"", b"\xc2", b"\xc3", b"\x01\0\0\0", b"\xc8\0\0\0"]))
    decoder.feed(start + data.draw(st.binary(max_size=600)))
    try:
        while decoder.head() is not None:
            decoder.skip()
            if decoder.body_left:
                break
    except WireError:
        return
    assert decoder.buffered_bytes < lm.REQUEST_BYTES + v2.HEAD_BYTES + v2.MAX_KEY_BYTES


@given(st.binary(max_size=300))
def test_hostile_batches_are_keys_or_wire_errors(body: bytes) -> None:
    try:
        found = v2.decode_keys(body)
    except WireError:
        return
    assert v2.encode_keys(found) == body


@given(st.binary(max_size=128), st.binary(max_size=128))
def test_distinct_keys_have_distinct_names(one: bytes, other: bytes) -> None:
    assert (name_of(one) == name_of(other)) == (one == other)
