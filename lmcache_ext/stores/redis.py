"""Redis, by redis-py: standalone, behind sentinels, or a cluster."""

from __future__ import annotations

from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError, TimeoutError
from redis.retry import Retry

from lmcache_ext.stores.resp_dial import Deadlined, Library


class Tcp(Deadlined, Connection):
    """A TCP connection."""


class Tls(Deadlined, SSLConnection):
    """A TLS connection."""


class Unix(Deadlined, UnixDomainSocketConnection):
    """A connection to a Unix socket."""


LIBRARY = Library(Tcp, Tls, Unix, lambda: Retry(NoBackoff(), 0), {"driver_info": None}, RedisError, TimeoutError)
