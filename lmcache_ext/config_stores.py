"""Options of Mooncake and InfiniStore: LMCache's names, how each is read, and its field here.

``extra_config`` has the names of both; Mooncake's own file (``MOONCAKE_CONFIG_PATH``) has those of Mooncake.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lmcache_ext.config_values import PIB, Reader, boolean, one_of, optional, plain, port, seconds, text, whole

_SIZE = re.compile(r"([0-9]+\.?[0-9]*)\s*([kmgt]?)i?b?", re.IGNORECASE)


class Option(NamedTuple):
    """One option of a store."""

    field: str
    read: Reader


def plain_bytes(value: object) -> int:
    """A size as Mooncake reads it: a bare number is bytes; k, m, g and t (and kb, KiB, ...) are powers of 1024."""
    value = plain(value)
    found = (
        _SIZE.fullmatch(str(value)) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    )
    size = float(found[1]) * 1024 ** " kmgt".index(found[2].lower() or " ") if found else -1.0
    if not 0 <= size <= PIB:
        raise ValueError('is not a size: write bytes, such as 3355443200, or a unit, such as "3GB"')
    return int(size)


def protocol(value: object) -> str:
    """The name of a transport; Mooncake's own are in lower case."""
    return text(value).lower()


def link_type(value: object) -> str:
    """Ethernet (RoCE) or IB, also by the names of InfiniStore's constants."""
    word = plain(value)
    name: str = one_of("Ethernet", "IB")(word.upper().removeprefix("LINK_") if isinstance(word, str) else word)
    return name


MOONCAKE: dict[str, Option] = {
    "local_hostname": Option("local_hostname", optional(text)),
    "metadata_server": Option("metadata_server", optional(text)),
    "master_server_address": Option("master_server_address", optional(text)),
    "protocol": Option("protocol", optional(protocol)),
    "device_name": Option("device_name", optional(text)),
    "global_segment_size": Option("global_segment_bytes", plain_bytes),
    "local_buffer_size": Option("local_buffer_bytes", plain_bytes),
    "transfer_timeout": Option("transfer_timeout_s", seconds),
    "prefer_local_alloc": Option("prefer_local_alloc", boolean),
    "replica_num": Option("num_replicas", whole(1, 64)),
    "storage_root_dir": Option("ssd_offload_path", optional(text)),
    "ssd_offload_path": Option("ssd_offload_path", optional(text)),
    "enable_ssd_offload": Option("enable_ssd_offload", boolean),
    "tenant_id": Option("tenant_id", optional(text)),
    "enable_client_http_server": Option("enable_client_http_server", boolean),
    "client_http_port": Option("client_http_port", port),
}

INFINISTORE: dict[str, Option] = {
    "infinistore_link_type": Option("link_type", link_type),
    "infinistore_ib_port": Option("ib_port", whole(1, 255)),
}


def mooncake_names() -> dict[str, Option]:
    """Each name of Mooncake's, as it is and with LMCache's ``mooncake_`` before it."""
    return MOONCAKE | {f"mooncake_{name}": option for name, option in MOONCAKE.items()}
