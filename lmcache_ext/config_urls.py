"""URLs of places where bytes rest: checked for syntax, and masked before anybody reads them.

Only syntax is judged here; whether this build can open a scheme is ``stores.open_store``'s to say.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import NamedTuple

from lmcache_ext.config_quotas import masked_quotas
from lmcache_ext.config_values import MASK, text

_CREDENTIALS = re.compile(r"^([a-z0-9+.-]+://)?([^:/@\s]*):?(.*)@", re.IGNORECASE | re.DOTALL)
_SECRET_QUERY = re.compile(r"([?&][^=&]*(?:password|passwd|secret|token|key|sig)[^=&]*=)[^&]*", re.IGNORECASE)
_SECRET_NAME = re.compile(r"pass|pwd|secret|token|cred|access_key|account_key|api_key|connection_string", re.I)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[0-9A-Za-z]+)?\]")


class Scheme(NamedTuple):
    """What must follow ``scheme://``."""

    form: str
    host: bool = False
    port: bool = False
    many: bool = False
    path: bool = False
    database: bool = False


SCHEMES: dict[str, Scheme] = {
    "redis": Scheme("redis://[user:password@]host[:6379][/db]", host=True, database=True),
    "rediss": Scheme("rediss://[user:password@]host[:6379][/db]", host=True, database=True),
    "unix": Scheme("unix:///path/to/redis.sock", path=True),
    "redis-sentinel": Scheme("redis-sentinel://[user:password@]host:26379,host:26379", host=True, many=True),
    "redis-cluster": Scheme("redis-cluster://[user:password@]host:6379,host:6379", host=True, many=True),
    "valkey": Scheme("valkey://[user:password@]host[:6379]", host=True, many=True),
    "valkeys": Scheme("valkeys://[user:password@]host[:6379]", host=True, many=True),
    "valkey-sentinel": Scheme("valkey-sentinel://[user:password@]host:26379,host:26379", host=True, many=True),
    "valkey-cluster": Scheme("valkey-cluster://[user:password@]host:6379,host:6379", host=True, many=True),
    "resp": Scheme("resp://host:6379", host=True, port=True),
    "lm": Scheme("lm://host:65432,host:65432", host=True, port=True, many=True),
    "fs": Scheme("fs:///directory", path=True),
    "file": Scheme("file:///directory", path=True),
    "mooncakestore": Scheme("mooncakestore://host:50051/", host=True, port=True),
    "infinistore": Scheme("infinistore://host:12345/", host=True, port=True),
    "s3": Scheme("s3://bucket", host=True),
} | {
    name: Scheme(name + "://...")
    for name in (
        *("azure", "hf3fs", "hfbucket", "eic", "sagemaker-hyperpod", "bigtable", "external", "plugin"),
        *("audit", "blackhole"),
    )
}
SCHEMES["mock"] = Scheme("mock://10/?peeking_latency=1&read_throughput=2&write_throughput=2", host=True)


def plugin_schemes() -> frozenset[str]:
    """Schemes of stores that other installed packages bring (entry points of group ``lmcache_ext.stores``)."""
    return frozenset(point.name for point in entry_points(group="lmcache_ext.stores")) - SCHEMES.keys()


class Address(NamedTuple):
    """The pieces of a URL that the checks below look at."""

    scheme: str
    hosts: tuple[str, ...]
    path: str


