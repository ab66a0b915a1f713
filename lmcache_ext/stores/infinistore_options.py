"""Everything about an `infinistore://` backend.

infinistore://host:12345/?device=mlx5_0       the RDMA device of this machine; mlx5_0 if not said
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from lmcache_ext.config_stores import link_type
from lmcache_ext.config_urls import split_url
from lmcache_ext.config_values import port as read_port
from lmcache_ext.config_values import whole
from lmcache_ext.errors import ConfigError


@dataclass(frozen=True, slots=True)
class InfinistoreOptions:
    """How to reach an InfiniStore server."""

    host: str
    port: int
    device: str = "mlx5_0"
    link_type: str = "Ethernet"
    ib_port: int = 1
    timeout_s: float = 10.0
    lookup_timeout_s: float = 0.3


def parse_options(url: str, options: Mapping[str, Any]) -> InfinistoreOptions:
    """Raises ConfigError, naming the option."""
    hosts = split_url(url).hosts
    host, colon, port = hosts[0].rpartition(":") if len(hosts) == 1 else ("", "", "")
    if not colon:
        raise ConfigError(f"{url}: expected the server as infinistore://host:12345/")
    query = dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))
    unknown = sorted(set(query) - {"device"})
    if unknown:
        raise ConfigError(f"{url}: unknown option {unknown[0]!r}, known is device")
    readers = {"link_type": link_type, "ib_port": whole(1, 255)}
    times = {"request_timeout_s": "timeout_s", "lookup_timeout_s": "lookup_timeout_s"}
    found: dict[str, Any] = {"device": query["device"]} if query.get("device") else {}
    try:
        found["port"] = read_port(port)
        for name, value in options.items():
            if name in readers:
                found[name] = readers[name](value)
            elif name in times:
                found[times[name]] = value
            elif name != "capacity_bytes":  # the server's own limit is what counts
                raise ConfigError(f"{url}: unknown option {name!r}, known are {', '.join([*readers, *times])}")
    except ValueError as error:
        raise ConfigError(f"{url}: {error}") from None
    return InfinistoreOptions(host=host.strip("[]"), **found)
