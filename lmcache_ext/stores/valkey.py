"""Valkey, by valkey-py: standalone, behind sentinels, or a cluster."""

from __future__ import annotations

from valkey.backoff import NoBackoff
from valkey.connection import Connection, SSLConnection, UnixDomainSocketConnection
from valkey.exceptions import TimeoutError, ValkeyError
from valkey.retry import Retry

from lmcache_ext.stores.resp_dial import Deadlined, Library


class Tcp(Deadlined, Connection):
    """A TCP connection."""


class Tls(Deadlined, SSLConnection):
    """A TLS connection."""


class Unix(Deadlined, UnixDomainSocketConnection):
    """A connection to a Unix socket."""


LIBRARY = Library(
    Tcp, Tls, Unix, lambda: Retry(NoBackoff(), 0), {"lib_name": None, "lib_version": None}, ValkeyError, TimeoutError
)