def split_url(url: str) -> Address:
    """Split; comma lists of hosts are kept as one element each, user and password are dropped."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        raise ValueError("has no scheme: write it as scheme://host:port, such as redis://redis:6379")
    found = re.match(r"([^/?#]*)([^?#]*)", rest)
    authority, path = (found[1], found[2]) if found else ("", "")
    hosts = authority.rpartition("@")[2]
    return Address(scheme.lower(), tuple(hosts.split(",")) if hosts else (), path)


def remote_url(value: object) -> str:
    """A URL of a known scheme, with the host, port or path that the scheme needs."""
    url = text(value)
    address = split_url(url)
    scheme = SCHEMES.get(address.scheme)
    if scheme is None and address.scheme in plugin_schemes():
        return url
    if scheme is None:
        near = difflib.get_close_matches(address.scheme, SCHEMES, n=1, cutoff=0.5)
        way_out = f"did you mean {SCHEMES[near[0]].form}?" if near else f"write one of {', '.join(SCHEMES)}"
        raise ValueError(f"has the unknown scheme {address.scheme!r}: {way_out}")
    if re.search(r"\s", url):
        raise ValueError(f"has a blank in it: write {scheme.form}")
    if scheme.host and re.search(r"://[^@]*[/?#].*@", url):
        raise ValueError(f"has a / ? or # before its @: in a password write them as %2F %3F %23, {scheme.form}")
    _check_hosts(address, scheme)
    if scheme.path and not address.path.startswith("/"):
        raise ValueError(f"has no absolute path: write {scheme.form}")
    if address.scheme == "file":
        _check_local(address)
    if scheme.database and not re.fullmatch(r"/?[0-9]{0,9}", address.path):
        raise ValueError(f"has a database that is not a number: write {scheme.form}")
    return url


def _check_hosts(address: Address, scheme: Scheme) -> None:
    if scheme.host and not address.hosts:
        raise ValueError(f"has no host: write {scheme.form}")
    if scheme.host and len(address.hosts) > 1 and not scheme.many:
        raise ValueError(f"has several hosts, and {address.scheme}:// takes one: write {scheme.form}")
    for host in address.hosts if scheme.host else ():
        _check_host(host, scheme.form, needs_port=scheme.port)


def _check_local(address: Address) -> None:
    """Refuse file://cache/kv: to LMCache it is a path below wherever the server starts, to a URL its host."""
    if address.hosts not in ((), ("localhost",)):
        path = ",".join(address.hosts) + address.path
        raise ValueError(f"is not an absolute directory: write file:///{path} for /{path}")


def _check_host(host: str, form: str, *, needs_port: bool) -> None:
    name, colon, port = host.rpartition(":") if re.search(r":[^\]]*$", host) else (host, "", "")
    if not _HOST.fullmatch(name):
        raise ValueError(f"has no valid host: write {form}")
    if colon and not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        raise ValueError(f"has a port that is not a number from 1 to 65535: write {form}")
    if needs_port and not colon:
        raise ValueError(f"has no port: write {form}")


def host_and_port(value: object) -> str:
    """``host:port``, or the same after ``tcp://``."""
    address = text(value)
    _check_host(address.removeprefix("tcp://"), "host:port", needs_port=True)
    return address


def host(value: object) -> str:
    """A host's name or address; brackets, as a URL has them around an address of IPv6, are left out."""
    return text(value).removeprefix("[").removesuffix("]")


def directories(value: object) -> tuple[str, ...]:
    """Directories of ``local_disk``: a path, a file:// or fs:// URL, or a comma list of these."""
    items = value if isinstance(value, list | tuple) else text(value).split(",")
    return tuple(dict.fromkeys(directory(item) for item in items))


def directory(value: object) -> str:
    """One absolute directory, without its file:// or fs:// (of which LMCache ignores the host too)."""
    path = text(value)
    if "://" in path:
        address = split_url(path)
        if address.scheme not in ("file", "fs"):
            raise ValueError(f"is not a directory: write /path or file:///path, and {address.scheme}:// as remote_url")
        if address.scheme == "file":
            _check_local(address)
        path = address.path
    if not path.startswith("/"):
        raise ValueError("is not an absolute directory: write /path or file:///path")
    return path.rstrip("/") or "/"


def is_secret(key: str) -> bool:
    """Whether the value of this key must never be shown."""
    return bool(_SECRET_NAME.search(key)) and not key.endswith("_tokens")


def _may_hold_secrets(key: str) -> bool:
    # extra_config as a string is JSON nobody could read, or has not read yet
    return is_secret(key) or key == "extra_config"


def mask_url(value: str) -> str:
    """``value`` with the password of a URL, or what may be one, replaced."""
    if "@" in value:
        value = _CREDENTIALS.sub(lambda found: f"{found[1] or ''}{found[2] if found[3] else ''}:{MASK}@", value)
    return _SECRET_QUERY.sub(rf"\g<1>{MASK}", value)


def masked(key: str, value: object) -> object:
    """``value`` as it may be shown: secrets replaced, in nested values too."""
    if key.removeprefix("extra_config.") == "quotas":
        return masked_quotas(value)
    if isinstance(value, str):
        return MASK if _may_hold_secrets(key) and value else mask_url(value)
    if isinstance(value, Mapping):
        return {name: masked(str(name), item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(key, item) for item in value]
    return MASK if is_secret(key) and value is not None and not isinstance(value, bool) else value
