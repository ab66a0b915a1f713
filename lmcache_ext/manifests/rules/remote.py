"""Where remote_url leads, seen from the pod: the Service, its port, and Sentinel's name for the master."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

from lmcache_ext.config_urls import split_url
from lmcache_ext.manifests.bundle import Bundle, Document
from lmcache_ext.manifests.caches import Cache, caches
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Node, replace

SENTINEL_PORT, REDIS_PORT = "26379", "6379"
DEFAULT_SERVICE = "redismaster"  # LMCache's, and ours
_SENTINELS = ("redis-sentinel", "valkey-sentinel")
_LOCAL = ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")
_MONITOR = re.compile(r"sentinel[ \t]+monitor[ \t]+(\S+)[ \t]")


class Remote(NamedTuple):
    """One remote_url, where it is written, and the engine it is for (None: not given)."""

    url: str
    node: Node
    namespace: str
    cache: Cache | None
    in_pod: bool


def _remotes(bundle: Bundle) -> Iterator[Remote]:
    seen = set()
    for cache in caches(bundle):
        node = cache.settings.node.at("remote_url") if cache.settings else None
        env = cache.container.env.get("LMCACHE_REMOTE_URL")
        node = node if node is not None else env.node.at("value") if env else None
        if node is not None and "://" in node.text:
            seen.add(node.raw)
            yield Remote(node.text, node, cache.pod.namespace, cache, True)
    for document in bundle.settings:
        node = document.node.at("remote_url")
        if node is not None and node.raw not in seen and "://" in node.text:
            holder = document.holder
            yield Remote(node.text, node, holder.namespace if holder else "", None, holder is not None)


def _localhost(bundle: Bundle) -> Iterator[Found]:
    for remote in _remotes(bundle):
        alone = remote.cache is None or len(remote.cache.pod.containers) == 1
        for host in split_url(remote.url).hosts if remote.in_pod and alone else ():
            name = host.rpartition(":")[0] or host
            if name in _LOCAL:
                message = f"{name} is the pod itself, and no server runs in it"
                yield Found(
                    remote.node,
                    message,
                    "write the name of a Service, such as redis.default.svc.cluster.local",
                    at_value=True,
                )


def _hosts(bundle: Bundle) -> Iterator[tuple[Remote, str, str, str]]:
    """(remote, service, namespace, port) for each host that can be a Service."""
    services = {service.name for service in bundle.of("Service")}
    for remote in _remotes(bundle):
        address = split_url(remote.url)
        default = SENTINEL_PORT if address.scheme in _SENTINELS else REDIS_PORT
        for host in address.hosts:
            name, _, port = host.partition(":")
            found = _service_of(name, services)
            if found is not None and name not in _LOCAL:
                yield remote, found[0], found[1] or remote.namespace, port or default


def _service_of(host: str, services: set[str]) -> tuple[str, str] | None:
    """(service, namespace or "") of a name within a cluster; the pod of a StatefulSet stands before its service."""
    labels = host.split(".")
    if "svc" in labels:
        labels = labels[: labels.index("svc")]
        return (labels[-2], labels[-1]) if len(labels) > 1 else None
    if len(labels) == 2:
        return (labels[1], "") if labels[1] in services else (labels[0], labels[1])
    return (labels[0], "") if len(labels) == 1 else None


def _ports(service: Document) -> list[str]:
    return [item.text_at("port") for item in service.node.items_at("spec", "ports")]


def _port(bundle: Bundle) -> Iterator[Found]:
    for remote, name, namespace, port in _hosts(bundle):
        service = bundle.find("Service", name, namespace)
        ports = _ports(service) if service is not None else []
        if not ports or port in ports:
            continue
        better = remote.url.replace(f":{port}", f":{ports[0]}", 1)
        edits = replace(remote.node, better) if len(ports) == 1 and better != remote.url else ()
        message = f"the Service {name} has no port {port}, it has {', '.join(ports)}"
        yield Found(remote.node, message, f"write port {ports[0]}", edits, at_value=True)


def _host(bundle: Bundle) -> Iterator[Found]:
    services = bundle.of("Service")
    for remote, name, namespace, _ in _hosts(bundle):
        if not services or bundle.find("Service", name, namespace):
            continue
        elsewhere = [each for each in services if each.name == name]
        near = difflib.get_close_matches(name, [each.name for each in services], n=1, cutoff=0.6)
        if elsewhere:
            other = elsewhere[0].namespace
            better = _with_host(remote.url, name, namespace, f"{name}.{other}")
            message = f"the Service {name} is in namespace {other}, not in {namespace}"
            yield Found(remote.node, message, f"write {name}.{other}", replace(remote.node, better), at_value=True)
        elif near:
            better = _with_host(remote.url, name, "", near[0])
            message = f"no Service given here is named {name}"
            yield Found(remote.node, message, f"did you mean {near[0]}?", replace(remote.node, better), at_value=True)


def _with_host(url: str, name: str, namespace: str, better: str) -> str:
    """The same URL with another service; only hosts are touched, not the scheme nor a password."""
    scheme, mark, rest = url.partition("://")
    login, at, hosts = rest.rpartition("@")
    written = f"{name}.{namespace}" if namespace and f"{name}.{namespace}" in hosts else name
    hosts = re.sub(rf"(?<![A-Za-z0-9.-]){re.escape(written)}(?![A-Za-z0-9-])", better, hosts, count=1)
    return scheme + mark + login + at + hosts


# --- Sentinel -----------------------------------------------------------------------------


def _monitored(bundle: Bundle) -> str | None:
    """The master's name by the ``sentinel monitor`` line of a given manifest, if there is just one."""
    names = set()
    for document in bundle.documents:
        if document.kind in ("ConfigMap", "Secret", "StatefulSet", "Deployment"):
            names |= {name for node in document.node.walk() if node.is_scalar for name in _MONITOR.findall(node.text)}
    return names.pop() if len(names) == 1 else None


