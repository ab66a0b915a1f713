"""The disk tier: where its directory is, how much of it there is, and who else is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lmcache_ext.manifests.bundle import Bundle
from lmcache_ext.manifests.caches import Cache, caches
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Node, put, remove, replace
from lmcache_ext.manifests.pods import Mount
from lmcache_ext.manifests.quantities import read_bytes, shown, write_gib

SPARE = 1.1  # files of the moment between two clearings


class Disk(NamedTuple):
    """One directory of one engine's disk tier."""

    cache: Cache
    path: str
    limit_bytes: int
    mount: Mount | None
    volume: Node | None

    @property
    def written(self) -> Node:
        """Where the directory is named, or the limit, or the container if neither is in sight."""
        settings = self.cache.settings
        names = ("local_disk", "remote_url", "local_device")
        found = next((node for name in names if settings and (node := settings.node.at(name))), None)
        return found or self.cache.container.own


def _disks(bundle: Bundle) -> Iterator[Disk]:
    for cache in caches(bundle):
        config = cache.config if cache.is_known else None
        for path in config.disk_paths if config is not None else ():
            mount = cache.container.mount_of(path)
            volume = cache.pod.volumes.get(mount.volume) if mount else None
            yield Disk(cache, path, config.live.disk_capacity_bytes or 0 if config else 0, mount, volume)


def _boolean(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        env = cache.container.env.get("LMCACHE_LOCAL_DISK")
        if env is not None and env.value is not None and env.value.lower() in ("true", "false"):
            yield Found(
                env.node, f"LMCACHE_LOCAL_DISK names a directory, and {env.value} is none", "write a path such as /kv"
            )


def _no_volume(bundle: Bundle) -> Iterator[Found]:
    for disk in _disks(bundle):
        if disk.mount is None and disk.cache.pod.complete and not disk.cache.pod.is_template:
            message = f"{disk.path} is in no volume"
            yield Found(disk.written, message, f"mount a volume at {disk.path}")


def _read_only(bundle: Bundle) -> Iterator[Found]:
    for disk in _disks(bundle):
        if disk.mount is not None and disk.mount.read_only:
            node = disk.mount.node.at("readOnly") or disk.mount.node
            yield Found(node, f"{disk.path} is mounted read-only", "leave out readOnly", remove(node))


def _too_small(disk: Disk, size: Node | None, what: str) -> Iterator[Found]:
    """Where a size is written, of `what`, that is less than the disk's limit."""
    have = read_bytes(size.text) if size is not None else None
    if size is None or have is None or have >= disk.limit_bytes:
        return
    better = write_gib(int(disk.limit_bytes * SPARE))
    message = f"{what} of {size.text} does not hold max_local_disk_size of {shown(disk.limit_bytes)}"
    yield Found(size, message, f"write {better}, or lower max_local_disk_size", replace(size, better), at_value=True)


def _empty_dir(bundle: Bundle) -> Iterator[Found]:
    for disk in _disks(bundle):
        directory = disk.volume.at("emptyDir") if disk.volume is not None else None
        limit = directory.at("sizeLimit") if directory is not None else None
        yield from _too_small(disk, limit, "an emptyDir")


def _in_memory(bundle: Bundle) -> Iterator[Found]:
    for disk in _disks(bundle):
        directory = disk.volume.at("emptyDir") if disk.volume is not None else None
        if directory is not None and directory.text_at("medium") == "Memory":
            message = f"{disk.path} is in memory"
            yield Found(directory, message, "leave out medium, or give max_local_cpu_size that memory")


def _ephemeral(bundle: Bundle) -> Iterator[Found]:
    for disk in _disks(bundle):
        on_node = disk.mount is None or (disk.volume is not None and disk.volume.at("emptyDir") is not None)
        if on_node:
            limit = disk.cache.container.resource("limits", "ephemeral-storage")
            yield from _too_small(disk, limit, "ephemeral-storage")


def _claim_of(bundle: Bundle, disk: Disk) -> Node | None:
    name = disk.volume.text_at("persistentVolumeClaim", "claimName") if disk.volume is not None else ""
    claim = bundle.find("PersistentVolumeClaim", name, disk.cache.pod.namespace) if name else None
    return claim.node if claim is not None else None


def _claim_small(bundle: Bundle) -> Iterator[Found]:
    for disk in _disks(bundle):
        claim = _claim_of(bundle, disk)
        size = claim.at("spec", "resources", "requests", "storage") if claim is not None else None
        yield from _too_small(disk, size, "a claim")


def _claim_once(bundle: Bundle) -> Iterator[Found]:
    for disk in _disks(bundle):
        claim = _claim_of(bundle, disk)
        modes = claim.at("spec", "accessModes") if claim is not None else None
        names = [item.text for item in modes.items()] if modes is not None else []
        if modes is not None and disk.cache.pod.replicas > 1 and names and "ReadWriteMany" not in names:
            first = next(iter(modes.items()))
            message = f"{disk.cache.pod.replicas} replicas share a claim of {', '.join(names)}"
            yield Found(first, message, "write ReadWriteMany", replace(first, "ReadWriteMany"), at_value=True)


def _unbounded(bundle: Bundle) -> Iterator[Found]:
    for disk in _disks(bundle):
        directory = disk.volume.at("emptyDir") if disk.volume is not None else None
        if directory is not None and directory.at("sizeLimit") is None and directory.text_at("medium") != "Memory":
            better = write_gib(int(disk.limit_bytes * SPARE))
            message = f"the emptyDir of {disk.path} has no sizeLimit"
            yield Found(directory, message, f"write sizeLimit: {better}", put(directory, "sizeLimit", better))


RULES = (
    Rule(
        "disk-boolean",
        "error",
        "the setting is a path; some charts write True and get a directory of that name",
        _boolean,
    ),
    Rule(
        "disk-no-volume",
        "warning",
        "what is written into the container is lost with it, and counts as ephemeral storage",
        _no_volume,
    ),
    Rule("disk-read-only", "error", "nothing can be stored there: every lookup would be a miss", _read_only),
    Rule(
        "emptydir-overflow", "error", "the kubelet evicts a pod whose emptyDir grows beyond its sizeLimit", _empty_dir
    ),
    Rule(
        "emptydir-memory",
        "warning",
        "it counts against the memory limit, twice for what is in host memory too",
        _in_memory,
    ),
    Rule("emptydir-unbounded", "warning", "nothing reserves the space: a node that fills up evicts pods", _unbounded),
    Rule(
        "ephemeral-overflow",
        "error",
        "the kubelet evicts a pod that writes more than its ephemeral-storage",
        _ephemeral,
    ),
    Rule("claim-small", "error", "the volume is full before the cache makes room: stores fail", _claim_small),
    Rule("claim-once", "warning", "replicas on other nodes cannot mount it and wait for ever", _claim_once),
)
