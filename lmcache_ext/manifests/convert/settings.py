"""lmcacheConfig, and the LMCACHE_* variables beside it, as an LMCache file."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from lmcache_ext.config_keys import KEYS
from lmcache_ext.config_values import ports, size_bytes
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.convert.ledger import Section, Values
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.manifests.quantities import GIB, write_gib

FOLDER = "/lmcache"
FILE = "lmcache_config.yaml"
DISK_FOLDER = "/kv"
SPARE = 1.1  # files of the moment between two clearings
_PD = "prefill and decode are not split here; vLLM's NixlConnector is made for it"
_NO_CONTROLLER = "enableController is not true, so it had no effect"
_ONE_NAME = "all replicas would go by it, and the controller knows engines by their names: each goes by its pod's"
_NO_PEERS = "without p2pInitPorts there is nowhere to ask"
_P2P_HOST = "LMCACHE_P2P_HOST"
_TRUE = (True, "true", 1)
URLS = {"controller_pull_url": 9000, "controller_reply_url": 9001}  # the ports of the chart's own example


class Cache(NamedTuple):
    """The LMCache file of one model, and the volume of its disk tier (None: no disk, or one of the user's)."""

    settings: Values
    disk_volume: Values | None

    @property
    def host_bytes(self) -> int:
        size = self.settings.get("max_local_cpu_size")
        return size_bytes(size) if size is not None and self.settings.get("local_cpu", True) else 0


def lmcache_settings(
    section: Section,
    options: Options,
    env: list[Values],
    remote: tuple[str, str] | None,
    shared: str,
    *,
    is_alone: bool,
) -> Cache | None:
    """The file of one model, None if its cache is off.

    ``remote`` is (URL, serde), ``shared`` a directory of all; ``env`` loses what went into the file.
    """
    enabled = section.take("enabled", "--kv-transfer-config", default=False)
    _refuse(section)
    if enabled not in _TRUE:
        _switched_off(section)
        return None
    settings: Values = {"chunk_size": 256}
    _host(section, settings)
    volume = _disk(section, settings, env, shared)
    if remote is not None:
        settings |= {"remote_url": remote[0], "remote_serde": remote[1]}
    level = section.take("logLevel", f"{FILE}: log_level")
    settings |= {"log_level": str(level)} if level else {}
    _controller(section, options, settings, is_alone=is_alone)
    settings |= _from_variables(env)
    _settle_addresses(section, options, settings, env)
    section.close()
    return Cache(settings, volume)


def _refuse(section: Section) -> None:
    section.refuse(_PD, "enablePD", "enableNixl", "nixlRole", "nixlPeerHost", "nixlPeerPort", "nixlBufferSize")
    section.refuse(_PD, "nixlBufferDevice", "nixlEnableGc")
    section.refuse("Kubernetes chooses the device, by the resource that is asked for", "cudaVisibleDevices")
    if section.peek("kvRole", "kv_both") == "kv_both":
        section.take("kvRole", "--kv-transfer-config: kv_role")
    else:
        section.refuse(_PD, "kvRole")


def _controller(section: Section, options: Options, settings: Values, *, is_alone: bool) -> None:
    """Whom the engine tells what it holds, by what name, and where peers ask it."""
    told = section.take("enableController", f"{FILE}: enable_controller", default=False) in _TRUE
    if is_alone or not told:
        name = section.take("instanceId", f"{FILE}: lmcache_instance_id")
        settings |= {"lmcache_instance_id": str(name)} if name else {}
    else:
        section.refuse(_ONE_NAME, "instanceId")
    if not told:
        section.refuse(_NO_CONTROLLER, "controllerPort", "controllerReplyPort", "workerPorts", "workerHeartbeatTime")
        section.refuse(_NO_CONTROLLER, "p2pHost", "p2pInitPorts")
        return
    settings["enable_controller"] = True
    for (url, default), key in zip(URLS.items(), ("controllerPort", "controllerReplyPort"), strict=True):
        port = section.port(key, f"{FILE}: {url}, and a port of {options.controller_service}", default)
        settings[url] = f"{options.controller_service}:{port}"
    worker_ports = _ports(section, "workerPorts", f"{FILE}: lmcache_worker_ports")
    settings |= {"lmcache_worker_ports": worker_ports} if worker_ports else {}
    heartbeat = section.take("workerHeartbeatTime", f"{FILE}: lmcache_worker_heartbeat_time")
    settings |= {"lmcache_worker_heartbeat_time": _typed(str(heartbeat))} if heartbeat not in (None, "") else {}
    _peers(section, settings)


def _peers(section: Section, settings: Values) -> None:
    init_ports = _ports(section, "p2pInitPorts", f"{FILE}: enable_p2p and p2p_init_ports")
    if not init_ports:
        section.refuse(_NO_PEERS, "p2pHost")
        return
    host = section.take("p2pHost", f"env {_P2P_HOST}, which is the pod's IP: any other name is not each pod's own")
    settings |= {"enable_p2p": True, "p2p_init_ports": init_ports}
    said = f", each known by its IP and not as {host}" if host else ""
    section.ledger.note(
        f"{section.path}: enable_p2p is true, which the chart has no key for: replicas fetch from each other{said}"
    )


def _ports(section: Section, name: str, target: str) -> list[int]:
    value = section.take(name, target)
    try:
        return list(ports(value)) if value not in (None, "") else []
    except ValueError as error:
        raise ManifestError(f"{section.path}.{name}: {value!r} {error}") from None


def _settle_addresses(section: Section, options: Options, settings: Values, env: list[Values]) -> None:
    """What variables of the chart's users say too: the controller is no longer the router, and peers are pods."""
    for url in URLS:
        host, _, port = str(settings.get(url, "")).rpartition(":")
        if host.partition(".")[0] == options.router_service:
            settings[url] = f"{options.controller_service}:{port}"
            section.ledger.note(f"{section.path}: {url} is {settings[url]}, not {host}:{port}: there is no router")
    ours = [url for url in URLS if str(settings.get(url, "")).startswith(f"{options.controller_service}:")]
    if len(ours) == 1 and settings.keys() >= URLS.keys():
        section.ledger.note(
            f"{section.path}: no {ours[0]}: a variable names another controller, and one address will do"
        )
        del settings[ours[0]]
    known = "p2p_host" in settings or any(item.get("name") == _P2P_HOST for item in env)
    if settings.get("enable_p2p") and not known:
        env.append({"name": _P2P_HOST, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})


def _switched_off(section: Section) -> None:
    section.refuse("lmcacheConfig.enabled is not true", "cpuOffloadingBufferSize", "diskOffloadingBufferSize")
    section.refuse("lmcacheConfig.enabled is not true", "logLevel", "instanceId", "enableController")
    section.refuse("lmcacheConfig.enabled is not true", "controllerPort", "controllerReplyPort", "workerPorts")
    section.refuse("lmcacheConfig.enabled is not true", "workerHeartbeatTime", "p2pHost", "p2pInitPorts")
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
