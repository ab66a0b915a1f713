"""From the ConfigMap to the file the engine opens: every step can miss the next."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from lmcache_ext.manifests.bundle import Bundle, same_namespace
from lmcache_ext.manifests.caches import FILE_VARIABLE, Cache, caches
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Edits, Node, add_item, remove, replace
from lmcache_ext.manifests.pods import Container, Mount, Pod, pods


def _with_file(bundle: Bundle) -> Iterator[tuple[Cache, Node, str]]:
    """Each cache that is told to read a file, with the variable and the path in it."""
    for cache in caches(bundle):
        if cache.file is not None and cache.file.value:
            yield cache, cache.file.node, cache.file.value


def _not_mounted(bundle: Bundle) -> Iterator[Found]:
    for cache, node, path in _with_file(bundle):
        if cache.mount is not None or not (cache.pod.complete or cache.pod.volumes):
            continue
        volume = _config_volume(cache)
        message = f"{path} is in no volume of {cache.container.name}"
        mount = {"name": volume or "lmcache-config", "mountPath": posixpath.dirname(path), "readOnly": True}
        edits = add_item(cache.container.own, "volumeMounts", mount) if volume else ()
        fix = f"mount the ConfigMap at {posixpath.dirname(path)}"
        yield Found(node, message, fix, edits)


def _config_volume(cache: Cache) -> str | None:
    """The volume that holds the ConfigMap, if there is just one to choose from."""
    names = [name for name, node in cache.pod.volumes.items() if node.at("configMap")]
    mounted = {mount.volume for mount in cache.container.mounts}
    free = [name for name in names if name not in mounted]
    return free[0] if len(free) == 1 else None


def _wrong_path(bundle: Bundle) -> Iterator[Found]:
    for cache, node, path in _with_file(bundle):
        mount, files = cache.mount, cache.mounted_files
        if mount is None or mount.sub_path or not files:
            continue
        within = posixpath.relpath(path, mount.path)
        if within in files:
            continue
        better = posixpath.join(mount.path, next(iter(files))) if len(files) == 1 else ""
        value = node.at("value")
        edits = replace(value, better) if better and value is not None else ()
        message = f"{path} is not in the mounted volume, which has {', '.join(files)}"
        yield Found(value or node, message, f"write {better or 'one of these'}", edits, at_value=value is not None)


def _key_missing(bundle: Bundle) -> Iterator[Found]:
    for pod in pods(bundle):
        for volume in pod.volumes.values():
            name = volume.text_at("configMap", "name")
            config_map = bundle.find("ConfigMap", name, pod.namespace) if name else None
            keys = [pair.name for pair in config_map.node.pairs_at("data")] if config_map else []
            for item in volume.items_at("configMap", "items"):
                key = item.at("key")
                if not keys or key is None or key.text in keys:
                    continue
                edits = replace(key, keys[0]) if len(keys) == 1 else ()
                message = f"the ConfigMap {name} has no key {key.text}, it has {', '.join(keys)}"
                yield Found(key, message, f"write {keys[0] if len(keys) == 1 else 'one of these'}", edits, True)


def _sub_path(bundle: Bundle) -> Iterator[Found]:
    for pod in pods(bundle):
        for container in pod.containers:
            for mount in container.mounts:
                volume = pod.volumes.get(mount.volume)
                if mount.sub_path and volume is not None and volume.at("configMap"):
                    yield _found_sub_path(container, mount)


def _found_sub_path(container: Container, mount: Mount) -> Found:
    sub_path = mount.node.at("subPath") or mount.node.at("subPathExpr")
    path = mount.node.at("mountPath")
    folder = posixpath.dirname(mount.path)
    edits: Edits = ()
    only = container.mount_of(folder) is None and posixpath.basename(mount.path) == mount.sub_path
    if sub_path is not None and path is not None and only and folder != "/":
        edits = (*remove(sub_path), *replace(path, folder))
    return Found(
        sub_path or mount.node, "a ConfigMap is mounted by subPath", f"mount it as a directory: {folder}", edits
    )


def _file_unset(bundle: Bundle) -> Iterator[Found]:
    """A ConfigMap with an LMCache file is mounted into an engine that is not told to read it."""
    for cache in caches(bundle):
        if cache.file is not None or (not cache.pod.complete and cache.pod.document.kind != "InferenceService"):
            continue
        for mount in cache.container.mounts:
            path = _mounted_settings(bundle, cache.pod, mount)
            if path:
                edits = add_item(cache.container.own, "env", {"name": FILE_VARIABLE, "value": path})
                message = f"{path} is mounted, and {FILE_VARIABLE} does not name it"
                yield Found(mount.node, message, f"set {FILE_VARIABLE} to {path}", edits)


def _mounted_settings(bundle: Bundle, pod: Pod, mount: Mount) -> str | None:
    volume = pod.volumes.get(mount.volume)
    name = volume.text_at("configMap", "name") if volume else ""
    config_map = bundle.find("ConfigMap", name, pod.namespace) if name else None
    settings = bundle.settings_in(config_map) if config_map else []
    return posixpath.join(mount.path, settings[0].key) if len(settings) == 1 else None


def _volume_undefined(bundle: Bundle) -> Iterator[Found]:
    for pod in pods(bundle):
        claims = pod.document.node.items_at("spec", "volumeClaimTemplates")
        known = {*pod.volumes, *(item.text_at("metadata", "name") for item in claims)}
        for container in pod.containers if pod.complete else ():
            for mount in container.mounts:
                if mount.volume not in known:
                    volume = mount.node.at("name") or mount.node
                    fix = f"add it under volumes, or name one of {', '.join(sorted(known)) or 'those there'}"
                    yield Found(volume, f"no volume is named {mount.volume}", fix, at_value=True)


def _namespace(bundle: Bundle) -> Iterator[Found]:
    for pod in pods(bundle):
        for volume in pod.volumes.values():
            name = volume.at("configMap", "name")
            if name is None or bundle.find("ConfigMap", name.text, pod.namespace):
                continue
            others = [each for each in bundle.of("ConfigMap") if each.name == name.text]
            others = [each for each in others if not same_namespace(each.namespace, pod.namespace)]
            for other in others[:1]:
                at = other.node.at("metadata", "namespace") or other.node
                message = (
                    f"the ConfigMap {name.text} is in namespace {other.namespace}, its pods are in {pod.namespace}"
                )
                yield Found(at, message, f"write {pod.namespace}", replace(at, pod.namespace), at_value=True)


def _secret_key(bundle: Bundle) -> Iterator[Found]:
    for pod in pods(bundle):
        for container in pod.containers:
            for env in container.env.values():
                ref = env.node.at("valueFrom", "secretKeyRef")
                secret = bundle.find("Secret", ref.text_at("name"), pod.namespace) if ref else None
                parts = ("data", "stringData") if secret else ()
                keys = [pair.name for part in parts for pair in secret.node.pairs_at(part)] if secret else []
                key = ref.at("key") if ref else None
                if secret is None or key is None or key.text in keys:
                    continue
                edits = replace(key, keys[0]) if len(keys) == 1 else ()
                message = f"the Secret {secret.name} has no key {key.text}, it has {', '.join(keys) or 'none'}"
                yield Found(key, message, f"write {keys[0] if len(keys) == 1 else 'one it has'}", edits, True)


RULES = (
    Rule(
        "config-not-mounted",
        "error",
        "the start ends where the file that LMCACHE_CONFIG_FILE names is not there",
        _not_mounted,
    ),
    Rule(
        "config-path",
        "error",
        "the key of the ConfigMap is the name of the file; another path does not exist",
        _wrong_path,
    ),
    Rule(
        "config-key", "error", "a pod does not start while an item names a key that the ConfigMap lacks", _key_missing
    ),
    Rule(
        "config-subpath",
        "warning",
        "the kubelet never updates what is mounted by subPath: no change would arrive",
        _sub_path,
    ),
    Rule("config-unread", "error", "without the variable the defaults apply, and nothing says so", _file_unset),
    Rule(
        "volume-undefined", "error", "the API server refuses a mount of a volume that is not there", _volume_undefined
    ),
    Rule(
        "config-namespace",
        "error",
        "a pod can only mount ConfigMaps of its own namespace, and waits for ever",
        _namespace,
    ),
    Rule("secret-key", "error", "a pod does not start while a variable names a key that the Secret lacks", _secret_key),
)
