"""production-stack's Helm values: what its chart ignores, drops or does the opposite of."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from lmcache_ext.manifests import chart
from lmcache_ext.manifests.bundle import HELM, Bundle
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Edits, Node, insert, put, remove, rename, replace
from lmcache_ext.manifests.quantities import GIB, read_bytes, shown, write_gib

ENGINE_BYTES = 2 * GIB
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_WITH_UNIT = re.compile(r"([0-9.]+) ?([KMGT]i?)B?")


def _values(bundle: Bundle) -> Iterator[Node]:
    return (document.node for document in bundle.of(HELM))


def _models(bundle: Bundle) -> Iterator[Node]:
    for values in _values(bundle):
        yield from chart.models(values)


def _caches(bundle: Bundle) -> Iterator[Node]:
    """The lmcacheConfig of each model, and lmCacheConfig of the operator's VLLMRuntime."""
    for model in _models(bundle):
        if (section := model.at("lmcacheConfig")) is not None:
            yield section
    for document in bundle.of("VLLMRuntime"):
        if (section := document.node.at("spec", "lmCacheConfig")) is not None:
            yield section


def _unknown(bundle: Bundle) -> Iterator[Found]:
    for values in _values(bundle):
        for pair, known in chart.unknown_keys(values):
            near = difflib.get_close_matches(pair.name, known, n=1, cutoff=0.7)
            edits = (
                rename(pair, near[0]) if near and pair.parent is not None and pair.parent.at(near[0]) is None else ()
            )
            yield Found(
                pair, f"the chart knows no {pair.name}", f"did you mean {near[0]}?" if near else "leave it out", edits
            )


def _server_off(bundle: Bundle) -> Iterator[Found]:
    for values in _values(bundle):
        section = values.at("cacheserverSpec")
        if section is not None and section.is_mapping and chart.is_old_cache_server(section):
            yield Found(
                section, "no cache server is started by this", "write enabled: true", insert(section, "enabled", True)
            )


def _server_image(bundle: Bundle) -> Iterator[Found]:
    for values in _values(bundle):
        section = values.at("cacheserverSpec")
        for name in ("repository", "tag") if section is not None and section.at("image") is None else ():
            flat = section.at(name) if section is not None else None
            if flat is None or section is None:
                continue
            other = section.at("tag" if name == "repository" else "repository")
            image = {name: flat.value()} | ({other.name: other.value()} if other is not None else {})
            edits = (*rename(flat, "image"), *replace(flat, image)) if name == "repository" or other is None else ()
            yield Found(flat, f"cacheserverSpec.{name} is ignored", f"write image.{name}", edits)


def _server_image_rest(bundle: Bundle) -> Iterator[Found]:
    for values in _values(bundle):
        section = values.at("cacheserverSpec")
        for name in ("repository", "tag") if section is not None and section.at("image") is not None else ():
            flat = section.at(name) if section is not None else None
            if flat is not None:
                yield Found(flat, f"cacheserverSpec.{name} is ignored beside image", "leave it out", remove(flat))


def _server_replicas(bundle: Bundle) -> Iterator[Found]:
    for values in _values(bundle):
        count = values.at("cacheserverSpec", "replicaCount")
        if count is not None and count.text.isdigit() and int(count.text) > 1:
            message = f"{count.text} cache servers behind one Service, each with a cache of its own"
            yield Found(count, message, "write 1", replace(count, 1), at_value=True)


def _server_serde(bundle: Bundle) -> Iterator[Found]:
    for values in _values(bundle):
        section = values.at("cacheserverSpec")
        if section is None or not chart.is_on(section) or not section.is_mapping:
            continue
        serde = section.at("serde")
        if serde is None or not serde.text.strip():
            yield Found(
                serde or section, "the cache server has no serde", "write serde: naive", put(section, "serde", "naive")
            )


def _size(section: Node, name: str) -> tuple[Node | None, str]:
    node = section.at(name)
    return node, node.text.strip() if node is not None else ""


def _fraction(bundle: Bundle) -> Iterator[Found]:
    for section in _caches(bundle):
        node, text = _size(section, "cpuOffloadingBufferSize")
        if node is not None and _NUMBER.fullmatch(text) and 0 < float(text) < 1:
            yield Found(node, f"{text} is 0 to the chart", 'write "1"', replace(node, "1"), at_value=True)


def _unit(bundle: Bundle) -> Iterator[Found]:
    for section in _caches(bundle):
        for name in ("cpuOffloadingBufferSize", "diskOffloadingBufferSize"):
            node, text = _size(section, name)
            unit = _WITH_UNIT.fullmatch(text)
            size = read_bytes(unit[1] + unit[2]) if unit else None
            if node is not None and size is not None:
                better = f"{size / GIB:.4g}"
                yield Found(
                    node, f"{name}: {text} has a unit", f'write "{better}"', replace(node, better), at_value=True
                )


def _disk_path(bundle: Bundle) -> Iterator[Found]:
    for model in _models(bundle):
        size = model.at("lmcacheConfig", "diskOffloadingBufferSize")
        names = [item.text_at("name") for item in model.items_at("env")]
        if size is not None and size.text not in ("", "0") and "LMCACHE_LOCAL_DISK" not in names:
            fix = "add the variable LMCACHE_LOCAL_DISK with a path, and a volume there"
            yield Found(size, "a size of disk and no directory", fix)


def _split(bundle: Bundle) -> Iterator[Found]:
    for section in _caches(bundle):
        node = section.at("enablePD")
        if node is not None and node.text.lower() == "false":
            yield Found(
                node, "enablePD: false switches on arguments of prefill and decode", "leave it out", remove(node)
            )


