"""What a Redis or Valkey URL and its options say, parsed once. No client library, no I/O.

    redis://[user:password@]host[:6379][/db][?option=value]        rediss:// the same over TLS
    unix://[user:password@]/path/to/redis.sock[?db=0]
    redis-sentinel://[user:password@]host[:26379],host/[service[/db]]
    redis-cluster://[user:password@]host[:6379],host
    valkey://, valkeys://, valkey-sentinel://, valkey-cluster://    the same, by valkey-py
    resp://host:port                                                an alias of redis://

What the URL says wins over the options. Errors name the option, never a password.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.pace import MIN_BYTES_PER_S, STALL_TIMEOUT_S
from lmcache_ext.stores.resp_parts import PART_BYTES

STANDALONE, SENTINEL, CLUSTER = "standalone", "sentinel", "cluster"
MAX_CONNECTIONS = 256

# scheme -> (client library, kind, TLS)
SCHEMES = {
    "redis": ("redis", STANDALONE, False),
    "rediss": ("redis", STANDALONE, True),
    "resp": ("redis", STANDALONE, False),
    "unix": ("redis", STANDALONE, False),
    "redis-sentinel": ("redis", SENTINEL, False),
    "redis-cluster": ("redis", CLUSTER, False),
    "valkey": ("valkey", STANDALONE, False),
    "valkeys": ("valkey", STANDALONE, True),
    "valkey-sentinel": ("valkey", SENTINEL, False),
    "valkey-cluster": ("valkey", CLUSTER, False),
}


@dataclass(frozen=True, slots=True)
class Address:
    """Host and port, or the path of a Unix socket."""

    host: str
    port: int = 0

    def __str__(self) -> str:
        if not self.port:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RespOptions:
    """One backend."""

    library: str
    kind: str
    addresses: tuple[Address, ...]
    name: str = "redis"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int = 0
    tls: bool = False
    ssl: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Keyword arguments of the client library's SSLConnection."""
    ttl_s: float | None = None
    ttl_touch: bool = False
    """A hit starts the time to live anew."""
    num_connections: int = 8
    """At most so many to each server."""
    request_timeout_s: float = 5.0
    """Of one call of the store, all in all."""
    lookup_timeout_s: float | None = None
    """Of `exists`, which a request waits for; None: `request_timeout_s`."""
    stall_timeout_s: float = STALL_TIMEOUT_S
    """Of a get, in which the server must go on sending..."""
    min_bytes_per_s: int = MIN_BYTES_PER_S
    """...as fast as this."""
    connect_timeout_s: float = 1.0
    sentinel_service: str = "redismaster"
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    sentinel_timeout_s: float = 1.0
    """Of one sentinel; then the next is asked."""
    part_bytes: int = PART_BYTES


def _text(value: object) -> str:
    secret = getattr(value, "get_secret_value", None)
    return str(value if secret is None else secret())


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError("expected true or false")
    return words[str(value).lower()]


def _seconds(value: object) -> float:
    number = float(str(value))
    if not 0 < number < 1e9:
        raise ValueError("expected seconds, more than 0")
    return number


