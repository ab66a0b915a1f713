"""lmcacheConfig, and the LMCACHE_* variables beside it, as an LMCache file."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from lmcache_ext.config_keys import KEYS
from lmcache_ext.config_values import size_bytes
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.convert.ledger import Section, Values
from lmcache_ext.manifests.quantities import GIB, write_gib

FOLDER = "/lmcache"
FILE = "lmcache_config.yaml"
DISK_FOLDER = "/kv"
SPARE = 1.1  # files of the moment between two clearings
_PD = "prefill and decode are not split here; vLLM's NixlConnector is made for it"
_CONTROLLER = (
    "the chart's controller is in its router, and there is no router: deploy/components/controller is one of its own, "
    "and its overlay has the keys for it"
)
_P2P = "the chart never sets enable_p2p, so it had no effect"


class Cache(NamedTuple):
    """The LMCache file of one model, and the volume of its disk tier (None: no disk, or one of the user's)."""

    settings: Values
    disk_volume: Values | None

    @property
    def host_bytes(self) -> int:
        size = self.settings.get("max_local_cpu_size")
        return size_bytes(size) if size is not None and self.settings.get("local_cpu", True) else 0


def lmcache_settings(section: Section, env: list[Values], remote: tuple[str, str] | None, shared: str) -> Cache | None:
    """The file of one model, None if its cache is off. ``remote`` is (URL, serde); ``shared`` a directory of all."""
    enabled = section.take("enabled", "--kv-transfer-config", default=False)
    _refuse(section)
    if enabled not in (True, "true", 1):
        _switched_off(section)
        return None
    settings: Values = {"chunk_size": 256}
    _host(section, settings)
    volume = _disk(section, settings, env, shared)
    if remote is not None:
        settings |= {"remote_url": remote[0], "remote_serde": remote[1]}
    level = section.take("logLevel", f"{FILE}: log_level")
    settings |= {"log_level": str(level)} if level else {}
    name = section.take("instanceId", f"{FILE}: lmcache_instance_id")
    settings |= {"lmcache_instance_id": str(name)} if name else {}
    settings |= _from_variables(env)
    section.close()
    return Cache(settings, volume)


def _refuse(section: Section) -> None:
    section.refuse(_PD, "enablePD", "enableNixl", "nixlRole", "nixlPeerHost", "nixlPeerPort", "nixlBufferSize")
    section.refuse(_PD, "nixlBufferDevice", "nixlEnableGc")
    section.refuse(_CONTROLLER, "enableController", "controllerPort", "controllerReplyPort", "workerPorts")
    section.refuse(_CONTROLLER, "workerHeartbeatTime")
    section.refuse(_P2P, "p2pHost", "p2pInitPorts")
    section.refuse("Kubernetes chooses the device, by the resource that is asked for", "cudaVisibleDevices")
    if section.peek("kvRole", "kv_both") == "kv_both":
        section.take("kvRole", "--kv-transfer-config: kv_role")
    else:
        section.refuse(_PD, "kvRole")


def _switched_off(section: Section) -> None:
    section.refuse("lmcacheConfig.enabled is not true", "cpuOffloadingBufferSize", "diskOffloadingBufferSize")
    section.refuse("lmcacheConfig.enabled is not true", "logLevel", "instanceId")
    section.close()


def _size_gib(section: Section, name: str, target: str) -> float:
    """A size in GiB, by whatever spelling; 0 where there is none."""
    value = section.take(name, target)
    if value in (None, "", 0, "0"):
        return 0
    try:
        return float(f"{size_bytes(value) / GIB:.6g}")
    except ValueError as error:
        raise ManifestError(f"{section.path}.{name}: {value!r} {error}") from None


def _host(section: Section, settings: Values) -> None:
    size = _size_gib(section, "cpuOffloadingBufferSize", f"{FILE}: max_local_cpu_size, and the size of /dev/shm")
    settings["local_cpu"] = size > 0
    if size:
        settings["max_local_cpu_size"] = size
    else:
        section.ledger.note(f"{section.path}: no buffer in host memory, so local_cpu is false")


def _disk(section: Section, settings: Values, env: list[Values], shared: str) -> Values | None:
    size = _size_gib(section, "diskOffloadingBufferSize", f"{FILE}: max_local_disk_size")
    if not size:
        return None
    settings["max_local_disk_size"] = size
    if any(item.get("name") == "LMCACHE_LOCAL_DISK" for item in env):
        return None  # the user's own directory, and volume
    settings["local_disk"] = f"{shared}/lmcache" if shared else DISK_FOLDER
    section.ledger.note(
        f"{section.path}: the chart never gave the disk a directory; here it is {settings['local_disk']}"
    )
    if shared:
        return None
    return {"name": "kv", "emptyDir": {"sizeLimit": write_gib(int(size * GIB * SPARE))}}


def _from_variables(env: list[Values]) -> Values:
    """Settings among the variables, which leave the list: one place for all of them."""
    found: Values = {}
    for item in list(env):
        key = re.sub("^LMCACHE_", "", str(item.get("name", ""))).lower()
        if str(item.get("name", "")).startswith("LMCACHE_") and key in KEYS and isinstance(item.get("value"), str):
            found[key] = _typed(item["value"])
            env.remove(item)
    return found


def _typed(text: str) -> Any:  # noqa: ANN401 - a boolean, a number or text
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    return int(text) if re.fullmatch("[0-9]+", text) else text
