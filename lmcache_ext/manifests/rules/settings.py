"""LMCache files: keys nobody knows, old names, values that cannot be honoured, keys without effect."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lmcache_ext.config import load_config
from lmcache_ext.config_keys import EXTRA, KEYS, RENAMED, nearest
from lmcache_ext.config_sources import shown
from lmcache_ext.config_urls import directories
from lmcache_ext.errors import ConfigError, ManifestError
from lmcache_ext.manifests.bundle import Bundle, Document
from lmcache_ext.manifests.caches import OF_THE_POD, caches
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Edits, Node, remove, rename, replace
from lmcache_ext.manifests.pods import Container, pods

_KNOWN = {*KEYS, *RENAMED, "local_device", "extra_config"}
_PLACE = re.compile(r"settings:(?:(\d+):)? (.*)", re.DOTALL)
_SMALLEST_BLOCK = 16


def _pairs(bundle: Bundle) -> Iterator[Node]:
    for document in bundle.settings:
        yield from document.node.pairs()


def _unknown(bundle: Bundle) -> Iterator[Found]:
    for pair in _pairs(bundle):
        if pair.name in _KNOWN:
            continue
        near = nearest(pair.name)
        fix = f"did you mean {near}?" if near else "remove it; 'lmcache-ext keys' lists all settings"
        taken = near is not None and pair.parent is not None and pair.parent.at(near) is not None
        edits = rename(pair, near) if near and not taken else ()
        yield Found(pair, f"{pair.name} is not a known setting", fix, edits)


def _old(bundle: Bundle) -> Iterator[Found]:
    for pair in _pairs(bundle):
        new = RENAMED.get(pair.name)
        if new is not None:
            edits = remove(pair) if pair.parent is not None and pair.parent.at(new) else rename(pair, new)
            yield Found(pair, f"{pair.name} is an old name", f"write {new}", edits)
        elif pair.name == "local_device":
            yield _old_device(pair)
        elif pair.name == "pipelined_backend":
            yield Found(pair, "pipelined_backend is no setting any more", "remove it", remove(pair))


def _old_device(pair: Node) -> Found:
    device = pair.text
    if device.startswith(("file://", "/")):
        try:
            path = directories(device)[0]
        except ValueError:
            path = device
        key_and_value: Edits = (*rename(pair, "local_disk"), *replace(pair, device))
        return Found(pair, "local_device is an old name", f"write local_disk: {path}", key_and_value)
    edits = (*rename(pair, "local_cpu"), *replace(pair, True))
    return Found(pair, "local_device is an old name", "write local_cpu: true", edits)


def _values(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.settings:
        bad = [found for pair in document.node.pairs() if (found := _bad_value(pair)) is not None]
        yield from bad
        if not bad and all(pair.name in _KNOWN for pair in document.node.pairs()):
            yield from _bad_together(document.node, _of_pods(bundle, document))


def _bad_value(pair: Node) -> Found | None:
    key = KEYS.get(RENAMED.get(pair.name, pair.name))
    if key is None:
        return None
    try:
        key.read(pair.value())
    except ManifestError as error:
        return Found(pair, str(error), "correct it", at_value=True)
    except ValueError as error:
        problem, _, way_out = str(error).partition(": ")
        message = f"{pair.name}: {shown(pair.name, pair.text)} {problem}"
        return Found(pair, message, way_out or "correct it", at_value=True)
    return None


def _of_pods(bundle: Bundle, document: Document) -> dict[str, str]:
    """The address that no file can have, as each pod has its own: told to those that read it, or to some elsewhere."""
    readers = _readers(bundle, document)
    told = {name: value for name, value in OF_THE_POD.items() if any(name in one.env for one in readers)}
    return told if readers else OF_THE_POD


def _readers(bundle: Bundle, document: Document) -> list[Container]:
    """The engines that mount an LMCache file."""
    return [cache.container for cache in caches(bundle) if cache.settings is document]


def _bad_together(node: Node, environ: dict[str, str]) -> Iterator[Found]:
    """Keys that are good one by one, and not together."""
    try:
        load_config(path="settings", content=node.source, environ=environ)
    except ConfigError as error:
        found = _PLACE.fullmatch(str(error))
        line = int(found[1]) if found and found[1] else 1
        message, _, way_out = (found[2] if found else str(error)).rpartition(": ")
        pairs = (*node.pairs_at("extra_config"), *node.pairs())  # inner ones first: on one line both may begin
        at = next((pair for pair in pairs if pair.raw.start_mark.line + 1 == line), node)
        yield Found(at, message, way_out)


def _of_no_pod(bundle: Bundle) -> Iterator[Found]:
    told = any(OF_THE_POD.keys() & one.env.keys() for pod in pods(bundle) for one in pod.containers)
    for document in () if told else bundle.settings:
        peer = document.node.at("enable_p2p")
        is_on = peer is not None and peer.text.lower() == "true" and document.node.at("p2p_host") is None
        if peer is not None and is_on and not _readers(bundle, document):
            message = "no p2p_host, and no engine that reads this and could have it from a variable is given here"
            fix = "give each LMCACHE_P2P_HOST, on Kubernetes from status.podIP; check its manifest together with this"
            yield Found(peer, message, fix)


def _without_effect(bundle: Bundle) -> Iterator[Found]:
    for pair in _pairs(bundle):
        key = KEYS.get(RENAMED.get(pair.name, pair.name))
        if key is not None and key.note and pair.name != "pipelined_backend":
            yield Found(pair, f"{pair.name} has no effect here", key.note)
        for option in pair.pairs() if pair.name == "extra_config" else ():
            if option.name in EXTRA and EXTRA[option.name].note:
                yield Found(option, f"{option.name} has no effect here", EXTRA[option.name].note)


def _chunk(bundle: Bundle) -> Iterator[Found]:
    for pair in _pairs(bundle):
        if pair.name == "chunk_size" and pair.text.isdigit() and (size := int(pair.text)) % _SMALLEST_BLOCK:
            better = max(_SMALLEST_BLOCK, size - size % _SMALLEST_BLOCK)
            message = f"a chunk of {size} tokens is not a multiple of any block of vLLM"
            fix = f"write {better}, or auto; on CPU a multiple of 128"
            yield Found(pair, message, fix, replace(pair, better), at_value=True)


def _serdes(bundle: Bundle) -> Iterator[Found]:
    for pair in _pairs(bundle):
        if pair.name in ("remote_serde", "local_disk_serde") and (pair.is_null or not pair.text.strip()):
            yield Found(pair, f"{pair.name} is empty", "write naive", replace(pair, "naive"))


RULES = (
    Rule("setting-unknown", "error", "the start ends at a setting that nobody knows, as it could be a typo", _unknown),
    Rule("setting-old", "warning", "LMCache of today does not know the name and ignores it with a warning", _old),
    Rule("setting-value", "error", "the start ends at a value that cannot be honoured", _values),
    Rule("setting-of-pods", "note", "an address is each engine's own, and one file is read by all", _of_no_pod),
    Rule(
        "setting-no-effect",
        "note",
        "accepted for LMCache's sake; something else does its work, or nothing yet",
        _without_effect,
    ),
    Rule("chunk-block", "error", "a chunk is made of whole blocks of vLLM: 16 tokens on GPU, 128 on CPU", _chunk),
    Rule("serde-empty", "warning", "LMCache reads an empty name as a serde of that name", _serdes),
)
