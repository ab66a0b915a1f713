"""Serves objects to other engines, read-only, in the protocol of the cache server (wire/README.md, version 2).

A thread per connection, plain and blocking: peers keep few connections, each of which carries one batch at a time.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.sockets import after, is_loopback
from lmcache_ext.stores.tokens import Token
from lmcache_ext.wire import lm, v2
from lmcache_ext.wire.stream import Decoder, WireError

logger = logging.getLogger("vllm.lmcache_ext.stores.peer_server")

_H = TypeVar("_H")

MAX_CONNECTIONS = 64
READ_BYTES = 64 * 1024
HELLO_S = 10.0
"""For a client to say who it is: until then it holds one of few places."""
IDLE_S = 300.0
SEND_S = 30.0
JOIN_S = 2.0
RETRY_S = 0.2
"""After a connection could not be accepted: the process may have no more files, for now."""


class Objects(ABC):
    """What is served: one per connection, so that it may use its room again.

    Threads:  one.
    Order:    what `get` returned is valid until the next call.
    Owner:    of the room that it returns.
    Failure:  what is not there, or not any more, is None.
    """

    @abstractmethod
    def get(self, key: bytes) -> Sequence[memoryview] | None:
        """The parts of an object."""

    @abstractmethod
    def has(self, key: bytes) -> bool:
        """Whether it was there a moment ago."""


class PeerServer:
    """See the module's docstring.

    Threads:  `open` and `close` in the owner's; connections each in one of their own.
    Order:    replies in the order of the requests.
    Owner:    of its sockets and threads until `close`, which may be called twice; then nothing reads any object.
    Failure:  ConfigError from `open` where a port cannot be had; whatever a client does ends its connection only.
    """

    def __init__(
        self, host: str, ports: Sequence[int], objects: Callable[[], Objects], *, token_file: str | None, max_bytes: int
    ) -> None:
        """`objects` makes those of one connection; `max_bytes` is the longest object."""
        self._host, self._ports = host, ports
        self._objects = objects
        self.token = Token(token_file)
        self._can = v2.Capabilities(max_bytes, v2.MAX_BATCH_KEYS, 1024)
        self._listeners: list[socket.socket] = []
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._closing = threading.Event()
        self.counters: Counter[str] = Counter()

    def open(self) -> PeerServer:
        for port in self._ports:
            try:
                self._listeners.append(_listen(self._host, port))
            except OSError as error:
                self.close()
                raise ConfigError(
                    f"p2p_host, p2p_init_ports, p2p_lookup_ports: cannot listen on {self._host}:{port}: "
                    f"{error.strerror or error}; each engine of a machine needs ports of its own"
                ) from error
        if not self.token.is_needed and not all(map(is_loopback, self._listeners)):
            logger.warning(
                "p2p_host: %s is reachable from other machines and asks for no token: whoever reaches it reads KV; "
                "use controller_token_file",
                self._host,
            )
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), name="lmcache_ext-peers", daemon=True).start()
        return self

    def close(self) -> None:
        """No object is read once this has returned."""
        with self._lock:
            self._closing.set()
            threads = dict(self._open)
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for sock, thread in threads.items():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(JOIN_S)

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if not self._closing.wait(RETRY_S):
                    self._count_failure(error)
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="lmcache_ext-peer", daemon=True)
            with self._lock:
                is_wanted = not self._closing.is_set() and len(self._open) < MAX_CONNECTIONS
                if is_wanted:
                    self._open[sock] = thread
                    thread.start()
            if not is_wanted:
                self.counters["refused"] += 1
                sock.close()

    def _count_failure(self, error: OSError) -> None:
        self.counters["failed"] += 1
        if self.counters["failed"] == 1:
            logger.warning("A peer's connection could not be accepted, and the next ones are tried: %s", error)

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Connection(self, sock, self._objects(), self._can).run()
        except (OSError, WireError) as error:
            logger.debug("A peer's connection ended: %s", error)
        finally:
            with self._lock:
                del self._open[sock]
            sock.close()


class _Connection:
    """Understands one request after another."""

    def __init__(self, server: PeerServer, sock: socket.socket, objects: Objects, can: v2.Capabilities) -> None:
        self._server, self._sock, self._objects, self._can = server, sock, objects, can
        self._is_welcome = not server.token.is_needed
        self._hello_by: float | None = time.monotonic() + HELLO_S
        self._old = lm.RequestDecoder()
        self._decoder = v2.RequestDecoder()

    def run(self) -> None:
        """Raises OSError, WireError at the end."""
        old = self._next(self._old)
        if old is None or old != v2.hello_request():
            raise WireError("a client of LMCache's cache server, and this is an engine")
        self._send([memoryview(v2.hello_reply().encode())])
        self._decoder.feed(self._old.take_rest())
        self._hello_by = None if self._is_welcome else self._hello_by
        while (request := self._next(self._decoder)) is not None:
            if request.op == v2.Op.PUT:
                raise WireError("peers are read, not written")
            if not self._answer(request, self._body(request.body_bytes)):
                return

    def _answer(self, request: v2.Request, body: bytes) -> bool:
        """Whether the connection goes on."""
        if request.op == v2.Op.HELLO:
            self._is_welcome = self._is_welcome or self._server.token.accepts(body)
        if not self._is_welcome:
            self._server.counters["unauthorized"] += 1
            self._reply(request, b"the token is missing or wrong", v2.Status.UNAUTHORIZED)
            return False
        self._hello_by = None
        if request.op == v2.Op.GET:
            self._get(request)
        elif request.op == v2.Op.HELLO:
            self._reply(request, self._can.encode())
        elif request.op == v2.Op.EXISTS:
            self._reply(request, bytes(self._objects.has(key) for key in v2.decode_keys(body)))
        elif request.op == v2.Op.STATS:
            self._reply(request, json.dumps(self._server.counters).encode())
        elif request.op == v2.Op.DELETE:
            self._reply(request, b"peers are read, not written", v2.Status.REFUSED)
        else:
            self._reply(request)
        return True

    def _get(self, request: v2.Request) -> None:
        found = self._objects.get(request.key)
        self._server.counters["miss" if found is None else "hit"] += 1
        if found is None:
            self._reply(request, status=v2.Status.MISS)
            return
        length = sum(part.nbytes for part in found)
        wanted = min(request.argument, length)
        head = v2.Reply(v2.Status.OK, request.request_id, wanted, length).encode()
        left = wanted
        parts = [memoryview(head)]
        for part in found:
            parts.append(part[:left])
            left -= parts[-1].nbytes
        self._send(parts)

    def _reply(self, request: v2.Request, body: bytes = b"", status: v2.Status = v2.Status.OK) -> None:
        self._send([memoryview(v2.Reply(status, request.request_id, len(body)).encode() + body)])

    def _next(self, decoder: Decoder[_H]) -> _H | None:
        """The next request; None where the client has gone."""
        while (head := decoder.head()) is None:
            data = self._receive()
            if not data:
                return None
            decoder.feed(data)
        return head

    def _body(self, num_bytes: int) -> bytes:
        """What follows a request; small, as the decoder has seen to."""
        body = memoryview(bytearray(num_bytes))
        at = self._decoder.drain(body)
        while at < num_bytes:
            data = self._receive()
            if not data:
                raise WireError(f"the connection ended {num_bytes - at} bytes before its request")
            self._decoder.feed(data)
            at += self._decoder.drain(body[at:])
        return bytes(body)

    def _receive(self) -> bytes:
        self._sock.settimeout(IDLE_S if self._hello_by is None else max(self._hello_by - time.monotonic(), 0.001))
        return self._sock.recv(READ_BYTES)

    def _send(self, parts: Sequence[memoryview]) -> None:
        self._sock.settimeout(SEND_S)
        left = [part for part in parts if part.nbytes]
        while left:
            left = after(left, self._sock.sendmsg(left))


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit it
        sock.bind(address)
        sock.listen(MAX_CONNECTIONS)
    except BaseException:
        sock.close()
        raise
    return sock
