"""One connection that speaks RESP: bounded by deadlines, payloads straight into and out of the caller's memory."""

from __future__ import annotations

import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from lmcache_ext.errors import StoreError, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.pace import Floor, Pace
from lmcache_ext.stores.resp import Argument, Decoder, ErrorReply, Incomplete, Reply, check_end, encode
from lmcache_ext.stores.sockets import AGAIN, after, cut, is_paced, round_trip_s, timed

RECEIVE_BYTES = 4 * 1024
"""Asked for where the length of what comes is unknown; so much of a payload at most is copied."""

MAX_DRAIN_BYTES = 1024**2
"""Of a payload that nobody wants: beyond it a new connection is cheaper."""

AHEAD_BYTES = 640 * 1024
"""Asked for and not received yet, of a server next door, and sent and not answered where the connection is paced: two
or three parts of an object. More than its congestion window (14 to 18 segments of 64 KiB over loopback) makes BBR pace
the connection from then on, which halves the speed (benchmarks/RESULTS.md)."""

SEND_AHEAD_BYTES = 2 * 1024**2
"""Sent and not answered where nothing paces: puts of 4 x 4 MiB to Redis are 5.1 to 5.6 GB/s with 1 to 2 MiB, 4.4 with
AHEAD_BYTES."""

MAX_AHEAD_BYTES = 4 * 1024**2
"""The same, of a server far away."""

LINK_BYTES_PER_S = 4e9
"""A server farther away is asked for so much more that a link so fast is not idle for a round trip."""

MIN_AHEAD = 2
"""Values asked for ahead, however large, or the server waits for the client after each."""

MAX_AHEAD = 128
"""Values asked for ahead, however small; the server keeps the answers in its memory."""

JOINED_BYTES = 256 * 1024
"""So many bytes of small commands travel in one system call; a part of an object has one of its own."""


_USUAL: dict[Argument, tuple[bytes, Reply]] = {
    b"SET": (b"+OK\r\n", b"OK"),
    b"PERSIST": (b":1\r\n", 1),
    b"PEXPIRE": (b":1\r\n", 1),
    b"EXPIRE": (b":1\r\n", 1),
    b"GETRANGE": (b"$0\r\n\r\n", b""),
}
"""How commands are answered where all is well, and nothing was there before."""


