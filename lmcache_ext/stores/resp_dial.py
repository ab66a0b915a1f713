"""From an address to a wire, through a client library's connection: it connects, speaks TLS, AUTH and SELECT.

The library bounds each of its reads, not their sum. So it is given a socket that knows the deadline, and we keep the
real one when it is done.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lmcache_ext.errors import StoreTimeout, StoreUnavailable
from lmcache_ext.stores.redis_options import Address, RespOptions
from lmcache_ext.stores.resp_topology import Connect
from lmcache_ext.stores.resp_wire import Deadline, Wire


class DeadlineSocket:
    """As much of a socket as the handshake of a client library needs, all of it over by the deadline."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._socket = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._limit()
        self._socket.sendall(data)

    def recv(self, size: int) -> bytes:
        self._limit()
        return self._socket.recv(size)

    def recv_into(self, buffer: bytearray | memoryview, size: int = 0) -> int:
        self._limit()
        return self._socket.recv_into(buffer, size)

    def settimeout(self, timeout_s: float | None) -> None:
        """The deadline stands, whatever the library thinks."""

    def gettimeout(self) -> float | None:
        return self._socket.gettimeout()

    def fileno(self) -> int:
        return self._socket.fileno()

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()

    def _limit(self) -> None:
        try:
            self._socket.settimeout(self._deadline.left_s())
        except StoreTimeout as error:
            raise TimeoutError(str(error)) from error  # what the library expects of a socket


class Deadlined:
    """Before a client library's connection class: keeps the real socket and hands on one with a deadline."""

    deadline: Deadline
    taken: socket.socket | None = None

    def _connect(self) -> DeadlineSocket:
        sock: socket.socket = super()._connect()  # type: ignore[misc]
        self.taken = sock
        return DeadlineSocket(sock, self.deadline)


@dataclass(frozen=True, slots=True)
class Library:
    """What is needed of redis-py or valkey-py."""

    tcp: Callable[..., Any]
    tls: Callable[..., Any]
    unix: Callable[..., Any]
    never_again: Callable[[], object]
    """Makes a retry policy that does not retry: `stores.guard` judges."""
    quiet: Mapping[str, None]
    """Keyword arguments that spare the round trips of CLIENT SETINFO."""
    error: type[Exception]
    timeout: type[Exception]


def connects(library: Library, options: RespOptions) -> Connect:
    """How to connect to servers that have keys."""
    login = {"username": options.username, "password": options.password, "db": options.database}
    return _connects(library, options, login)


def connects_to_sentinels(library: Library, options: RespOptions) -> Connect:
    """How to connect to sentinels, which have passwords of their own."""
    login = {"username": options.sentinel_username, "password": options.sentinel_password}
    return _connects(library, options, login)


def _connects(library: Library, options: RespOptions, login: Mapping[str, Any]) -> Connect:
    def connect(address: Address, deadline: Deadline) -> Wire:
        label = f"{options.name} {address}"
        short = deadline.within(options.connect_timeout_s)
        connection = _new_connection(library, options, address, short, login)
        try:
            connection.connect()
        except library.timeout as error:
            _drop(connection)
            raise StoreTimeout(f"{label}: not connected within {short.timeout_s:.3g} s: {error}") from error
        except (library.error, OSError, ValueError) as error:
            _drop(connection)
            raise StoreUnavailable(f"{label}: not connected: {error}"[:300]) from error
        return Wire(connection.taken, connection, label)

    return connect


def _new_connection(
    library: Library, options: RespOptions, address: Address, deadline: Deadline, login: Mapping[str, Any]
) -> Any:  # noqa: ANN401 - a client library's connection, of three classes that share no base of ours
    timeout_s = deadline.left_s()
    common = dict(login, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=library.never_again())
    common |= {"protocol": 2, **library.quiet}
    if not address.port:
        connection = library.unix(path=address.host, **common)
    elif options.tls:
        tls = {"ssl_check_hostname": options.ssl.get("ssl_cert_reqs") != "none", **options.ssl}
        connection = library.tls(host=address.host, port=address.port, **common, **tls)
    else:
        connection = library.tcp(host=address.host, port=address.port, **common)
    connection.deadline = deadline
    return connection


def _drop(connection: Any) -> None:  # noqa: ANN401
    """Close what a failed handshake left open."""
    with suppress(OSError):
        if connection.taken is not None:
            connection.taken.close()
