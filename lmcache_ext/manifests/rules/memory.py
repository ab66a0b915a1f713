"""Host memory: what the cache pins counts against the pod's limit and must fit /dev/shm."""

from __future__ import annotations

from collections.abc import Iterator

from lmcache_ext.manifests.bundle import Bundle
from lmcache_ext.manifests.caches import Cache, caches
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Edits, Node, add_item, insert, put, replace
from lmcache_ext.manifests.quantities import GIB, read_bytes, shown, write_gib

SHM = "/dev/shm"
DEFAULT_SHM_BYTES = 64 * 2**20  # of a container runtime
ENGINE_BYTES = 2 * GIB  # Python, vLLM and its workers, before any weights
SHM_SLACK_BYTES = GIB // 2  # vLLM's own queues are there too


def _pinned(bundle: Bundle) -> Iterator[tuple[Cache, int]]:
    for cache in caches(bundle):
        if cache.host_bytes:
            yield cache, cache.host_bytes


def said(cache: Cache) -> str:
    """Where the size was written, for a message."""
    node = cache.settings.node.at("max_local_cpu_size") if cache.settings else None
    size = shown(cache.host_bytes)
    return f"max_local_cpu_size of {size} ({node.place})" if node is not None else f"max_local_cpu_size of {size}"


def _limit(bundle: Bundle) -> Iterator[Found]:
    for cache, pinned in _pinned(bundle):
        limit = cache.container.resource("limits", "memory")
        have = read_bytes(limit.text) if limit is not None else None
        if limit is None or have is None or have >= pinned + ENGINE_BYTES:
            continue
        better = write_gib(pinned + 2 * ENGINE_BYTES)
        message = f"a memory limit of {limit.text} does not hold {said(cache)} and an engine"
        request = cache.container.resource("requests", "memory")
        both = request is not None and read_bytes(request.text) == have
        edits: Edits = (*replace(limit, better), *(replace(request, better) if both and request is not None else ()))
        yield Found(
            limit,
            message,
            f"write {better} and more for the weights, or lower max_local_cpu_size",
            edits,
            at_value=True,
        )


def _request(bundle: Bundle) -> Iterator[Found]:
    for cache, pinned in _pinned(bundle):
        request = cache.container.resource("requests", "memory")
        limit = cache.container.resource("limits", "memory")
        have = read_bytes(request.text) if request is not None else None
        if request is None or have is None or have >= pinned:
            continue
        enough = limit is not None and (read_bytes(limit.text) or 0) >= pinned + ENGINE_BYTES
        better = limit.text if limit is not None and enough else write_gib(pinned + 2 * ENGINE_BYTES)
        message = f"a memory request of {request.text} does not cover {said(cache)}"
        yield Found(request, message, f"write {better}", replace(request, better), at_value=True)


def _unsaid(bundle: Bundle) -> Iterator[Found]:
    for cache, pinned in _pinned(bundle):
        elsewhere = not cache.pod.complete and bool(cache.container.own.text_at("runtime"))
        said_here = any(cache.container.resource(part, "memory") for part in ("limits", "requests"))
        if cache.pod.is_template or elsewhere or said_here:
            continue
        better = write_gib(pinned + 2 * ENGINE_BYTES)
        edits = _say_memory(cache.container.own, better)
        message = f"no memory is asked for, with {said(cache)}"
        yield Found(
            cache.container.own, message, f"write requests and limits of {better} and more for the weights", edits
        )


def _say_memory(container: Node, size: str) -> Edits:
    resources = container.at("resources")
    both = {"requests": {"memory": size}, "limits": {"memory": size}}
    if resources is None:
        return insert(container, "resources", both)
    limits = resources.at("limits")
    return insert(limits, "memory", size) if limits is not None else insert(resources, "limits", both["limits"])


# --- /dev/shm -----------------------------------------------------------------------------


def _shm_volume(cache: Cache) -> Node | None:
    mount = cache.container.mount_of(SHM)
    return cache.pod.volumes.get(mount.volume) if mount is not None and mount.path == SHM else None


def _has_shm(cache: Cache) -> bool:
    return any(mount.path == SHM for mount in cache.container.mounts)


def _missing(bundle: Bundle, *, complete: bool) -> Iterator[Found]:
    for cache, pinned in _pinned(bundle):
        if cache.pod.is_template or cache.pod.complete != complete or pinned <= DEFAULT_SHM_BYTES or _has_shm(cache):
            continue
        size = write_gib(pinned + SHM_SLACK_BYTES)
        given = "nothing is mounted at /dev/shm" if complete else "no file given here mounts /dev/shm"
        fix = f"mount an emptyDir of medium Memory and sizeLimit {size} there"
        edits = _mount_shm(cache, size) if complete else ()  # a runtime may have it, under a name not known here
        yield Found(cache.container.own, f"{given}, with {said(cache)}", fix, edits)


def _mount_shm(cache: Cache, size: str) -> Edits:
    mount = add_item(cache.container.own, "volumeMounts", {"name": "dshm", "mountPath": SHM})
    volume = {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}
    return mount if "dshm" in cache.pod.volumes else (*mount, *add_item(cache.pod.spec, "volumes", volume))


def _shm_missing(bundle: Bundle) -> Iterator[Found]:
    return _missing(bundle, complete=True)


def _shm_unseen(bundle: Bundle) -> Iterator[Found]:
    return _missing(bundle, complete=False)


def _shm_small(bundle: Bundle) -> Iterator[Found]:
    for cache, pinned in _pinned(bundle):
        volume = _shm_volume(cache)
        limit = volume.at("emptyDir", "sizeLimit") if volume is not None else None
        have = read_bytes(limit.text) if limit is not None else None
        if limit is not None and have is not None and have < pinned:
            better = write_gib(pinned + SHM_SLACK_BYTES)
            message = f"/dev/shm of {limit.text} does not hold {said(cache)}"
            yield Found(limit, message, f"write {better}", replace(limit, better), at_value=True)


def _shm_on_disk(bundle: Bundle) -> Iterator[Found]:
    for cache, _ in _pinned(bundle):
        volume = _shm_volume(cache)
        directory = volume.at("emptyDir") if volume is not None else None
        if directory is not None and directory.text_at("medium") != "Memory":
            message = "/dev/shm is a directory on the node's disk"
            yield Found(directory, message, "write medium: Memory", put(directory, "medium", "Memory"))


RULES = (
    Rule(
        "memory-limit",
        "error",
        "shared memory counts against the limit of the container: it is killed once the cache fills",
        _limit,
    ),
    Rule("memory-request", "warning", "the scheduler places by requests: a node that is full kills the pod", _request),
    Rule(
        "memory-unsaid",
        "warning",
        "KServe's default is 2Gi, and without any the node's memory is the limit for all",
        _unsaid,
    ),
    Rule(
        "shm-missing",
        "error",
        "host memory is a file in /dev/shm, which has 64 MiB unless a volume is mounted there",
        _shm_missing,
    ),
    Rule(
        "shm-unseen",
        "note",
        "/dev/shm has 64 MiB unless the serving runtime mounts a volume there; check it together",
        _shm_unseen,
    ),
    Rule("shm-small", "error", "host memory is a file in /dev/shm: the start ends where it does not fit", _shm_small),
    Rule(
        "shm-medium",
        "error",
        "every hit would be read from the disk, and the kubelet evicts a pod that fills it",
        _shm_on_disk,
    ),
)
