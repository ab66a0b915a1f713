"""What every blocking byte path needs: views cut and counted off, and the kernel's own time limits.

A plain socket blocks in the kernel with SO_RCVTIMEO and SO_SNDTIMEO set to what is left of the deadline; Linux counts
these over a whole MSG_WAITALL receive, so one system call fills a part and a peer that trickles gains nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl
import struct
from collections.abc import Sequence
from typing import TypeVar, cast

Buffer = TypeVar("Buffer", bound=bytes | memoryview)
"""Of bytes: the length of a view is its number of bytes (`bytes_of`)."""

IOV_MAX = 1024
"""Linux UIO_MAXIOV: more buffers in one call are EMSGSIZE."""

SLACK_S = 0.001
"""How much too late, or too early, a call may end."""

_MIN_RTT = struct.Struct("@148xI")  # tcpi_min_rtt of Linux' struct tcp_info, microseconds
_NEVER_SEEN = 2**32 - 1

AGAIN = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINPROGRESS})
"""What a call says that the kernel ended for its time."""


def is_loopback(sock: socket.socket) -> bool:
    """Whether a bound socket is reachable from this machine alone."""
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


class TimedSocket:
    """A plain socket whose calls the kernel ends in time.

    A limit is set anew only where the one that stands is off by SLACK_S, for setting it is a system call too.

    Threads:  one at a time.
    Owner:    of the socket's time limits, Python's and the kernel's; not of the socket.
    Failure:  OSError, with an errno of AGAIN where the time was over.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._send_limit_s = self._receive_limit_s = -1.0
        sock.settimeout(None)

    def send(self, buffers: Sequence[bytes | memoryview], left_s: float) -> int:
        """Send as much as goes within so many seconds."""
        if abs(left_s - self._send_limit_s) > SLACK_S:
            _limit(self._socket, socket.SO_SNDTIMEO, left_s)
            self._send_limit_s = left_s
        return self._socket.sendmsg(buffers[:IOV_MAX])

    def receive(self, view: memoryview, left_s: float) -> int:
        """Receive what there is; 0 is the end."""
        if abs(left_s - self._receive_limit_s) > SLACK_S:
            self._limit_receive(left_s)
        return self._socket.recv_into(view)

    def receive_all(self, views: Sequence[memoryview], left_s: float) -> int:
        """Fill all views, in one call where nothing interrupts it; how many bytes came."""
        if abs(left_s - self._receive_limit_s) > SLACK_S:
            self._limit_receive(left_s)
        return self._socket.recvmsg_into(views[:IOV_MAX], 0, socket.MSG_WAITALL)[0]

    def is_quiet(self) -> bool:
        """Whether nothing came while it lay idle: neither stray bytes nor the end of the stream."""
        try:
            self._socket.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _limit_receive(self, left_s: float) -> None:
        _limit(self._socket, socket.SO_RCVTIMEO, left_s)
        self._receive_limit_s = left_s


class TimedTlsSocket(TimedSocket):
    """The same over TLS, which knows neither vectors nor MSG_WAITALL, and whose time Python keeps.

    Failure:  OSError, a TimeoutError or of the two SSLWant kinds where the time was over.
    """

    def send(self, buffers: Sequence[bytes | memoryview], left_s: float) -> int:
        self._socket.settimeout(left_s)
        return self._socket.send(buffers[0])

    def receive(self, view: memoryview, left_s: float) -> int:
        self._socket.settimeout(left_s)
        return self._socket.recv_into(view)

    def receive_all(self, views: Sequence[memoryview], left_s: float) -> int:
        return self.receive(views[0], left_s)

    def is_quiet(self) -> bool:
        try:
            self._socket.settimeout(0.0)
            self._socket.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False


def timed(sock: socket.socket) -> TimedSocket:
    """The one for this kind of socket."""
    return TimedTlsSocket(sock) if isinstance(sock, ssl.SSLSocket) else TimedSocket(sock)


def bytes_of(buffer: bytes | memoryview) -> memoryview:
    """The buffer as a view of unsigned bytes."""
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def cut(views: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """The bytes [start, start + length) of the concatenation of `views`, as far as it goes; none is empty."""
    found = []
    for view in views:
        size = len(view)
        if start >= size:
            start -= size
            continue
        piece = view[start : start + length]
        if not piece:
            break
        found.append(piece)
        length -= len(piece)
        start = 0
    return found


def after(buffers: Sequence[Buffer], size: int) -> list[Buffer]:
    """What is left of `buffers` when `size` bytes are done."""
    for at, buffer in enumerate(buffers):
        if size < len(buffer):
            return [cast(Buffer, buffer[size:]), *buffers[at + 1 :]]
        size -= len(buffer)
    return []


def is_paced(sock: socket.socket) -> bool:
    """Whether a TCP connection sends no faster than its congestion control (BBR) believes the link to be."""
    try:
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    except OSError:  # not TCP
        return False
    return name.startswith(b"bbr")


def round_trip_s(sock: socket.socket) -> float:
    """The shortest round trip that the kernel has seen on a TCP connection; 0 where it has seen none."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
    except OSError:  # not TCP
        return 0.0
    micros: int = _MIN_RTT.unpack(info)[0] if len(info) == _MIN_RTT.size else _NEVER_SEEN
    return 0.0 if micros == _NEVER_SEEN else micros / 1e6


def _limit(sock: socket.socket, option: int, left_s: float) -> None:
    """The kernel's timeout for one call; at least a microsecond, for zero would be none."""
    micros = int(left_s * 1e6) + 1
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", micros // 10**6, micros % 10**6))
