"""What every blocking byte path needs: views cut and counted off, and the kernel's own time limits.

A plain socket blocks in the kernel with SO_RCVTIMEO and SO_SNDTIMEO set to what is left of the deadline; Linux counts
these over a whole MSG_WAITALL receive, so one system call fills a part and a peer that trickles gains nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Sequence

IOV_MAX = 1024
"""Linux UIO_MAXIOV: more buffers in one call are EMSGSIZE."""

_MIN_RTT = struct.Struct("@148xI")  # tcpi_min_rtt of Linux' struct tcp_info, microseconds
_NEVER_SEEN = 2**32 - 1

AGAIN = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINPROGRESS})
"""What a call says that the kernel ended for its time."""


def is_loopback(sock: socket.socket) -> bool:
    """Whether a bound socket is reachable from this machine alone."""
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def send_some(sock: socket.socket, views: Sequence[memoryview], left_s: float) -> int:
    """Send as much as goes within so many seconds. The socket has no timeout of Python's. Raises OSError."""
    _limit(sock, socket.SO_SNDTIMEO, left_s)
    return sock.sendmsg(views[:IOV_MAX])


def receive_some(sock: socket.socket, view: memoryview, left_s: float) -> int:
    """Receive what there is; 0 is the end. As `send_some`."""
    _limit(sock, socket.SO_RCVTIMEO, left_s)
    return sock.recv_into(view)


def receive_all(sock: socket.socket, views: Sequence[memoryview], left_s: float) -> int:
    """Fill all views, in one call where nothing interrupts it; how many bytes came. As `send_some`."""
    _limit(sock, socket.SO_RCVTIMEO, left_s)
    return sock.recvmsg_into(views[:IOV_MAX], 0, socket.MSG_WAITALL)[0]


def bytes_of(buffer: bytes | memoryview) -> memoryview:
    """The buffer as a view of unsigned bytes."""
    view = memoryview(buffer)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def cut(views: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """The bytes [start, start + length) of the concatenation of `views`, as far as it goes; none is empty."""
    found = []
    at = 0
    for view in map(bytes_of, views):
        piece = view[max(start - at, 0) : max(start + length - at, 0)]
        if piece.nbytes:
            found.append(piece)
        at += view.nbytes
    return found


def after(views: Sequence[memoryview], size: int) -> list[memoryview]:
    """What is left of `views` when `size` bytes are done."""
    for index, view in enumerate(views):
        if size < view.nbytes:
            return [view[size:], *views[index + 1 :]]
        size -= view.nbytes
    return []


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
