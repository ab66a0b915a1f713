"""The opener behind every Redis and Valkey scheme (entry points in pyproject.toml)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.redis_options import CLUSTER, SENTINEL, RespOptions, parse_options
from lmcache_ext.stores.resp_dial import Library, connects, connects_to_sentinels
from lmcache_ext.stores.resp_store import RespStore
from lmcache_ext.stores.resp_topology import Cluster, Sentinels, Single, Topology

TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


def open_resp(url: str, options: Mapping[str, Any]) -> RespStore:
    """The store behind `url`; nothing is connected yet. Raises ConfigError."""
    settings = parse_options(url, options)
    _check_tls(settings)
    return RespStore(settings, _topology(_library(settings.library), settings))


def _check_tls(options: RespOptions) -> None:
    """Raises ConfigError where certificates are named and would not be used, or cannot be."""
    named = [name for name in TLS_FILES if options.ssl.get(name)]
    if named and not options.tls:
        way_out = f"write rediss:// or valkeys://, tls: true, or remove {named[0]}"
        raise ConfigError(f"{options.name}: {named[0]} is set, and the connection is not TLS: {way_out}")
    for name in named:
        try:
            with open(options.ssl[name], "rb"):
                continue
        except OSError as error:
            why = f"{options.ssl[name]} cannot be read ({error.strerror})"
            raise ConfigError(f"{options.name}: {name}: {why}: name a PEM file that is mounted here") from error


def _topology(library: Library, options: RespOptions) -> Topology:
    connect = connects(library, options)
    if options.kind == CLUSTER:
        return Cluster(options, connect)
    if options.kind == SENTINEL:
        return Sentinels(options, connect, connects_to_sentinels(library, options))
    return Single(options, connect)


def _library(name: str) -> Library:
    """Our module of the client library's name; imported here, for most people need one of the two."""
    try:
        module = importlib.import_module(f"lmcache_ext.stores.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name:
            raise
        raise ConfigError(f"{name}:// needs a package that is not installed: pip install {name}") from error
    library: Library = module.LIBRARY
    return library
