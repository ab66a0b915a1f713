"""The cache of each engine: how it is switched on, where its settings come from, what they amount to."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lmcache_ext.config import Config, load_config
from lmcache_ext.errors import ConfigError
from lmcache_ext.manifests.bundle import Bundle, Document
from lmcache_ext.manifests.nodes import Node
from lmcache_ext.manifests.pods import Arg, Container, Env, Mount, Pod, pods

CONNECTORS = ("LMCacheConnectorV1", "LMCacheConnector")
FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
OF_THE_POD = {"LMCACHE_P2P_HOST": "0.0.0.0"}
"""Variables that a pod fills in by itself, with some value of their kind."""
TRANSFER_FLAG = "kv-transfer-config"
_READ = re.compile(r"(LMCACHE|LM_CACHE|REDIS)_[A-Z0-9_]+")
_NAME = "lmcache_config.yaml"


@dataclass(frozen=True, eq=False)
class Cache:
    """One engine's cache, as far as the given files tell."""

    bundle: Bundle
    pod: Pod
    container: Container

    @cached_property
    def transfer(self) -> Arg | None:
        """vLLM's ``--kv-transfer-config``, as written."""
        return self.container.flag(TRANSFER_FLAG)

    @cached_property
    def transfer_value(self) -> Mapping[str, Any] | None:
        """The same as a mapping, quotes around it taken off; None where it is none."""
        text = unquoted(self.transfer.text) if self.transfer else ""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    @property
    def file(self) -> Env | None:
        """The variable that names the LMCache file."""
        return self.container.env.get(FILE_VARIABLE)

    @property
    def mount(self) -> Mount | None:
        """The mount that file is in."""
        return self.container.mount_of(self.file.value) if self.file and self.file.value else None

    @property
    def volume(self) -> Node | None:
        return self.pod.volumes.get(self.mount.volume) if self.mount else None

    @cached_property
    def config_map(self) -> Document | None:
        """The ConfigMap mounted there, if it was given."""
        name = self.volume.text_at("configMap", "name") if self.volume else ""
        return self.bundle.find("ConfigMap", name, self.pod.namespace) if name else None

    @property
    def mounted_files(self) -> dict[str, str]:
        """File name within the volume -> key of the ConfigMap, for those that appear there."""
        items = self.volume.at("configMap", "items") if self.volume else None
        if items is not None:
            return {path: item.text_at("key") for item in items.items() if (path := item.text_at("path"))}
        return {pair.name: pair.name for pair in self.config_map.node.pairs_at("data")} if self.config_map else {}

    @cached_property
    def settings(self) -> Document | None:
        """The LMCache file itself, if it was given."""
        if self.config_map is None or self.mount is None or not self.file or not self.file.value:
            return None
        within = self.mount.sub_path or posixpath.relpath(self.file.value, self.mount.path)
        key = within if self.mount.sub_path else self.mounted_files.get(within)
        return next((each for each in self.bundle.settings_in(self.config_map) if each.key == key), None)

    @property
    def is_known(self) -> bool:
        """Whether all settings are in sight."""
        return self.config is not None and (self.file is None or self.settings is not None)

    @cached_property
    def config(self) -> Config | None:
        """What the settings amount to; None where they cannot be honoured (another rule says why)."""
        written = {name: each.value or OF_THE_POD.get(name, "") for name, each in self.container.env.items()}
        environ = {name: value for name, value in written.items() if value and _READ.fullmatch(name)}
        environ.pop(FILE_VARIABLE, None)
        extra = self.transfer_value.get("kv_connector_extra_config") if self.transfer_value else None
        content = self.settings.node.source if self.settings else None
        try:
            return load_config(
                path=_NAME if content is not None else None,
                content=content,
                environ=environ,
                connector_extra=extra if isinstance(extra, dict) else None,
            )
        except ConfigError:
            return None

    @property
    def host_bytes(self) -> int:
        """What the cache pins in /dev/shm; 0 where that is not known."""
        config = self.config if self.is_known else None
        return config.live.host_capacity_bytes if config is not None and config.local_cpu else 0


def unquoted(text: str) -> str:
    """Without one pair of quotes around it."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def caches(bundle: Bundle) -> list[Cache]:
    """The engines that use the cache, or seem to want to."""
    return bundle.once(_caches)


def _caches(bundle: Bundle) -> list[Cache]:
    found = []
    for pod in pods(bundle):
        for container in pod.containers:
            cache = Cache(bundle, pod, container)
            if cache.file is not None or _names_us(cache):
                found.append(cache)
    return found


def _names_us(cache: Cache) -> bool:
    return any(name in (cache.transfer.text if cache.transfer else "") for name in CONNECTORS)