def _prefix(bundle: Bundle) -> Iterator[Found]:
    for model in _models(bundle):
        config = model.at("vllmConfig")
        if config is not None and config.is_mapping and config.at("enablePrefixCaching") is None:
            edits = insert(config, "enablePrefixCaching", True)
            yield Found(config, "enablePrefixCaching is not written", "write enablePrefixCaching: true", edits)


def _prefix_off(bundle: Bundle) -> Iterator[Found]:
    for model in _models(bundle):
        node = model.at("vllmConfig", "enablePrefixCaching")
        if node is not None and node.text.lower() == "false":
            yield Found(node, "vLLM's own prefix cache is off", "write true, unless you measure the other tiers")


def _version(bundle: Bundle) -> Iterator[Found]:
    for model in _models(bundle):
        for name, old in (("v1", "0"), ("v0", "1")):
            node = model.at("vllmConfig", name)
            if node is not None and node.text == old:
                yield Found(node, f"{name}: {old} asks for vLLM's engine V0", "leave it out", remove(node))


def _ray(bundle: Bundle) -> Iterator[Found]:
    for model in _models(bundle):
        ray = model.at("raySpec")
        enabled = ray.text_at("enabled") != "false" if ray is not None and ray.is_mapping else False
        if ray is not None and enabled and model.text_at("lmcacheConfig", "enabled") == "true":
            yield Found(ray, "raySpec with lmcacheConfig", "use a Deployment, or give LMCACHE_* in env yourself")


def _controller(bundle: Bundle) -> Iterator[Found]:
    for values in _values(bundle):
        router = values.at("routerSpec")
        open_ports = {item.text_at("port") for item in values.items_at("routerSpec", "extraPorts")}
        wanted = [model.at("lmcacheConfig", "controllerReplyPort") for model in chart.models(values)]
        if router is not None:
            wanted += [router.at(name) for name in ("lmcacheControllerReplyPort", "lmcacheControllerHeartbeatPort")]
        missing = [node for node in wanted if node is not None and node.text not in (*open_ports, "9000")]
        for node in missing:
            yield Found(
                node,
                f"port {node.text} is not on the router's Service",
                "add it to routerSpec.extraPorts",
                _open_ports(router, missing),
            )


def _open_ports(router: Node | None, nodes: list[Node]) -> Edits:
    if router is None or not router.is_mapping or router.at("extraPorts") is not None:
        return ()
    ports = sorted({int(node.text) for node in nodes if node.text.isdigit()})
    items = [{"name": f"lmcache-{port}", "port": port, "targetPort": port, "protocol": "TCP"} for port in ports]
    return insert(router, "extraPorts", items)


def _memory(bundle: Bundle) -> Iterator[Found]:
    for model in _models(bundle):
        text = model.text_at("lmcacheConfig", "cpuOffloadingBufferSize").strip()
        pinned = int(float(text) * GIB) if _NUMBER.fullmatch(text) else 0
        for name in ("requestMemory", "limitMemory"):
            memory = model.at(name)
            have = read_bytes(memory.text) if memory is not None else None
            if pinned and memory is not None and have is not None and have < pinned + ENGINE_BYTES:
                better = write_gib(pinned + 2 * ENGINE_BYTES)
                message = f"{name}: {memory.text} does not hold a buffer of {shown(pinned)} and an engine"
                fix = f"write {better} and more for the weights, or lower cpuOffloadingBufferSize"
                yield Found(memory, message, fix, replace(memory, better), at_value=True)


RULES = (
    Rule("helm-key", "error", "the chart ignores keys it does not know, without a word", _unknown),
    Rule(
        "helm-cache-server",
        "error",
        "since its enabled defaults to false the chart deploys none from the section alone",
        _server_off,
    ),
    Rule(
        "helm-cache-server-image",
        "warning",
        "the chart reads image.repository and image.tag, and takes its own image otherwise",
        _server_image,
    ),
    Rule("helm-cache-server-image-twice", "warning", "the chart reads image only", _server_image_rest),
    Rule(
        "helm-cache-server-replicas", "error", "a lookup asks one of them at random: most are misses", _server_replicas
    ),
    Rule("helm-serde", "warning", "older charts hand LMCache an empty name, which it refuses", _server_serde),
    Rule(
        "helm-buffer-fraction",
        "error",
        "the chart cuts the number to a whole one, and 0 switches the buffer off",
        _fraction,
    ),
    Rule("helm-buffer-unit", "error", "LMCache reads a bare number of GiB and ends at a unit", _unit),
    Rule(
        "helm-disk-path",
        "error",
        "the chart sets LMCACHE_MAX_LOCAL_DISK_SIZE and no LMCACHE_LOCAL_DISK: the disk is never used",
        _disk_path,
    ),
    Rule("helm-pd", "error", "the chart asks whether the key is there, not what it says", _split),
    Rule(
        "helm-prefix-caching",
        "warning",
        "the chart passes --no-enable-prefix-caching where nothing is written",
        _prefix,
    ),
    Rule(
        "helm-prefix-off",
        "note",
        "every hit comes from host memory or further, also where the GPU still had it",
        _prefix_off,
    ),
    Rule("helm-v0", "warning", "vLLM has only had V1 since 0.11", _version),
    Rule(
        "helm-ray",
        "warning",
        "its Ray template sets variables that LMCache does not read, and chooses the other connector",
        _ray,
    ),
    Rule(
        "helm-controller-ports",
        "error",
        "the router's Service only has port 9000 for the controller: replies never arrive",
        _controller,
    ),
    Rule(
        "helm-memory", "error", "the buffer is pinned in the pod's memory: it is killed once the cache fills", _memory
    ),
)
