"""`lm://host:port`: a cache server, ours or LMCache's; `lm://a:1,b:1` several of them.

    lm://host:65432                  one server
    lm://a:65432,b:65432,c:65432     each key has one of them, by rendezvous hashing

Options: `token` or `token_file`; `tls` (true), `tls_ca`, `tls_cert`, `tls_key` (any of these turns TLS on);
`num_connections` (per server); `connect_timeout_s`, `lookup_timeout_s` (exists, delete, ping), `timeout_s`
(get, put); `stall_timeout_s`, `min_bytes_per_s` (of a get, see `pace`). Each may be written with `lm_` before it, as
in a file whose extra_config serves several stores;
LMCache's `tls_enable`, `request_timeout` and `connection_timeout` are understood.
"""

from __future__ import annotations

import re
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmcache_ext.config_urls import mask_url
from lmcache_ext.errors import ConfigError, StoreError, StoreUnavailable
from lmcache_ext.stores.base import MAX_KEY_BYTES, NAMESPACE_BYTES, Store, Survey, Usage, surveyed
from lmcache_ext.stores.lmserver_link import Link, OldLink, connect
from lmcache_ext.stores.lmserver_pool import Pool
from lmcache_ext.stores.lmserver_shards import ShardedStore
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.stores.pace import MIN_BYTES_PER_S, STALL_TIMEOUT_S, Floor

MAX_REMEMBERED = 65536
"""Keys deleted on a server that cannot delete; beyond it the oldest are forgotten."""


_SHARE = 0.8  # of a deadline, for one of several servers


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is reached. Times in seconds, each for a whole operation, connecting included."""

    token: str = ""
    token_file: str = ""
    tls: ssl.SSLContext | None = None
    num_connections: int = 8
    connect_timeout_s: float = 1.0
    lookup_timeout_s: float = 0.3
    timeout_s: float = 10.0
    stall_timeout_s: float = STALL_TIMEOUT_S
    min_bytes_per_s: int = MIN_BYTES_PER_S

    def read_token(self) -> bytes:
        """The token as it is now: a mounted secret may have changed. Raises StoreUnavailable."""
        if not self.token_file:
            return self.token.encode()
        try:
            return Path(self.token_file).read_bytes().strip()
        except OSError as error:
            raise StoreUnavailable(f"token_file: {error}") from error


class LMServerStore(Store):
    """One cache server.

    Threads:  any number; each operation has a connection of its own.
    Order:    our server acknowledges a put; LMCache's is asked for the key on the same connection.
    Owner:    payloads are sent from and received into the caller's parts.
    Failure:  StoreTimeout at the operation's deadline, StoreStalled in a get long before it, StoreFull where the
              server has no room (or the object is longer than it takes), else StoreUnavailable. Reconnects by itself at
              the next operation.
    """

    def __init__(self, address: Address, settings: Settings, *, name: str = "lm") -> None:
        self.name = name
        self.address = address
        self._settings = settings
        self._floor = Floor(settings.stall_timeout_s, settings.min_bytes_per_s)
        self._pool = Pool(self._connect, settings.num_connections, name=str(address))
        self._deleted: dict[bytes, None] = {}
        self._deleted_lock = threading.Lock()

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        if not keys:
            return []
        for key in keys:
            _check(key)
        with self._pool.link(self._settings.lookup_timeout_s) as link:
            found = link.exists(keys)
        return [was_found and key not in self._deleted for key, was_found in zip(keys, found, strict=True)]

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        outcome = self.get_many_into([key], [parts])[0]
        if isinstance(outcome, StoreError):
            raise outcome
        return outcome

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        error = self.put_many([key], [parts])[0]
        if error is not None:
            raise error

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        """Over one connection, requests sent ahead."""
        pairs = list(zip(keys, parts_per_key, strict=True))
        there = [index for index, key in enumerate(keys) if _check(key) not in self._deleted]
        outcomes: dict[int, int | StoreError | None] = dict.fromkeys(set(range(len(keys))) - set(there))
        if not there:
            return [None] * len(keys)
        try:
            with self._pool.link(self._settings.timeout_s, self._floor) as link:
                wanted, targets = [keys[index] for index in there], [pairs[index][1] for index in there]
                outcomes.update((there[number], outcome) for number, outcome in link.get_many(wanted, targets))
        except StoreError as error:
            outcomes.update((index, error) for index in there if index not in outcomes)
        return [outcomes[index] for index in range(len(keys))]

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> list[StoreError | None]:
        """Over one connection, objects sent ahead."""
        objects = [parts for _, parts in zip(map(_check, keys), parts_per_key, strict=True)]
        outcomes: dict[int, StoreError | None] = {}
        if not keys:
            return []
        try:
            with self._pool.link(self._settings.timeout_s) as link:
                outcomes.update(link.put_many(keys, objects))
        except StoreError as error:
            outcomes.update((index, error) for index in range(len(keys)) if index not in outcomes)
        self._put_again([keys[index] for index, error in outcomes.items() if error is None])
        return [outcomes[index] for index in range(len(keys))]

    def delete(self, keys: Sequence[bytes]) -> None:
        if not keys:
            return
        with self._pool.link(self._settings.lookup_timeout_s) as link:
            link.delete([_check(key) for key in keys])
            if isinstance(link, OldLink):
                self._remember(keys)

    def ping(self) -> float:
        started_at = time.monotonic()
        with self._pool.link(self._settings.lookup_timeout_s) as link:
            link.ping()
        return time.monotonic() - started_at

    def usage(self) -> Usage:
        """Of the whole server; unknown where LMCache's answers."""
        with self._pool.link(self._settings.lookup_timeout_s) as link:
            return _usage(link.stats())

    def survey(self) -> list[Survey]:
        """LMCache's server says no more than that it is there."""
        return [surveyed(f"lm {self.address}", self._survey)]

    def close(self) -> None:
        self._pool.close()

    def _survey(self) -> Survey:
        self.ping()  # connects
        ping_s = self.ping()
        with self._pool.link(self._settings.timeout_s) as link:
            stats = link.stats(by_namespace=True)
        objects = stats.get("namespaces")
        return Survey(
            f"lm {self.address}",
            ping_s=ping_s,
            usage=_usage(stats),
            when_full=str(stats.get("policy", "")),
            objects=objects if isinstance(objects, dict) else None,
        )

    def _connect(self, timeout_s: float) -> Link:
        settings = self._settings
        return connect(self.address, settings.tls, settings.read_token(), min(timeout_s, settings.connect_timeout_s))

    def _put_again(self, keys: Sequence[bytes]) -> None:
        """What was deleted is there anew."""
        if self._deleted:
            with self._deleted_lock:
                for key in keys:
                    self._deleted.pop(key, None)

    def _remember(self, keys: Sequence[bytes]) -> None:
        with self._deleted_lock:
            self._deleted.update(dict.fromkeys(keys))
            while len(self._deleted) > MAX_REMEMBERED:
                del self._deleted[next(iter(self._deleted))]


