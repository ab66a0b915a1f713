"""The engine's command line, its variables, and the sizes of its chunks."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping

from lmcache_ext.config_keys import OTHER_VARIABLES, nearest
from lmcache_ext.config_merge import is_known
from lmcache_ext.config_sources import is_service_link
from lmcache_ext.config_urls import is_secret
from lmcache_ext.config_values import MASK
from lmcache_ext.manifests.bundle import Bundle
from lmcache_ext.manifests.caches import CONNECTORS, Cache, caches, unquoted
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Edits, Node, add_item, replace
from lmcache_ext.manifests.pods import Arg, Container, pods

TRANSFER = '--kv-transfer-config={"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
CPU_BLOCK, GPU_BLOCK = 128, 16
_ALIKE = 0.75  # a slip of the finger; below it, a variable of somebody else's
# Fields of vLLM's KVTransferConfig that vLLM 0.32 no longer has: it refuses them at the start.
GONE_FIELDS = ("kv_buffer_size", "kv_rank", "kv_parallel_size", "kv_ip", "kv_port")
_QUOTED = re.compile(r"(--[A-Za-z0-9_-]+=)(['\"])(.*)\2", re.DOTALL)
_NO_OP = ("LMCACHE_USE_EXPERIMENTAL", "VLLM_USE_V1", "PYTHONHASHSEED")
# What charts and operators wrote, and LMCache never read.
_MISNAMED = {
    "LMCACHE_INSTANCE_ID": "LMCACHE_LMCACHE_INSTANCE_ID",
    "LMCACHE_CONTROLLER_URL": "LMCACHE_CONTROLLER_PULL_URL",
    "LMCACHE_WORKER_PORT": "LMCACHE_LMCACHE_WORKER_PORTS",
}


def _quotes(bundle: Bundle) -> Iterator[Found]:
    for container in _containers(bundle):
        for arg in container.args:
            found = _QUOTED.fullmatch(arg.text)
            plain = found[1] + found[3] if found else unquoted(arg.text)
            if plain == arg.text or arg.text != arg.node.text:
                continue
            yield Found(
                arg.node,
                f"the quotes in {_short(arg.text)} are part of the argument",
                f"write {_short(plain)}",
                replace(arg.node, plain),
            )


def _short(text: str) -> str:
    flag, mark, _ = text.partition("=")
    if is_secret(flag.replace("-", "_")):
        return f"{flag}{mark}{MASK}"
    return text if len(text) <= 60 else text[:57] + "..."


def _containers(bundle: Bundle) -> Iterator[Container]:
    for pod in pods(bundle):
        yield from pod.containers


def _off(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        if cache.transfer is None and cache.file is not None and (cache.pod.complete or _has_args(cache.container)):
            edits = add_item(cache.container.own, "args", TRANSFER)
            yield Found(cache.file.node, "the cache is configured and not switched on", f"add {TRANSFER}", edits)


def _has_args(container: Container) -> bool:
    return container.own.at("args") is not None


def _transfer(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        arg, value = cache.transfer, cache.transfer_value
        if arg is None:
            continue
        if value is None:
            edits = _rewrite(arg, json.loads(TRANSFER.partition("=")[2]))
            yield Found(arg.node, "--kv-transfer-config is not JSON", f"write {TRANSFER}", edits)
        elif "kv_connector" not in value or "kv_role" not in value:
            missing = "kv_connector" if "kv_connector" not in value else "kv_role"
            better = {"kv_connector": CONNECTORS[0], "kv_role": "kv_both", **value}
            yield Found(
                arg.node,
                f"--kv-transfer-config has no {missing}",
                f'add "{missing}":"{better[missing]}"',
                _rewrite(arg, better),
            )


def _rewrite(arg: Arg, value: Mapping[str, object]) -> Edits:
    """The same argument with another JSON; nothing where it is one of many words on a line."""
    text = json.dumps(value, separators=(",", ":"))
    if arg.node.text == arg.text:
        return replace(arg.node, text)
    flag, _, rest = arg.node.text.partition("=")
    return replace(arg.node, f"{flag}={text}") if rest == arg.text else ()


def _gone_fields(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        value = cache.transfer_value or {}
        gone = [name for name in GONE_FIELDS if name in value]
        if cache.transfer is not None and gone:
            kept = {name: item for name, item in value.items() if name not in gone}
            message = f"--kv-transfer-config has {', '.join(gone)}"
            yield Found(cache.transfer.node, message, "leave them out", _rewrite(cache.transfer, kept))


def _old_connector(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        value = cache.transfer_value
        if cache.transfer is not None and value and value.get("kv_connector") == "LMCacheConnector":
            better = {**value, "kv_connector": "LMCacheConnectorV1"}
            yield Found(
                cache.transfer.node,
                "LMCacheConnector is the name for vLLM's engine V0",
                "write LMCacheConnectorV1",
                _rewrite(cache.transfer, better),
            )


def _role(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        role = (cache.transfer_value or {}).get("kv_role", "kv_both")
        if cache.transfer is not None and role != "kv_both":
            better = {**(cache.transfer_value or {}), "kv_role": "kv_both"}
            yield Found(cache.transfer.node, f"kv_role is {role}", "write kv_both", _rewrite(cache.transfer, better))


def _model_name(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        for arg in cache.container.args if cache.pod.document.kind == "InferenceService" else ():
            if arg.text.startswith("--model-name"):
                better = arg.node.text.replace("--model-name", "--model_name", 1)
                yield Found(arg.node, "--model-name with a dash", "write --model_name", replace(arg.node, better))


def _workers(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        workers = cache.container.flag("workers")
        if workers is not None and workers.text not in ("", "1"):
            plain = workers.node.text.partition("=")
            better = f"{plain[0]}=1" if plain[1] else "1"
            yield Found(
                workers.node,
                f"{workers.text} workers",
                "write 1, and scale with replicas",
                replace(workers.node, better),
            )


# --- variables ----------------------------------------------------------------------------


def _misnamed(bundle: Bundle) -> Iterator[Found]:
    engines = {cache.container for cache in caches(bundle)}
    for container in _containers(bundle):
        for env in container.env.values():
            better = _MISNAMED.get(env.name) or (_nearest_variable(env.name) if container in engines else None)
            name = env.node.at("name")
            if better and name is not None:
                taken = better in container.env
                edits = () if taken else replace(name, better)
                yield Found(name, f"{env.name} is no setting of LMCache", f"write {better}", edits, at_value=True)


def _nearest_variable(name: str) -> str | None:
    key = name.removeprefix("LMCACHE_").lower()
    if not name.startswith("LMCACHE_") or is_known(key) or OTHER_VARIABLES.fullmatch(name) or is_service_link(name):
        return None
    near = nearest(key)
    alike = near is not None and difflib.SequenceMatcher(None, key, near).ratio() > _ALIKE
    return f"LMCACHE_{near.upper()}" if near and alike and is_known(near) else None


def _shadowed(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        written = {pair.name for pair in cache.settings.node.pairs()} if cache.settings else set()
        for env in cache.container.env.values():
            key = env.name.removeprefix("LMCACHE_").lower()
            if env.name.startswith("LMCACHE_") and key in written:
                message = f"{env.name} and the file both set {key}; the file wins, in LMCache the variable"
                yield Found(env.node, message, "keep one of them")


def _no_op(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        for name in _NO_OP:
            env = cache.container.env.get(name)
            if env is not None:
                yield Found(env.node, f"{name} has no effect here", "leave it out, or leave it: it does no harm")


# --- tokens -------------------------------------------------------------------------------


def _chunk(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        size, place = _chunk_tokens(cache)
        block = _block_tokens(cache)
        if size is None or place is None or size % GPU_BLOCK:
            continue  # a multiple of no block is another rule's
        if size % block:
            better = max(block, size - size % block)
            message = f"a chunk of {size} tokens is not a multiple of the engine's block of {block}"
            yield Found(place, message, f"write {better}, or auto", replace(place, better), at_value=True)


def _chunk_tokens(cache: Cache) -> tuple[int | None, Node | None]:
    """The chunk size and where it is written, in the file or in a variable."""
    pair = cache.settings.node.at("chunk_size") if cache.settings else None
    env = cache.container.env.get("LMCACHE_CHUNK_SIZE")
    place = pair if pair is not None else env.node.at("value") if env else None
    return (int(place.text), place) if place is not None and place.text.isdigit() else (None, None)


def _block_tokens(cache: Cache) -> int:
    """--block-size, or vLLM's own for the device."""
    written = cache.container.flag("block-size")
    if written is not None and written.text.isdigit() and int(written.text):
        return int(written.text)
    return CPU_BLOCK if _is_without_gpu(cache) else GPU_BLOCK