def _whole(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        number = int(str(value))
        if not low <= number <= high:
            raise ValueError(f"expected {low} to {high}")
        return number

    return parse


def _one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if str(value) not in words:
            raise ValueError(f"expected {' or '.join(words)}")
        return str(value)

    return parse


_FIELDS: dict[str, Callable[[object], Any]] = {
    "name": _text,
    "username": _text,
    "password": _text,
    "database": _whole(0, 2**16),
    "mode": _one_of(STANDALONE, CLUSTER),
    "tls": _flag,
    "ttl_s": _seconds,
    "ttl_touch": _flag,
    "num_connections": _whole(1, MAX_CONNECTIONS),
    "request_timeout_s": _seconds,
    "lookup_timeout_s": _seconds,
    "stall_timeout_s": _seconds,
    "min_bytes_per_s": _whole(1, 2**40),
    "connect_timeout_s": _seconds,
    "sentinel_service": _text,
    "sentinel_username": _text,
    "sentinel_password": _text,
    "sentinel_timeout_s": _seconds,
    "part_bytes": _whole(1, 2**31),
    "ssl_ca_certs": _text,
    "ssl_ca_path": _text,
    "ssl_ca_data": _text,
    "ssl_certfile": _text,
    "ssl_keyfile": _text,
    "ssl_password": _text,
    "ssl_cert_reqs": _one_of("required", "optional", "none"),
    "ssl_check_hostname": _flag,
    "ssl_ciphers": _text,
}

# what redis-py calls them in a URL
_ALIASES = {
    "db": "database",
    "max_connections": "num_connections",
    "socket_timeout": "request_timeout_s",
    "socket_connect_timeout": "connect_timeout_s",
    "service": "sentinel_service",
}

# of redis-py's, without a meaning here: bytes are bytes, the protocol is ours
_MEANINGLESS = frozenset({"protocol", "decode_responses", "encoding", "encoding_errors", "client_name"})


def remote_options(remote: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options for `open_store` from a configuration's remote part.

    `remote` has the names of `RespOptions` and `mode`; `ttl_s` counts only with a true `ttl_enabled`, where that is
    given. Of `extra` (a free mapping) the names known here are taken, and win. None means not given; other names are
    left alone, for the configuration has judged them.
    """
    found = {name: value for name, value in remote.items() if name in _FIELDS}
    if not remote.get("ttl_enabled", True):
        found.pop("ttl_s", None)
    found |= {name: value for name, value in (extra or {}).items() if name in _FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def parse_options(url: str, options: Mapping[str, Any]) -> RespOptions:
    """Everything about the backend behind `url`. Raises ConfigError."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise ConfigError(f"no Redis or Valkey scheme: {scheme!r}, known are {', '.join(SCHEMES)}")
    library, kind, tls = SCHEMES[scheme]
    body, _, query = rest.partition("?")
    credentials, _, body = body.rpartition("@")
    given: dict[str, Any] = {"name": library, "tls": tls, **_known(scheme, options)}
    given |= _credentials(credentials)
    given |= _known(scheme, dict(parse_qsl(query, keep_blank_values=True)), in_url=True)
    given["tls"] = tls or given["tls"]
    if given.pop("mode", STANDALONE) == CLUSTER and kind == STANDALONE and scheme != "unix":
        kind = CLUSTER
    if scheme == "unix":
        given["addresses"] = (Address(_absolute(scheme, unquote(body))),)
        given["tls"] = False
    else:
        hosts, _, path = body.partition("/")
        given["addresses"] = _addresses(scheme, hosts, 26379 if kind == SENTINEL else 6379)
        given |= _path(scheme, kind, unquote(path).strip("/"))
    return _checked(RespOptions(library=library, kind=kind, **_without_ssl(given)))


def _known(scheme: str, values: Mapping[str, Any], *, in_url: bool = False) -> dict[str, Any]:
    """The options by our names, as values of the right type."""
    found = {}
    for key, value in values.items():
        name = _ALIASES.get(key, key)
        # The server's own limit is what counts: capacity is its `maxmemory`.
        if value is None or name == "capacity_bytes" or (in_url and name in _MEANINGLESS):
            continue
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, [*_FIELDS, *_ALIASES], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f", known are {', '.join(sorted(_FIELDS))}"
            raise ConfigError(f"{scheme}://: unknown option {key!r}{hint}")
        try:
            found[name] = _FIELDS[name](value)
        except (ValueError, TypeError) as error:
            shown = "" if "password" in name else f" {str(value)[:80]!r}"
            raise ConfigError(f"{scheme}://: option {key!r} has the bad value{shown}: {error}") from None
    return found


def _without_ssl(given: dict[str, Any]) -> dict[str, Any]:
    """The same with the ssl_* options in one mapping."""
    tls = {name: value for name, value in given.items() if name.startswith("ssl_")}
    plain = {name: value for name, value in given.items() if not name.startswith("ssl_")}
    return plain | {"ssl": tls}


def _credentials(text: str) -> dict[str, str]:
    """`user:password`, `:password` or, as in no RFC but in use, `user`."""
    username, _, password = text.partition(":")
    found = {"username": unquote(username), "password": unquote(password)}
    return {name: value for name, value in found.items() if value}


def _addresses(scheme: str, hosts: str, default_port: int) -> tuple[Address, ...]:
    found = tuple(_address(scheme, host.strip(), default_port) for host in hosts.split(",") if host.strip())
    if not found:
        raise ConfigError(f"{scheme}://: no host")
    return found


def _address(scheme: str, text: str, default_port: int) -> Address:
    matched = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]]+))(?::([0-9]{1,5}))?", text)
    if not matched or not 0 < int(matched[3] or default_port) < 65536:
        raise ConfigError(f"{scheme}://: {text!r} is not host:port")
    return Address(matched[1] or matched[2], int(matched[3] or default_port))


def _absolute(scheme: str, path: str) -> str:
    if not path.startswith("/"):
        raise ConfigError(f"{scheme}://: {path!r} is not an absolute path")
    return path


def _path(scheme: str, kind: str, path: str) -> dict[str, Any]:
    """What follows the hosts: a database, or a service and a database."""
    if not path:
        return {}
    service, _, database = path.partition("/") if kind == SENTINEL and not path.isdecimal() else ("", "", path)
    found: dict[str, Any] = {"sentinel_service": service} if service else {}
    if database:
        found |= _known(scheme, {"database": database})
    return found


def _checked(options: RespOptions) -> RespOptions:
    if options.kind == CLUSTER and options.database:
        raise ConfigError(f"{options.name} cluster: database {options.database}, but a cluster has only database 0")
    if options.username and options.password is None:
        raise ConfigError(f"{options.name}: a username without a password")
    if options.kind == STANDALONE and len(options.addresses) > 1:
        raise ConfigError(
            f"{options.name}: {len(options.addresses)} hosts, but only a cluster or sentinels have several"
        )
    return options
