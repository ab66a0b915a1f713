"""Everything about a `mooncakestore://` backend: from the URL, the options and Mooncake's own file, in this order.

mooncakestore://master:50051/                 the master; several masters behind etcd or Redis are one address
mooncakestore://master:50051/?device=mlx5_0   also `device_name`, and each other name of LMCache
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from lmcache_ext.config_stores import MOONCAKE
from lmcache_ext.config_urls import split_url
from lmcache_ext.errors import ConfigError, StoreUnavailable
from lmcache_ext.stores.pace import STALL_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class MooncakeOptions:
    """How to reach a Mooncake store, and what this engine brings into it."""

    master_server_address: str
    local_hostname: str = ""  # empty: this machine's address as the master sees it
    metadata_server: str = "P2PHANDSHAKE"  # none needed: engines tell each other
    protocol: str = "tcp"
    device_name: str = ""
    global_segment_bytes: int = 3355443200  # of this engine's memory for everybody's objects; LMCache's default
    local_buffer_bytes: int = 1024**3  # for objects that do not lie in rows; LMCache's default, used as far as needed
    prefer_local_alloc: bool = False
    num_replicas: int = 1
    ssd_offload_path: str = ""
    enable_ssd_offload: bool = False
    tenant_id: str = "default"
    enable_client_http_server: bool = False
    client_http_port: int = 9300
    timeout_s: float = 10.0
    lookup_timeout_s: float = 0.3
    stall_timeout_s: float = STALL_TIMEOUT_S

    def environment(self) -> dict[str, str]:
        """What the client takes from the environment alone; its own timeouts are 30 s, its own log is long."""
        timeout_s = str(max(1, math.ceil(self.timeout_s)))
        stall_s = str(max(1, math.ceil(self.stall_timeout_s)))  # it counts in whole seconds
        timeout_ms = str(max(1, math.ceil(self.timeout_s * 1000)))
        return {
            "MC_RPC_TIMEOUT_MS": timeout_ms,
            "MC_RPC_CONNECT_TIMEOUT_MS": timeout_ms,
            "MC_TCP_PROGRESS_TIMEOUT_SEC": stall_s,
            "MC_TCP_STATUS_TIMEOUT_SEC": timeout_s,
            "MC_HANDSHAKE_CONNECT_TIMEOUT": timeout_s,
            "MC_STORE_CLIENT_SETUP_RETRIES": "1",
            "MC_LOG_LEVEL": "ERROR",
            "GLOG_minloglevel": "2",  # the same, before it has read the other one
        }

    def own_address(self) -> str:
        """Where the other engines find this one. Raises StoreUnavailable."""
        if self.local_hostname:
            return self.local_hostname
        host, _, port = self.master_server_address.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)
            # without MC_USE_IPV6 the client takes the older kind only
            family, kind, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
            with socket.socket(family, kind) as sock:  # connecting sends nothing: it only looks up the route
                sock.connect(address)
                return str(sock.getsockname()[0])
        except OSError as error:
            raise StoreUnavailable(f"mooncake: no route to the master {self.master_server_address}: {error}") from error


_FIELDS = frozenset(field.name for field in fields(MooncakeOptions))


def parse_options(url: str, options: Mapping[str, Any]) -> MooncakeOptions:
    """Raises ConfigError, naming the option and where it stands."""
    written = dict(options)
    found = _read_file(written.pop("config_path")) if written.get("config_path") else {}
    found |= _known(url, written)
    found |= _from_url(url)
    found.setdefault("enable_ssd_offload", bool(found.get("ssd_offload_path")))
    return MooncakeOptions(**found)


def _read_file(path: str) -> dict[str, Any]:
    """Mooncake's own configuration; its other keys are for other programs."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"MOONCAKE_CONFIG_PATH: {path}: {error}: name a JSON file of Mooncake's") from error
    if not isinstance(content, dict):
        raise ConfigError(f"MOONCAKE_CONFIG_PATH: {path}: {type(content).__name__}, expected a JSON object")
    known = {name: value for name, value in content.items() if name in MOONCAKE and value not in (None, "")}
    return _read(f"MOONCAKE_CONFIG_PATH: {path}", known)


def _known(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their field here, typed already, or by LMCache's name."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if value is None or name == "capacity_bytes":  # the store's capacity is that of all segments
            continue
        if name == "request_timeout_s":
            found.setdefault("timeout_s", value)
        elif name == "transfer_timeout_s":
            found["timeout_s"] = value
        elif name in MOONCAKE and name not in _FIELDS:
            found |= _read(url, {name: value})
        elif name in _FIELDS:
            found[name] = value
        else:
            raise ConfigError(f"{url}: unknown option {name!r}, known are {', '.join(MOONCAKE)}")
    return found


def _from_url(url: str) -> dict[str, Any]:
    query = dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))
    if "device" in query:  # LMCache's name of it here
        query["device_name"] = query.pop("device")
    unknown = sorted(set(query) - set(MOONCAKE))
    if unknown:
        raise ConfigError(f"{url}: unknown option {unknown[0]!r}, known are device, {', '.join(MOONCAKE)}")
    hosts = split_url(url).hosts
    if len(hosts) != 1 or ":" not in hosts[0]:
        raise ConfigError(f"{url}: expected the master as mooncakestore://host:50051/")
    return {"master_server_address": hosts[0]} | _read(url, query)


def _read(place: str, written: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in written.items():
        option = MOONCAKE[name]
        try:
            typed = option.read(value)
        except ValueError as error:
            raise ConfigError(f"{place}: {name}: {value!r} {error}") from None
        if typed is not None:
            found["timeout_s" if option.field == "transfer_timeout_s" else option.field] = typed
    return found