def _is_without_gpu(cache: Cache) -> bool:
    """Whether it is known that the engine asks for none."""
    return cache.pod.complete and not any(
        "gpu" in item.name
        for node in cache.container.nodes
        for part in ("limits", "requests")
        for item in node.pairs_at("resources", part)
    )


def _copier(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        written = cache.settings.node.at("extra_config", "cuda_page_copier") if cache.settings else None
        if written is not None and written.text == "kernels" and _is_without_gpu(cache):
            message = (
                f"{cache.pod.document.node.text_at('metadata', 'name')} asks for no GPU: kernels copy nothing there"
            )
            yield Found(written, message, "ask for nvidia.com/gpu, or remove it", at_value=True)


def _context(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        length = cache.container.flag("max-model-len")
        size, place = _chunk_tokens(cache)
        if length is None or not length.text.isdigit() or size is None or place is None:
            continue
        if size > int(length.text):
            message = f"no prompt fills a chunk of {size} tokens: --max-model-len is {length.text}"
            better = max(CPU_BLOCK, int(length.text) // 4 // CPU_BLOCK * CPU_BLOCK)
            edits = replace(place, better) if better <= int(length.text) else ()
            yield Found(place, message, f"write {better}", edits, at_value=True)


RULES = (
    Rule(
        "quoted-arg",
        "error",
        "no shell takes them off: vLLM reads them as part of the JSON and ends (this runtime strips them)",
        _quotes,
    ),
    Rule("connector-off", "error", "vLLM only loads a KV connector that --kv-transfer-config names", _off),
    Rule("kv-transfer", "error", "vLLM ends at a --kv-transfer-config it cannot read", _transfer),
    Rule("kv-transfer-field", "error", "vLLM 0.32 no longer has these fields and ends at them", _gone_fields),
    Rule(
        "connector-old",
        "warning",
        "the engine V0 is gone; this package answers to both names, vLLM only knows V1",
        _old_connector,
    ),
    Rule("kv-role", "warning", "kv_both stores and loads; with another role one of the two does not happen", _role),
    Rule("model-name", "warning", "KServe learns the model's name by the spelling --model_name only", _model_name),
    Rule("workers", "error", "an engine cannot be shared by several server processes: the start ends", _workers),
    Rule(
        "variable-name",
        "error",
        "LMCache reads LMCACHE_ and the name of the setting, the rest is ignored without a word",
        _misnamed,
    ),
    Rule(
        "variable-shadowed",
        "warning",
        "two places for one setting: KServe's guide and LMCache's code disagree which wins",
        _shadowed,
    ),
    Rule("variable-no-op", "note", "a switch of older versions; keys are the same in every process without it", _no_op),
    Rule("chunk-engine-block", "error", "the start ends where a chunk is not made of whole blocks", _chunk),
    Rule("copier-device", "note", "on the CPU platform pages are copied by a copier of its own", _copier),
    Rule("chunk-context", "error", "nothing shorter than a chunk is stored: there would never be a hit", _context),
)
