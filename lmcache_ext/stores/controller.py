"""The engine's end of what engines and the controller say to each other: one connection, blocking, with deadlines."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_ext.errors import StoreRefused, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.wire import controller as wire
from lmcache_ext.wire.stream import WireError

READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Door:
    """How to reach a port of the controller."""

    address: Address
    token_file: str | None = None
    timeout_s: float = 5.0

    def token(self) -> str:
        """As it is now: a mounted secret may have changed. Raises StoreUnavailable."""
        if self.token_file is None:
            return ""
        try:
            return Path(self.token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise StoreUnavailable(f"controller_token_file: {error}") from error


class ControllerLink:
    """Questions and answers in turn; what the controller says by itself waits in `told`.

    Threads:  one at a time.
    Order:    an answer belongs to the question before it; one that comes later than its deadline is dropped.
    Owner:    of its socket, until `close`, which may be called twice.
    Failure:  StoreTimeout, StoreUnavailable (StoreRefused is one); the link is of no use afterwards.
    """

    def __init__(self, door: Door) -> None:
        self._door = door
        self._sock: socket.socket | None = None
        self._decoder = wire.MessageDecoder()
        self._number = 0
        self.told: deque[wire.Message] = deque()

    def open(self) -> ControllerLink:
        """Connect and say hello."""
        address = self._door.address
        try:
            self._sock = socket.create_connection((address.host, address.port), self._door.timeout_s)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as error:
            raise StoreUnavailable(f"controller {address}: {error}") from error
        self.ask({"op": "hello", "token": self._door.token()})
        return self

    def ask(self, fields: Mapping[str, Any], body: bytes = b"", timeout_s: float | None = None) -> wire.Message:
        """The answer to a message; one that says error is StoreRefused with its text."""
        deadline = time.monotonic() + (self._door.timeout_s if timeout_s is None else timeout_s)
        self._number += 1
        try:
            self._socket().settimeout(_left(deadline))
            self._socket().sendall(wire.encode({**fields, "id": self._number}, body))
            while True:
                message = self._receive(deadline)
                if message.fields.get("op"):
                    self.told.append(message)
                elif "error" in message.fields:
                    raise StoreRefused(f"controller {self._door.address}: {message.fields['error']}")
                elif message.fields.get("re") == self._number:
                    return message
        except TimeoutError as error:
            raise StoreTimeout(f"controller {self._door.address}: no answer in time") from error
        except OSError as error:
            raise StoreUnavailable(f"controller {self._door.address}: {error}") from error

    def listen(self) -> None:
        """Take in what the controller says by itself, without waiting. Raises StoreUnavailable where it is gone."""
        try:
            poll = select.poll()
            poll.register(self._socket(), select.POLLIN)
            while poll.poll(0):
                self._read(time.monotonic() + self._door.timeout_s)
                while (message := self._head()) is not None:
                    self.told.append(message)
        except OSError as error:
            raise StoreUnavailable(f"controller {self._door.address}: {error}") from error

    def fileno(self) -> int:
        """For select."""
        return self._socket().fileno()

    def close(self) -> None:
        if self._sock is not None:
            with suppress(OSError):
                self._sock.close()
            self._sock = None

    def _socket(self) -> socket.socket:
        if self._sock is None:
            raise StoreUnavailable(f"controller {self._door.address}: closed")
        return self._sock

    def _receive(self, deadline: float) -> wire.Message:
        while (message := self._head()) is None:
            self._read(deadline)
        return message

    def _head(self) -> wire.Message | None:
        try:
            return self._decoder.head()
        except WireError as error:
            raise StoreUnavailable(f"controller {self._door.address}: {error}") from error

    def _read(self, deadline: float) -> None:
        self._socket().settimeout(_left(deadline))
        data = self._socket().recv(READ_BYTES)
        if not data:
            raise StoreUnavailable(f"controller {self._door.address}: closed the connection")
        self._decoder.feed(data)


def door(url: str, token_file: str | None) -> Door:
    """The door behind `host:port`, with or without tcp:// before it."""
    host, _, port = url.rpartition("://")[2].rpartition(":")
    return Door(Address(host.strip("[]"), int(port)), token_file)


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