def _service_name(remote: Remote) -> str | None:
    """The name a client asks the sentinels for; None where the default applies."""
    path = split_url(remote.url).path.strip("/").partition("/")[0]
    query = re.search(r"[?&](?:service|sentinel_service)=([^&]+)", remote.url)
    env = remote.cache.container.env.get("REDIS_SERVICE_NAME") if remote.cache else None
    by_path = path if path and not path.isdecimal() else None
    return query[1] if query else by_path or (env.value if env and env.value else None)


def _sentinel(bundle: Bundle) -> Iterator[Found]:
    monitored = _monitored(bundle)
    for remote in _remotes(bundle):
        if split_url(remote.url).scheme not in _SENTINELS:
            continue
        name = _service_name(remote)
        if (name or DEFAULT_SERVICE) == monitored or (name is not None and monitored is None):
            continue
        said = f"it asks for {name}" if name else f"it names no service, and {DEFAULT_SERVICE} is assumed"
        known = f", while the sentinels given here watch {monitored}" if monitored else ""
        better = monitored or "the name in your 'sentinel monitor' line (mymaster in Redis's own example)"
        edits = (
            replace(remote.node, f"{_without_path(remote.url)}/{monitored}")
            if monitored and "?" not in remote.url
            else ()
        )
        yield Found(remote.node, f"{said}{known}", f"write .../{better} behind the hosts", edits, at_value=True)


def _without_path(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    return scheme + mark + rest.partition("/")[0]


def _sentinel_port(bundle: Bundle) -> Iterator[Found]:
    for remote in _remotes(bundle):
        address = split_url(remote.url)
        for host in address.hosts if address.scheme in _SENTINELS else ():
            if host.endswith(f":{REDIS_PORT}"):
                better = remote.url.replace(host, host.removesuffix(REDIS_PORT) + SENTINEL_PORT, 1)
                message = f"{host} has Redis's port, where sentinels are expected"
                yield Found(
                    remote.node, message, f"write port {SENTINEL_PORT}", replace(remote.node, better), at_value=True
                )


RULES = (
    Rule(
        "remote-localhost", "error", "each container's localhost is its own: every fetch would be refused", _localhost
    ),
    Rule("remote-port", "error", "a Service answers at its own port, whatever the container's is", _port),
    Rule(
        "remote-host", "error", "the name does not resolve: every fetch would fail and the cache go without it", _host
    ),
    Rule(
        "sentinel-service",
        "warning",
        "sentinels answer nothing to a name they do not watch: there is no master then",
        _sentinel,
    ),
    Rule("sentinel-port", "error", "a Redis server does not know SENTINEL: the master is never found", _sentinel_port),
)