class Deadline:
    """When a call must be over."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._end = clock() + timeout_s

    def left_s(self) -> float:
        """Seconds until then, more than zero. Raises StoreTimeout."""
        left_s = self._end - self._clock()
        if left_s <= 0:
            raise StoreTimeout(f"not done within {self.timeout_s:g} s")
        return left_s

    def within(self, timeout_s: float) -> Deadline:
        """A deadline that is at most `timeout_s` away, and not after this one."""
        return Deadline(min(timeout_s, self.left_s()), self._clock)

    def begin_answer(self) -> None:
        """A reply is due from now on."""

    def wait_s(self) -> float:
        """For how long to wait for bytes: `left_s`."""
        return self.left_s()

    def came(self, num_bytes: int) -> None:
        """So many bytes of a reply have been received."""

    def missed(self) -> StoreTimeout:
        """What a wait in vain was."""
        return StoreTimeout(f"no answer within {self.timeout_s:.3g} s")


class PacedDeadline(Deadline):
    """A deadline before which the other side must keep sending, too."""

    def __init__(self, timeout_s: float, floor: Floor, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(timeout_s, clock)
        self._pace = Pace(floor, clock)

    def begin_answer(self) -> None:
        self._pace.begin()

    def wait_s(self) -> float:
        return min(self.left_s(), self._pace.wait_s())

    def came(self, num_bytes: int) -> None:
        self._pace.came(num_bytes)

    def missed(self) -> StoreTimeout:
        return self._pace.stalled() if self._clock() < self._end else super().missed()


class Wire:
    """One connection.

    Threads:  one at a time.
    Order:    replies come in the order of the commands.
    Owner:    the socket; `owner`, a client library's connection, would close it when collected.
    Failure:  StoreTimeout or StoreUnavailable; afterwards `is_clean` is false and the connection is to be closed.
    """

    def __init__(self, sock: socket.socket, owner: object = None, label: str = "server") -> None:
        self.label = label
        self._socket = sock
        self._timed = timed(sock)
        self._owner = owner
        self._decoder = Decoder()
        self._scratch = memoryview(bytearray(RECEIVE_BYTES))
        self._end = memoryview(bytearray(2))
        self._num_expected = 0
        self._in_doubt = False
        self._is_stuck = False

    @property
    def goes_on(self) -> bool:
        """Whether the next reply can be read: neither failed, nor stuck before a payload that nobody wants."""
        return not (self._in_doubt or self._is_stuck)

    @property
    def is_clean(self) -> bool:
        """Whether every reply was read, to its end, and nothing else came."""
        return self.goes_on and not self._num_expected and not len(self._decoder)

    def is_alive(self) -> bool:
        """Whether an idle connection can be used: the other side neither closed it nor sent anything."""
        return self._timed.is_quiet()

    def send(self, buffers: Sequence[bytes | memoryview], num_replies: int, deadline: Deadline) -> None:
        """Send everything; `num_replies` are expected then."""
        self._num_expected += num_replies
        left = buffers
        try:
            while left:
                left = after(left, self._timed.send(left, deadline.left_s()))
        except (OSError, StoreError) as error:
            raise self._failure(error, deadline) from error

    def reply(self, deadline: Deadline) -> Reply:
        """The next reply, whole."""
        deadline.begin_answer()
        try:
            while isinstance(reply := self._decoder.reply(), Incomplete):
                self._feed(deadline)
        except (OSError, StoreError) as error:
            raise self._failure(error, deadline) from error
        self._num_expected -= 1
        return reply

    def ask_all(self, commands: Iterable[Sequence[Argument]], deadline: Deadline) -> list[Reply]:
        """The replies, in order. Commands are sent ahead as long as few enough of their bytes are not answered."""
        replies: list[Reply] = []
        under_way: deque[tuple[list[Argument], int]] = deque()
        ahead_bytes = 0
        most_bytes = self.ahead_bytes(AHEAD_BYTES if is_paced(self._socket) else SEND_AHEAD_BYTES)
        for buffers, names, num_bytes in _joined(commands):
            while under_way and ahead_bytes + num_bytes > most_bytes:
                answered, answered_bytes = under_way.popleft()
                replies += self._replies(answered, deadline)
                ahead_bytes -= answered_bytes
            self.send(buffers, len(names), deadline)
            under_way.append((names, num_bytes))
            ahead_bytes += num_bytes
        for names, _ in under_way:
            replies += self._replies(names, deadline)
        return replies

    def _replies(self, names: Sequence[Argument], deadline: Deadline) -> list[Reply]:
        """The replies to these commands. Where all are the usual ones they are compared, not parsed."""
        usual = [_USUAL[name] for name in names if name in _USUAL]
        if len(usual) == len(names) and self._are(b"".join([encoded for encoded, _ in usual]), deadline):
            self._num_expected -= len(names)
            return [reply for _, reply in usual]
        return [self.reply(deadline) for _ in names]

    def _are(self, usual: bytes, deadline: Deadline) -> bool:
        """Use up the usual replies, if these are what comes."""
        try:
            found = self._begins(usual, b"", deadline)
            while not found and self._decoder.may_become(usual):
                self._feed(deadline)
                found = self._decoder.skip(usual)
        except (OSError, StoreError) as error:
            raise self._failure(error, deadline) from error
        return found

    def ahead_bytes(self, near_bytes: int = AHEAD_BYTES) -> int:
        """How much to ask for or send ahead: so much of a server next door, more of one far away."""
        return min(MAX_AHEAD_BYTES, near_bytes + int(round_trip_s(self._socket) * LINK_BYTES_PER_S))

    def take(self, expected: bytes, views: Sequence[memoryview], deadline: Deadline, *, unlike: bytes = b"") -> bool:
        """Receive the next payload into `views` if its reply begins as `expected`, which tells its length, all of it.

        Else, or where the payload begins like `unlike`, nothing is used and the reply is to be read by `length` and
        `payload`, which know of all cases; this is the way of the usual one.
        """
        deadline.begin_answer()
        try:
            if not self._begins(expected, unlike, deadline):
                return False
            self._fill([*views, self._end], deadline)
            check_end(self._end)
        except (OSError, StoreError) as error:
            raise self._failure(error, deadline) from error
        self._num_expected -= 1
        return True

    def length(self, deadline: Deadline) -> int | ErrorReply | None:
        """The length of the payload that comes next, to be read by `payload`; None or an error where none comes."""
        deadline.begin_answer()
        try:
            while isinstance(length := self._decoder.bulk_length(), Incomplete):
                self._feed(deadline)
        except (OSError, StoreError) as error:
            raise self._failure(error, deadline) from error
        if not isinstance(length, int):
            self._num_expected -= 1
        return length

    def peek(self, size: int, deadline: Deadline) -> bytes:
        """The first `size` bytes of the payload that comes next, which is left to `payload`."""
        try:
            while len(self._decoder) < size:
                self._feed(deadline)
        except (OSError, StoreError) as error:
            raise self._failure(error, deadline) from error
        return self._decoder.peek(size)

    def payload(self, length: int, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Scatter a payload of `length` bytes; what does not fit is drained, or the connection gets stuck before it."""
        views = cut(views, 0, length)
        excess = length - sum(map(len, views))
        self._is_stuck = excess > MAX_DRAIN_BYTES
        rest = memoryview(bytearray(0 if self._is_stuck else excess + 2))
        try:
            self._fill([*views, rest], deadline)
            if self._is_stuck:
                return
            check_end(rest[excess:])
        except (OSError, StoreError) as error:
            raise self._failure(error, deadline) from error
        self._num_expected -= 1

    def close(self) -> None:
        """May be called twice."""
        self._in_doubt = True
        with suppress(OSError):
            self._socket.close()

    def _begins(self, expected: bytes, unlike: bytes, deadline: Deadline) -> bool:
        """Use up `expected`, if that is what comes next and what follows is not, or might yet be, `unlike`."""
        if not self._decoder:
            begin = self._scratch[: len(expected) + len(unlike)]
            size = _received(self._timed.receive(begin, deadline.wait_s()))
            deadline.came(size)
            if size == len(expected) and begin == expected:
                return True
            self._decoder.feed(begin[:size])
        return self._decoder.skip(expected, unlike)

    def _fill(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        """First what was received already, then from the socket."""
        left = views
        while self._decoder and left:
            left = after(left, self._decoder.take_into(left[0]))
        while left:
            size = self._timed.receive_all(left, deadline.wait_s())
            left = after(left, size)
            if left:
                deadline.came(_received(size))

    def _feed(self, deadline: Deadline) -> None:
        size = _received(self._timed.receive(self._scratch, deadline.wait_s()))
        self._decoder.feed(self._scratch[:size])
        deadline.came(size)

    def _failure(self, error: OSError | StoreError, deadline: Deadline) -> StoreError:
        """Any failure as a StoreError that names the server; the connection is in doubt from now on."""
        self._in_doubt = True
        is_late = isinstance(error, TimeoutError | ssl.SSLWantReadError | ssl.SSLWantWriteError)
        if is_late or (isinstance(error, OSError) and error.errno in AGAIN):
            error = deadline.missed()
        if isinstance(error, StoreTimeout):
            return type(error)(f"{self.label}: {error}")
        if isinstance(error, OSError):
            return StoreUnavailable(f"{self.label}: connection lost: {error}")
        return StoreUnavailable(f"{self.label}: {error}")


def _joined(commands: Iterable[Sequence[Argument]]) -> Iterator[tuple[list[bytes | memoryview], list[Argument], int]]:
    """Buffers to send at once, the names of the commands they are, and how many bytes."""
    buffers: list[bytes | memoryview] = []
    names: list[Argument] = []
    num_bytes = 0
    for command in commands:
        encoded = encode(command)
        buffers += encoded
        names.append(command[0])
        num_bytes += sum(map(len, encoded))
        if num_bytes >= JOINED_BYTES:
            yield buffers, names, num_bytes
            buffers, names, num_bytes = [], [], 0
    if buffers:
        yield buffers, names, num_bytes


def _received(size: int) -> int:
    if not size:
        raise StoreUnavailable("connection closed by the other side")
    return size
