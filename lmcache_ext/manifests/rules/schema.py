"""What the API server refuses, or takes for something else."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

import yaml

from lmcache_ext.config_urls import is_secret
from lmcache_ext.config_values import MASK
from lmcache_ext.manifests.bundle import FILE, HELM, LMCACHE, REQUEST, UNKNOWN, URL, Bundle, Document
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.guides import is_guide
from lmcache_ext.manifests.nodes import Edits, Node, quote, remove, rename, replace
from lmcache_ext.manifests.pods import ENGINE_CONTAINER, RUNTIMES
from lmcache_ext.manifests.quantities import read_bytes

API_VERSIONS = {
    "InferenceService": "serving.kserve.io/v1beta1",
    **dict.fromkeys(RUNTIMES, "serving.kserve.io/v1alpha1"),
    **dict.fromkeys(("Deployment", "StatefulSet", "DaemonSet"), "apps/v1"),
    **dict.fromkeys(("ConfigMap", "Secret", "Service", "PersistentVolumeClaim", "Pod", "Namespace"), "v1"),
    "ServiceAccount": "v1",
    **dict.fromkeys(("Job", "CronJob"), "batch/v1"),
    **dict.fromkeys(("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"), "rbac.authorization.k8s.io/v1"),
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}
_NOT_OBJECTS = (HELM, LMCACHE, REQUEST, URL, FILE, UNKNOWN)
_STRING_LISTS = ("command", "args")
_STRING_MAPS = ("labels", "annotations", "matchLabels", "nodeSelector", "stringData", "data")
_RESOURCE = re.compile(r"cpu|memory|ephemeral-storage|storage|hugepages-[0-9A-Za-z]+|[^/]+/[^/]+")
_SIZES = ("memory", "ephemeral-storage", "storage")


def _objects(bundle: Bundle) -> Iterator[Document]:
    return (document for document in bundle.documents if document.kind not in _NOT_OBJECTS)


def _api_version(bundle: Bundle) -> Iterator[Found]:
    for document in _objects(bundle):
        kind = document.node.at("kind")
        if kind is None or document.node.at("apiVersion") is not None:
            continue
        version = API_VERSIONS.get(document.kind)
        line = f"apiVersion: {version}" if version else "apiVersion"
        yield Found(kind, f"{document.kind} has no apiVersion", f"write {line}", _first(document.node, version))


def _first(node: Node, version: str | None) -> Edits:
    """Write ``apiVersion`` above the first key of a block mapping."""
    raw = node.raw
    if version is None or not isinstance(raw, yaml.MappingNode) or raw.flow_style or not raw.value:
        return ()
    mark = raw.value[0][0].start_mark
    return node.window.edit(mark.index, mark.index, f"apiVersion: {version}\n{' ' * mark.column}")


def _duplicates(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.documents:
        if document.holder is not None:
            continue  # the setting is refused by name there
        for node in document.node.walk():
            seen: dict[str, Node] = {}
            for pair in node.pairs():
                if pair.name in seen:
                    line = seen[pair.name].place.line
                    yield Found(pair, f"{pair.name} is written twice, in line {line} too", "keep one of them")
                seen[pair.name] = pair


def _strings(bundle: Bundle) -> Iterator[Found]:
    for document in _objects(bundle):
        for node in document.node.walk():
            for item in _string_values(node, document):
                if item.is_scalar and not item.is_string and not item.is_null:
                    where = item.name or node.name
                    text = MASK if document.kind == "Secret" or is_secret(where) else item.text
                    fix = f'put it in quotes: "{text}"'
                    message = f"{where} takes strings, and {text} is none"
                    yield Found(item, message, fix, quote(item), at_value=True)


def _string_values(node: Node, document: Document) -> Iterator[Node]:
    if node.name in _STRING_LISTS:
        yield from node.items()
    elif node.name == "data" and document.kind not in ("ConfigMap", "Secret"):
        return
    elif node.name in _STRING_MAPS:
        yield from node.pairs()
    elif node.name == "env":
        for item in node.items():
            value = item.at("value")
            if value is not None:
                yield value


def _resource_parts(bundle: Bundle) -> Iterator[Node]:
    """Every ``resources.limits`` and ``resources.requests``, of Helm values too."""
    for document in bundle.documents:
        if document.kind in (LMCACHE, REQUEST, UNKNOWN):
            continue
        for node in document.node.walk():
            if node.name == "resources":
                yield from (pair for pair in node.pairs() if pair.name in ("limits", "requests"))


def _resource_names(bundle: Bundle) -> Iterator[Found]:
    for part in _resource_parts(bundle):
        for item in part.pairs():
            if _RESOURCE.fullmatch(item.name):
                continue
            name = _meant(item.name)
            edits = () if name is None else remove(item) if part.at(name) else rename(item, name)
            yield Found(item, f"{item.name} is not the name of a resource", f"write {name or 'vendor/name'}", edits)


def _meant(name: str) -> str | None:
    if name.lower() in ("cpu", "memory"):
        return name.lower()
    if name.lower() in ("gpu", "nvidia"):
        return "nvidia.com/gpu"
    domain, dot, rest = name.rpartition(".")
    return f"{domain}/{rest}" if dot and "." in domain else None


def _quantities(bundle: Bundle) -> Iterator[Found]:
    for part in _resource_parts(bundle):
        for item in part.pairs():
            if item.name not in _SIZES or not item.is_scalar or read_bytes(item.text) is not None:
                continue
            unit = re.fullmatch(r"([0-9.]+) ?([KMGT])(i?)B", item.text)
            edits = replace(item, f"{unit[1]}{unit[2]}{unit[3]}") if unit else ()
            fix = f"write {unit[1]}{unit[2]}{unit[3]}" if unit else "write a quantity such as 24Gi"
            yield Found(item, f"{item.text} is not a quantity of Kubernetes", fix, edits, at_value=True)


def _devices(bundle: Bundle) -> Iterator[Found]:
    for part in _resource_parts(bundle):
        limits = part.parent.at("limits") if part.parent is not None and part.name == "requests" else None
        for item in part.pairs() if part.name == "requests" else ():
            if "/" not in item.name:
                continue
            limit = limits.at(item.name) if limits else None
            if limit is None:
                yield Found(item, f"{item.name} is requested without a limit", "write the same number under limits")
            elif limit.text != item.text:
                message = f"{item.text} of {item.name} requested, and the limit is {limit.text}"
                yield Found(item, message, f"write {limit.text}", replace(item, limit.value()), at_value=True)


def _container_name(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.of(*RUNTIMES):
        containers = document.node.at("spec", "containers")
        names = [item.at("name") for item in containers.items()] if containers else []
        if not names or any(name is not None and name.text == ENGINE_CONTAINER for name in names):
            continue
        name = names[0] if len(names) == 1 else None
        edits = replace(name, ENGINE_CONTAINER) if name is not None else ()
        where = name or containers or document.node
        yield Found(where, f"no container is named {ENGINE_CONTAINER}", f"name it {ENGINE_CONTAINER}", edits)


def _unknown_document(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.of(UNKNOWN):
        if document.node.is_mapping and not is_guide(document.node.window.file.name):
            message = "neither a manifest, an LMCache file, Helm values nor a request: nothing is checked here"
            yield Found(document.node, message, "name the file that was meant")


def _kind(bundle: Bundle) -> Iterator[Found]:
    for document in _objects(bundle):
        near = difflib.get_close_matches(document.kind, API_VERSIONS, n=1, cutoff=0.85)
        kind = document.node.at("kind")
        ours = document.node.text_at("apiVersion") == API_VERSIONS.get(near[0]) if near else False
        if kind is not None and near and document.kind not in API_VERSIONS and ours:
            message = f"there is no kind {document.kind} of {API_VERSIONS[near[0]]}"
            yield Found(kind, message, f"write {near[0]}", replace(kind, near[0]), at_value=True)


RULES = (
    Rule("unknown-document", "note", "a document is known by its kind or by its keys", _unknown_document),
    Rule("kind", "error", "the API server knows kinds by letter and case", _kind),
    Rule(
        "api-version",
        "error",
        "kubectl refuses an object without one; it says by which schema the rest is read",
        _api_version,
    ),
    Rule("duplicate-key", "error", "only the last of them is read, the others are lost without a word", _duplicates),
    Rule("not-a-string", "error", "the API server refuses numbers and booleans where its schema has strings", _strings),
    Rule(
        "resource-name",
        "error",
        "a resource that is not the kubelet's own is vendor/name; any other name is refused by the API server",
        _resource_names,
    ),
    Rule("quantity", "error", "Ki Mi Gi Ti are powers of 1024 and K M G T of 1000, without a B", _quantities),
    Rule(
        "device-limit", "error", "devices cannot be shared: request and limit must be equal, or only limits", _devices
    ),
    Rule(
        "container-name", "error", "KServe merges an InferenceService into the container of that name", _container_name
    ),
)
