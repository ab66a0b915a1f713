"""A wire over a pair of sockets: the usual reply by the short way, any other by the long one, however they are cut."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.errors import StoreStalled, StoreUnavailable
from lmcache_ext.stores import resp_wire
from lmcache_ext.stores.pace import Floor
from lmcache_ext.stores.resp import ErrorReply, Reply
from lmcache_ext.stores.resp_parts import MAGIC, PART_BYTES, new_manifest
from lmcache_ext.stores.resp_wire import AHEAD_BYTES, MAX_AHEAD_BYTES, Deadline, PacedDeadline, Wire
from lmcache_ext.stores.sockets import SLACK_S, TimedSocket, is_paced, round_trip_s
from tests.contracts.store_contract import Landing, key_of
from tests.unit.test_redis_faults import opened, played

MIB = 1024**2
COMMANDS = [
    (b"SET", b"k", b"v"),
    (b"GETRANGE", b"k", 0, 47),
    (b"PERSIST", b"k"),
    (b"UNLINK", b"k"),
    (b"SET", b"k", b""),
]
ENCODED: list[tuple[Reply, bytes]] = [
    (b"OK", b"+OK\r\n"),
    (1, b":1\r\n"),
    (0, b":0\r\n"),
    (b"", b"$0\r\n\r\n"),
    (b"+OK\r\n", b"$5\r\n+OK\r\n\r\n"),
    (None, b"$-1\r\n"),
    (ErrorReply("OOM no"), b"-OOM no\r\n"),
]
sizes_of_reads = st.sampled_from([1, 2, 3, 7, 4096])


@contextmanager
def wired(data: bytes, read_bytes: int = 4096) -> Iterator[Wire]:
    """A wire that receives `data` and then the end, so many bytes at a time."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        wire = Wire(ours)
        wire._scratch = memoryview(bytearray(read_bytes))
        yield wire


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(ENCODED), min_size=5, max_size=5), sizes_of_reads)
def test_whatever_is_answered_is_what_is_told(replies: list[tuple[Reply, bytes]], read_bytes: int) -> None:
    with wired(b"".join(data for _, data in replies), read_bytes) as wire:
        assert wire.ask_all(COMMANDS, Deadline(5.0)) == [reply for reply, _ in replies]
        assert wire.is_clean


@pytest.mark.parametrize("read_bytes", [1, 4096])
def test_the_usual_replies_are_told_too(read_bytes: int) -> None:
    commands = [COMMANDS[0], COMMANDS[1], COMMANDS[2], COMMANDS[4]]
    with wired(b"+OK\r\n$0\r\n\r\n:1\r\n+OK\r\n", read_bytes) as wire:
        assert wire.ask_all(commands, Deadline(5.0)) == [b"OK", b"", 1, b"OK"]
        assert wire.is_clean


def test_an_end_among_the_usual_replies_is_unavailable() -> None:
    with wired(b"+OK\r\n$0\r\n") as wire, pytest.raises(StoreUnavailable, match="closed by the other side"):
        wire.ask_all(COMMANDS, Deadline(5.0))


values = st.one_of(st.binary(max_size=9), st.binary(max_size=9).map(lambda data: MAGIC + data), st.just(b"x" * 5000))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.one_of(st.none(), values), st.integers(1, 12)), max_size=5), sizes_of_reads)
def test_a_value_is_taken_if_it_is_as_expected_and_left_whole_if_not(
    pairs: list[tuple[bytes | None, int]], read_bytes: int
) -> None:
    replies = [b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value) for value, _ in pairs]
    deadline = Deadline(5.0)
    with wired(b"".join(replies), read_bytes) as wire:
        wire.send([], len(pairs), deadline)
        for value, room in pairs:
            landing = Landing([room])
            if wire.take(b"$%d\r\n" % room, landing.parts(), deadline, unlike=MAGIC):
                assert value is not None
                assert len(value) == room
                assert not value.startswith(MAGIC)
            else:
                length = wire.length(deadline)
                assert length == (None if value is None else len(value))
                if value is not None:
                    wire.payload(len(value), landing.parts(), deadline)
            landing.assert_guards_untouched()
            assert landing.data() == (value or b"")[:room].ljust(room, b"\0")
        assert wire.is_clean


def test_a_payload_longer_than_told_is_unavailable() -> None:
    landing = Landing([3])
    with wired(b"$3\r\nabcd\r\n") as wire, pytest.raises(StoreUnavailable, match="another length than told"):
        wire.take(b"$3\r\n", landing.parts(), Deadline(5.0))
    landing.assert_guards_untouched()
    assert not wire.goes_on


def test_a_payload_that_stops_in_the_middle_has_stalled() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"$10\r\nabc")
        with pytest.raises(StoreStalled, match=r"8 bytes within 0\.05 s"):
            Wire(ours).take(b"$10\r\n", [memoryview(bytearray(10))], PacedDeadline(5.0, Floor(0.05)))


def test_a_far_server_is_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with wired(b"") as wire:
        assert wire.ahead_bytes() == AHEAD_BYTES, "a Unix socket is near"
        for micros, expected in ((100, AHEAD_BYTES + 400_000), (1000, MAX_AHEAD_BYTES)):
            monkeypatch.setattr(resp_wire, "round_trip_s", lambda _, micros=micros: micros / 1e6)
            assert wire.ahead_bytes() == expected


