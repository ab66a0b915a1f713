"""Cache servers and Redis as manifests: bounded, reachable, one of them, started by a command that exists."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lmcache_ext.manifests.bundle import Bundle
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Edits, Node, insert, replace
from lmcache_ext.manifests.pods import Container, Pod, pods
from lmcache_ext.manifests.quantities import GIB, read_bytes, shown, write_gib

_STORE_IMAGE = re.compile(r"(?:^|/)(redis|valkey)(?:[:@]|$)|/(redis|valkey)[^/]*$")
_LM_COMMANDS = ("lmcache_server", "lmcache_experimental_server")
_OWN_IMAGE = "kserve-lmcache-runtime"  # has both names of the command
DEFAULT_LIMIT = "8Gi"


def _is_store(container: Container) -> bool:
    """Redis or Valkey itself: not a sentinel, an exporter or a client."""
    image = container.own.text_at("image")
    words = " ".join(arg.text for arg in container.args)
    return (
        bool(_STORE_IMAGE.search(image)) and "sentinel" not in words and "-cli" not in words and "exporter" not in image
    )


def _is_lm(container: Container) -> bool:
    return any(arg.text.rpartition("/")[2] in _LM_COMMANDS for arg in container.args)


def _servers(bundle: Bundle) -> Iterator[tuple[Pod, Container]]:
    for pod in pods(bundle):
        for container in pod.containers:
            if _is_store(container) or _is_lm(container):
                yield pod, container


def _max_memory(container: Container) -> str | None:
    """What ``--maxmemory`` says; "" where a file or a script may say it."""
    words = [arg.text for arg in container.args]
    if "--maxmemory" in words[:-1]:
        return words[words.index("--maxmemory") + 1]
    plain = not words or words[0].endswith("-server") or words[0].startswith("--")
    return None if plain and not any(word.endswith(".conf") or "--maxmemory" in word for word in words) else ""


def _redis_unbounded(bundle: Bundle) -> Iterator[Found]:
    for _, container in _servers(bundle):
        if not _is_store(container) or _max_memory(container) is not None:
            continue
        limit = container.resource("limits", "memory")
        limit_bytes = read_bytes(limit.text) if limit is not None else None
        size = f"{max(1, (limit_bytes or 8 * GIB) * 3 // 4 // 2**20)}mb"
        server = "valkey-server" if "valkey" in container.own.text_at("image") else "redis-server"
        words = [server, "--maxmemory", size, "--maxmemory-policy", "allkeys-lru"]
        edits = insert(container.own, "args", words) if not container.args else ()
        yield Found(container.own, "the store has no maxmemory", f"start it with {' '.join(words)}", edits)


def _redis_policy(bundle: Bundle) -> Iterator[Found]:
    for _, container in _servers(bundle):
        words = [arg.text for arg in container.args]
        if not _is_store(container) or "--maxmemory" not in words:
            continue
        policy = words[words.index("--maxmemory-policy") + 1] if "--maxmemory-policy" in words[:-1] else "noeviction"
        if not policy.startswith("allkeys-"):
            yield Found(container.own, f"maxmemory-policy is {policy}", "add --maxmemory-policy allkeys-lru")


def _redis_over_limit(bundle: Bundle) -> Iterator[Found]:
    for _, container in _servers(bundle):
        limit = container.resource("limits", "memory")
        have = read_bytes(limit.text) if limit is not None else None
        want = _redis_bytes(_max_memory(container) or "") if _is_store(container) else None
        if limit is not None and have is not None and want is not None and have <= want:
            better = write_gib(want * 4 // 3)
            message = f"a limit of {limit.text} does not hold a maxmemory of {shown(want)}"
            yield Found(limit, message, f"write {better}", replace(limit, better), at_value=True)


def _redis_bytes(text: str) -> int | None:
    found = re.fullmatch(r"([0-9]+)([kmg]?)(b?)", text.lower())
    if found is None:
        return None
    base = 1024 if found[3] else 1000
    factor: int = base ** ("kmg".find(found[2]) + 1 if found[2] else 0)
    return int(found[1]) * factor


def _no_limit(bundle: Bundle) -> Iterator[Found]:
    for _, container in _servers(bundle):
        if container.resource("limits", "memory") is not None:
            continue
        resources = container.own.at("resources")
        limits = resources.at("limits") if resources is not None else None
        edits: Edits = insert(container.own, "resources", {"limits": {"memory": DEFAULT_LIMIT}})
        if resources is not None:
            edits = insert(resources, "limits", {"memory": DEFAULT_LIMIT})
        if limits is not None:
            edits = insert(limits, "memory", DEFAULT_LIMIT)
        yield Found(
            container.own, "the server has no memory limit", f"write resources.limits.memory: {DEFAULT_LIMIT}", edits
        )


def _replicas(bundle: Bundle) -> Iterator[Found]:
    for pod, container in _servers(bundle):
        count = pod.document.node.at("spec", "replicas")
        clustered = any("cluster" in arg.text or "replicaof" in arg.text for arg in container.args)
        if pod.document.kind == "Deployment" and count is not None and pod.replicas > 1 and not clustered:
            message = f"{count.text} servers behind one Service, each with a cache of its own"
            fix = "write 1, or a StatefulSet whose pods remote_url lists one by one"
            yield Found(count, message, fix, replace(count, 1), at_value=True)


def _old_command(bundle: Bundle) -> Iterator[Found]:
    for _, container in _servers(bundle):
        for arg in container.args:
            image = container.own.text_at("image") or "the image"
            if arg.text == "lmcache_experimental_server" and _OWN_IMAGE not in image:
                message = f"{image} may have no {arg.text}"
                yield Found(arg.node, message, "write lmcache_server", replace(arg.node, "lmcache_server"))


def _target(bundle: Bundle) -> Iterator[Found]:
    for service in bundle.of("Service"):
        for pod in pods(bundle):
            ports = [port for container in pod.containers for port in container.own.items_at("ports")]
            if not ports or not _selects(service.node, pod):
                continue
            known = {port.text_at(name) for port in ports for name in ("containerPort", "name")}
            for port in service.node.items_at("spec", "ports"):
                target = port.at("targetPort") or port.at("port")
                if target is not None and not target.is_null and target.text not in known:
                    yield _found_target(pod, target, ports)


def _selects(service: Node, pod: Pod) -> bool:
    wanted = {(pair.name, pair.text) for pair in service.pairs_at("spec", "selector")}
    labels = pod.document.node.pairs_at("spec", "template", "metadata", "labels")
    return bool(wanted) and wanted <= {(pair.name, pair.text) for pair in labels}


def _found_target(pod: Pod, target: Node, ports: list[Node]) -> Found:
    first = ports[0].at("containerPort")
    only = len(ports) == 1 and first is not None and target.name == "targetPort"
    edits = replace(target, first.value()) if only and first is not None else ()
    message = f"no container of {pod.document.name} has a port {target.text}"
    return Found(target, message, f"write {first.text if first is not None else 'its port'}", edits, at_value=True)


def _forgets(bundle: Bundle) -> Iterator[Found]:
    for pod, container in _servers(bundle):
        lasting = any(volume.at("persistentVolumeClaim") for volume in pod.volumes.values())
        if not lasting and not any(pod.document.node.items_at("spec", "volumeClaimTemplates")):
            fix = "a StatefulSet with a claim, and --data-dir or Redis's save, keeps it"
            yield Found(container.own, f"{container.name} forgets everything with its pod", fix)


def _latest(bundle: Bundle) -> Iterator[Found]:
    for pod in pods(bundle):
        for container in pod.containers:
            image = container.own.at("image")
            if image is not None and "@" not in image.text:
                tag = image.text.rpartition("/")[2].partition(":")[2]
                if tag in ("", "latest"):
                    yield Found(image, f"{image.text} is another image every time", "name a version", at_value=True)


RULES = (
    Rule(
        "redis-unbounded",
        "warning",
        "without maxmemory it grows until the node or its limit kills it, and all is lost",
        _redis_unbounded,
    ),
    Rule("redis-policy", "warning", "a store that evicts nothing refuses what is new once it is full", _redis_policy),
    Rule("redis-over-limit", "error", "it is killed before it starts to evict", _redis_over_limit),
    Rule(
        "server-unbounded",
        "warning",
        "a cache takes what it gets: without a limit that is the node's memory",
        _no_limit,
    ),
    Rule("server-replicas", "error", "a lookup asks one of them at random: most are misses", _replicas),
    Rule(
        "server-command",
        "warning",
        "LMCache dropped that command: it is lmcache_server in its images (this package's have both)",
        _old_command,
    ),
    Rule("service-port", "error", "the Service passes to a port where nothing listens", _target),
    Rule("server-forgets", "note", "after a restart every prompt is computed once more", _forgets),
    Rule("image-latest", "note", "what is tested today is not what starts tomorrow", _latest),
)
