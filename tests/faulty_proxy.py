"""A TCP proxy for tests: faithful until told to refuse, hang, stall, trickle, cut or flip, or to be a slow link; itself
again when told so.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

TRICKLE_S = 0.02
"""Between two bytes."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to what is sent; `beyond` spares smaller pieces, so that lookups may work where fetches do not."""

    kind: Literal["none", "refuse", "hang", "stall", "trickle", "cut", "flip", "slow"]
    """`stall` passes on a half and then nothing; `slow` is `bytes_per_s` for all connections together."""
    beyond: int = 0
    way: Literal["both", "up", "down"] = "both"
    """`up` is to the server."""
    bytes_per_s: float = 0.0

    def hits(self, way: str, num_bytes: int) -> bool:
        return self.kind not in ("none", "refuse") and self.way in ("both", way) and num_bytes > self.beyond


NONE = Fault("none")


class Proxy:
    """Listens on `port` of this machine, before a server on `target_port`."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self._now = (NONE, threading.Event())
        """The fault, and what is set when another takes its place."""
        self.has_struck = threading.Event()
        """Set when the fault has met bytes that it hits, cleared by the next one."""
        self._lock = threading.Lock()
        self._links: set[tuple[socket.socket, socket.socket]] = set()
        self._listener: socket.socket | None = None
        self._link_free_at = 0.0
        self.port = 0
        self._listen()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def behave(self, fault: Fault = NONE) -> None:
        """From now on. Connections that lost bytes to the last fault are closed."""
        _, changed = self._now
        self._now = (fault, threading.Event())
        self.has_struck.clear()
        changed.set()
        if fault.kind == "refuse":
            self._stop_listening()
            self.drop_connections()
        elif self._listener is None:
            self._listen()

    def drop_connections(self) -> None:
        """Close them all, as a server that died does."""
        with self._lock:
            links = list(self._links)
        for link in links:
            _end(*link)

    def close(self) -> None:
        self.behave(Fault("refuse"))

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            _end(listener)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port), 5.0)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            link = (client, server)
            with self._lock:
                self._links.add(link)
            for source, sink, way in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self._pump, args=(link, source, sink, way), daemon=True).start()

    def _pump(
        self, link: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket, way: str
    ) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                fault, changed = self._now
                if fault.kind == "slow":
                    self._take_turn(len(data) / fault.bytes_per_s)
                if fault.kind == "slow" or not fault.hits(way, len(data)):
                    sink.sendall(data)
                    continue
                self.has_struck.set()
                if not _harm(fault, data, sink, changed):
                    break
        _end(*link)
        with self._lock:
            if link in self._links:
                self._links.discard(link)
                return
        for sock in link:  # the other direction has ended too
            sock.close()

    def _take_turn(self, seconds: float) -> None:
        """Wait until the slow link, which all connections share, has carried one more piece."""
        with self._lock:
            self._link_free_at = done_at = max(self._link_free_at, time.monotonic()) + seconds
        time.sleep(max(done_at - time.monotonic(), 0.0))


def _harm(fault: Fault, data: bytes, sink: socket.socket, changed: threading.Event) -> bool:
    """Pass on what the fault leaves of the data; whether the connection goes on."""
    if fault.kind == "flip":
        harmed = bytearray(data)
        harmed[len(data) // 2] ^= 0x10
        sink.sendall(harmed)
        return True
    if fault.kind == "cut":
        sink.sendall(data[: len(data) // 2])
    elif fault.kind == "hang":
        changed.wait()
    elif fault.kind == "stall":
        sink.sendall(data[: len(data) // 2])
        changed.wait()
    elif fault.kind == "trickle":
        for at in range(len(data)):
            sink.sendall(data[at : at + 1])
            if changed.wait(TRICKLE_S):
                break
    return False


def _end(*sockets: socket.socket) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
