"""A blocking socket with one deadline for a whole exchange: exact reads into, vectored writes from, the caller's parts.

Whatever goes wrong is StoreTimeout or StoreUnavailable, and the socket is of no use afterwards.
"""

from __future__ import annotations

import errno
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from lmcache_ext.errors import StoreStalled, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.pace import Pace
from lmcache_ext.stores.sockets import AGAIN, after, bytes_of, cut, timed

SCRATCH_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Line:
    """One connected socket. One thread at a time."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self._sock = sock
        self._timed = timed(sock)
        self._address = address
        self._deadline = 0.0
        self._timeout_s = 0.0
        self._pace: Pace | None = None

    @classmethod
    def connect(cls, address: Address, tls: ssl.SSLContext | None, timeout_s: float) -> Line:
        """Connect, and shake hands where `tls` is given. Name resolution has the resolver's own time limit."""
        deadline = time.monotonic() + timeout_s
        with _errors(address, "connect", timeout_s):
            sock = socket.create_connection((address.host, address.port), timeout_s)
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if tls is not None:
                    sock.settimeout(max(deadline - time.monotonic(), 0.001))
                    sock = tls.wrap_socket(sock, server_hostname=address.host)
            except BaseException:
                sock.close()
                raise
        return cls(sock, address)

    def begin(self, timeout_s: float, pace: Pace | None = None) -> None:
        """From now on, everything until the next `begin` ends within so many seconds, and answers come at that pace."""
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._pace = pace

    def begin_answer(self) -> None:
        """A reply is due from now on."""
        if self._pace is not None:
            self._pace.begin()

    def is_quiet(self) -> bool:
        """Whether nothing came while it lay idle: neither stray bytes nor the end of the stream."""
        return self._timed.is_quiet()

    def acknowledge_at_once(self) -> None:
        """Acknowledge now what has come, for an end that holds the rest back until then (Nagle; our delay is 40 ms)."""
        with suppress(OSError):  # a hint only
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def send(self, parts: Sequence[memoryview]) -> None:
        """Send the concatenation of `parts`."""
        left = list(map(bytes_of, parts))
        with _errors(self._address, "send", self._timeout_s):
            while left:
                left = after(left, self._timed.send(left, self._left_s()))

    def read(self, num_bytes: int) -> bytes:
        """Exactly so many bytes; for heads and small bodies."""
        data = bytearray(num_bytes)
        self.read_into([memoryview(data)], num_bytes)
        return bytes(data)

    def read_into(self, parts: Sequence[memoryview], num_bytes: int) -> None:
        """Exactly `num_bytes` into `parts`, in order; they have room for them."""
        left = cut(list(map(bytes_of, parts)), 0, num_bytes)
        with _errors(self._address, "read", self._timeout_s):
            while left:
                came = self._receive_in_time(left)
                if came == 0:
                    num_left = sum(map(len, left))
                    raise ConnectionResetError(errno.ECONNRESET, f"closed with {num_left} bytes still to come")
                left = after(left, came)

    def skip(self, num_bytes: int) -> None:
        """Read so many bytes and forget them."""
        scratch = memoryview(bytearray(min(num_bytes, SCRATCH_BYTES)))
        while num_bytes:
            step = min(num_bytes, SCRATCH_BYTES)
            self.read_into([scratch], step)
            num_bytes -= step

    def close(self) -> None:
        with suppress(OSError):
            self._sock.close()

    def _receive_in_time(self, left: Sequence[memoryview]) -> int:
        """Some of what is left; 0 is the end. Raises StoreStalled, StoreTimeout, OSError."""
        if self._pace is None:
            return self._timed.receive_all(left, self._left_s())
        try:
            came = self._timed.receive_all(left, min(self._left_s(), self._pace.wait_s()))
            if 0 < came < sum(map(len, left)):
                self._pace.came(came)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            if time.monotonic() >= self._deadline:
                raise
            raise StoreStalled(f"{self._address}: {self._pace.stalled()}") from None
        return came

    def _left_s(self) -> float:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


@contextmanager
def _errors(address: Address, doing: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise StoreTimeout(f"{address}: {doing}: not done after {timeout_s:.3f} s") from error
    except OSError as error:  # ssl.SSLError and socket.gaierror are among them
        if error.errno in AGAIN:
            raise StoreTimeout(f"{address}: {doing}: not done after {timeout_s:.3f} s") from error
        raise StoreUnavailable(f"{address}: {doing}: {error}") from error
