"""The ConfigMap to tune and the InferenceService that mounts it, found among what was given."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache_ext.config import Config, load_config
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.bundle import Bundle, Document
from lmcache_ext.manifests.caches import Cache, caches
from lmcache_ext.manifests.nodes import Node


@dataclass(frozen=True)
class Target:
    """What is tuned. ``service`` is None for a ConfigMap that no InferenceService given here mounts."""

    settings: Document
    cache: Cache | None
    config: Config

    @property
    def service(self) -> Document | None:
        return self.cache.pod.document if self.cache is not None else None

    @property
    def model(self) -> Node | None:
        """``predictor.model`` of the InferenceService."""
        return self.cache.container.own if self.cache is not None else None


def split_name(text: str) -> tuple[str, str]:
    """``ns/name`` or ``name``, as (namespace, name); the namespace is "" where none is written."""
    namespace, _, name = text.rpartition("/")
    if not name or "/" in namespace:
        raise ManifestError(f"{text}: write namespace/name")
    return namespace, name


def find_target(bundle: Bundle, config_map: str, service: str = "") -> Target:
    """Raises ManifestError where the one or the other is not there, or more than one is."""
    namespace, name = split_name(config_map)
    holder = bundle.find("ConfigMap", name, namespace)
    if holder is None:
        raise ManifestError(f"no ConfigMap {config_map}")
    files = bundle.settings_in(holder)
    if len(files) != 1:
        keys = ", ".join(each.key for each in files) or "no key with one"
        raise ManifestError(f"the ConfigMap {config_map} must have one LMCache file, and has {keys}")
    using = [
        cache
        for cache in caches(bundle)
        if cache.pod.document.kind == "InferenceService" and cache.settings is files[0]
        if service in ("", cache.pod.document.name)
    ]
    if len(using) > 1:
        names = ", ".join(cache.pod.document.name for cache in using)
        raise ManifestError(f"{names} mount the ConfigMap {config_map}: name one by --inferenceservice")
    if service and not using:
        raise ManifestError(f"no InferenceService {service} reads the ConfigMap {config_map}")
    cache = using[0] if using else None
    return Target(files[0], cache, _config(files[0], cache))


def _config(settings: Document, cache: Cache | None) -> Config:
    if cache is not None and cache.config is not None:
        return cache.config
    return load_config(path=settings.key, content=settings.node.source, environ={})
