"""From a URL to a store.

`file://` and `fs://` are built in; every other scheme is an entry point of group `lmcache_ext.stores`
whose name is the scheme and whose value is `callable(url, options) -> Store`. Entry points are loaded
here and nowhere else, when their scheme is asked for, so that a client library nobody uses is never
imported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.disk import DiskStore

GROUP = "lmcache_ext.stores"

Opener = Callable[[str, Mapping[str, Any]], Store]

_NO_OPTIONS: Mapping[str, Any] = {}


def open_store(url: str, *, capacity_bytes: int | None = None, options: Mapping[str, Any] = _NO_OPTIONS) -> Store:
    """The store behind `url`; nothing is connected to or created yet.

    `capacity_bytes` reaches a plugin as the option of that name. Raises ConfigError, naming the nearest
    known scheme.

        file:///a   file:///a,/b   file:///a,file:///b   /a         directories; file://localhost/a is /a
        fs://host:port/a,/b                                          the same; host and port are ignored
    """
    scheme, separator, rest = url.partition("://")
    if not separator and url.startswith("/"):
        scheme, rest = "file", url
    if scheme in ("file", "fs"):
        return _open_disk(url, scheme, rest, capacity_bytes, options)
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if not separator or scheme not in plugins:
        raise ConfigError(_unknown(url, scheme, sorted({"file", "fs", *plugins})))
    opener: Opener = plugins[scheme].load()
    return opener(url, {**options, "capacity_bytes": capacity_bytes})


def _open_disk(url: str, scheme: str, rest: str, capacity_bytes: int | None, options: Mapping[str, Any]) -> DiskStore:
    unknown = sorted(set(options) - {"name"})
    if unknown:
        raise ConfigError(f"{url}: unknown option {unknown[0]!r}, a disk store knows only 'name'")
    pieces = [piece.strip().removeprefix(f"{scheme}://") for piece in rest.split(",")]
    if scheme == "fs":
        pieces = [_after_host(url, piece) for piece in pieces]
    else:
        pieces = [re.sub("^localhost(?=/)", "", piece) for piece in pieces]
    if not all(pieces):
        raise ConfigError(f"{url}: a directory is missing, expected {scheme}:///path or a comma list of them")
    return DiskStore(pieces, capacity_bytes, name=options.get("name", "disk"))


def _after_host(url: str, piece: str) -> str:
    """`host:port/path` -> `/path`, as LMCache reads it."""
    _host, slash, path = piece.partition("/")
    if not slash or not path:
        raise ConfigError(f"{url}: no directory after the host in {piece!r}, expected fs://host:port/path")
    return f"/{path}"


def _unknown(url: str, scheme: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(scheme, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}://?" if nearest else ""
    return f"{url}: no store for scheme {scheme!r}, known are {', '.join(known)}{hint}"