def open_lm(url: str, options: Mapping[str, Any]) -> Store:
    """The entry point of `lm://`. Connects to nothing. Raises ConfigError."""
    addresses = parse_addresses(url)
    settings = parse_options(url, options)
    if len(addresses) == 1:
        return LMServerStore(addresses[0], settings)
    # A server that hangs must be given up before the whole is late: only its own keys are lost then.
    each = replace(settings, timeout_s=_SHARE * settings.timeout_s, lookup_timeout_s=_SHARE * settings.lookup_timeout_s)
    stores = [LMServerStore(address, each, name=f"lm {address}") for address in addresses]
    return ShardedStore(stores, deadline_s=settings.timeout_s, lookup_deadline_s=settings.lookup_timeout_s)


def parse_addresses(url: str) -> list[Address]:
    """The servers of an `lm://` URL, each once. Raises ConfigError."""
    authority = re.sub(r"[/?#].*", "", url.replace("lm://", ""))
    addresses = []
    for piece in authority.split(","):
        found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]@]+)):([0-9]{1,5})", piece.strip())
        if found is None or not 0 < int(found[3]) < 65536:
            shown = f"{mask_url(url)}: {mask_url(piece)!r}"
            raise ConfigError(f"{shown} is not host:port, expected lm://host:65432 or a comma list of them")
        addresses.append(Address(found[1] or found[2], int(found[3])))
    return list(dict.fromkeys(addresses))


def parse_options(url: str, options: Mapping[str, Any]) -> Settings:
    """The options that are ours; those of other stores are passed over. Raises ConfigError."""
    known = {name: _option(options, name) for name in (*_TEXTS, *_TIMES, *_COUNTS, "tls")}
    given = {name: value for name, value in known.items() if value is not None}
    chosen: dict[str, Any] = {name: str(given[name]) for name in ("token", "token_file") if name in given}
    if "token" in chosen and "token_file" in chosen:
        raise ConfigError(f"{url}: token and token_file are both set, expected one of them")
    for name in (*_TIMES, *_COUNTS):
        if name in given:
            chosen[name] = _positive(url, name, given[name])
    chosen["tls"] = _tls(url, given)
    return Settings(**chosen)


_TEXTS = ("token", "token_file", "tls_ca", "tls_cert", "tls_key")
_TIMES = ("connect_timeout_s", "lookup_timeout_s", "timeout_s", "stall_timeout_s")
_COUNTS = ("num_connections", "min_bytes_per_s")
_OTHER_NAMES = {  # LMCache's, and those that all remote stores share
    "tls": ("tls_enable",),
    "timeout_s": ("request_timeout", "request_timeout_s"),
    "connect_timeout_s": ("connection_timeout",),
}


def _option(options: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
    """By its name, with prefix or without, or as it is called for other stores."""
    written = (f"lm_{name}", name, *_OTHER_NAMES.get(name, ()))
    return next((options[each] for each in written if options.get(each) is not None), None)


def _tls(url: str, given: Mapping[str, Any]) -> ssl.SSLContext | None:
    wanted = given.get("tls", any(name in given for name in ("tls_ca", "tls_cert", "tls_key")))
    if str(wanted).lower() in ("false", "0", "no", "off"):
        return None
    try:
        context = ssl.create_default_context(cafile=given.get("tls_ca"))
        if "tls_cert" in given:
            context.load_cert_chain(given["tls_cert"], given.get("tls_key"))
    except OSError as error:
        raise ConfigError(f"{url}: tls: {error}") from error
    return context


def _positive(url: str, name: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = 0.0
    is_whole = name not in _COUNTS or number == int(number)
    if not 0 < number < 1e12 or not is_whole:
        raise ConfigError(f"{url}: {name} is {value!r}, expected a {'' if is_whole else 'whole '}number above 0")
    return int(number) if name in _COUNTS else number


def _usage(stats: Mapping[str, Any]) -> Usage:
    return Usage(*(_count(stats.get(field)) for field in ("used_bytes", "capacity_bytes", "num_objects")))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _check(key: bytes) -> bytes:
    if not NAMESPACE_BYTES < len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"key has {len(key)} bytes, expected {NAMESPACE_BYTES + 1} to {MAX_KEY_BYTES}")
    return key