def test_the_kernel_tells_the_round_trip() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs, _ = listener.accept()
        with theirs:
            for _ in range(5):
                ours.sendall(b"ping")
                theirs.sendall(theirs.recv(4))
                ours.recv(4)
            assert 0 < round_trip_s(ours) < 1


def test_of_a_near_server_little_is_asked_for_ahead() -> None:
    """Three parts, and one more for each that was received."""
    key = key_of("ahead")
    manifest = new_manifest(8 * PART_BYTES)
    asked = []

    def play(sock: socket.socket) -> None:
        commands = sock.makefile("rb")

        def await_gets(count: int) -> None:
            for _ in range(count):
                lines = [commands.readline() for _ in range(5)]
                assert lines[2] == b"GET\r\n"
            asked.append(count)

        await_gets(1)
        sock.sendall(b"$%d\r\n%b" % (48 + PART_BYTES, manifest.encode(key)))
        await_gets(2)
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1, socket.MSG_PEEK)
        sock.settimeout(None)
        sock.sendall(bytes(PART_BYTES) + b"\r\n")
        for part in range(1, 8):
            await_gets(1 if part <= 5 else 0)
            sock.sendall(b"$%d\r\n%b\r\n" % (PART_BYTES, bytes(PART_BYTES)))

    with played(play) as address, opened(f"redis://{address}", request_timeout_s=5.0) as store:
        assert store.get_into(key, [memoryview(bytearray(8 * PART_BYTES))]) == 8 * PART_BYTES
    assert asked == [1, 2, 1, 1, 1, 1, 1, 0, 0]


def put_parts_until_refused(play: Callable[[socket.socket], None]) -> None:
    """Put an object of eight parts to a server that says in the end "that is all"."""
    with (
        played(play) as address,
        opened(f"redis://{address}", request_timeout_s=5.0) as store,
        pytest.raises(StoreUnavailable, match="that is all"),
    ):
        store.put(key_of("ahead"), [memoryview(bytes(8 * PART_BYTES))])


def test_on_a_paced_connection_little_is_sent_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts, and one more for each that was answered."""
    monkeypatch.setattr(resp_wire, "is_paced", lambda _: True)
    sent_ahead = []

    def play(sock: socket.socket) -> None:
        commands = sock.makefile("rb")

        def await_part(number: int) -> None:
            lines = [commands.readline() for _ in range(6)]
            assert lines[2] == b"SET\r\n"
            assert lines[4].endswith(b":%d\r\n" % number)
            assert commands.read(int(lines[5][1:]) + 2).endswith(b"\r\n")
            assert b"".join(commands.readline() for _ in range(4)) == b"$2\r\nEX\r\n$3\r\n600\r\n"

        for part in (1, 2):
            await_part(part)
        for part in range(3, 8):
            sock.settimeout(0.05)
            with pytest.raises(TimeoutError):
                sock.recv(1, socket.MSG_PEEK)
            sock.settimeout(None)
            sent_ahead.append(part)
            sock.sendall(b"+OK\r\n")
            await_part(part)
        sock.sendall(b"-ERR that is all\r\n" * 100)

    put_parts_until_refused(play)
    assert sent_ahead == [3, 4, 5, 6, 7]


def test_where_nothing_paces_more_is_sent_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resp_wire, "is_paced", lambda _: False)

    def play(sock: socket.socket) -> None:
        left = 7 * PART_BYTES
        while left > 0:
            left -= len(sock.recv(65536))
        sock.sendall(b"-ERR that is all\r\n" * 100)

    put_parts_until_refused(play)


def test_the_kernel_tells_what_paces_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        assert not is_paced(ours)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not is_paced(ours), "a Unix socket"


@pytest.mark.parametrize("earlier_s", [5.0, 0.0501, 0.01])
def test_the_kernel_ends_a_call_in_time_whatever_limit_stood_before(earlier_s: float) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        timed, byte = TimedSocket(ours), memoryview(bytearray(1))
        theirs.sendall(b"x")
        assert timed.receive(byte, earlier_s) == 1
        started_at = time.monotonic()
        with pytest.raises(BlockingIOError):
            timed.receive_all([byte], 0.05)
        assert 0.05 - SLACK_S - 0.001 < time.monotonic() - started_at < 1.0


def test_a_server_that_reads_slowly_is_not_waited_for_in_vain() -> None:
    """Commands longer than any socket buffer."""
    ours, theirs = socket.socketpair()
    value = [memoryview(bytes(MIB))]

    def read() -> None:
        for _ in range(3):
            left = MIB + len(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1048576\r\n\r\n")
            while left:
                left -= len(theirs.recv(min(left, 65536)))
            theirs.sendall(b"+OK\r\n")

    with ours, theirs:
        reader = threading.Thread(target=read)
        reader.start()
        assert Wire(ours).ask_all([(b"SET", b"k", value)] * 3, Deadline(10.0)) == [b"OK"] * 3
        reader.join()
