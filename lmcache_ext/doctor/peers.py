"""Why two servers never find each other's chunks: which part of their namespaces differs, and where. No I/O.

A server that explains says every component of its namespace. Of one that does not, something is seen all the same: its
settings, and what vLLM says of its cache on /metrics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from lmcache_ext.doctor.findings import Finding
from lmcache_ext.doctor.server import Facts

WINDOW_CHARS = 48
"""Of each text, around the first difference."""

MAX_NAMED = 4
"""Settings of a model that are named as different."""

_SETTINGS = ("chunk_size",)
_LABELS = ("block_size", "cache_dtype", "prefix_caching_hash_algo")
_MEANINGS = {
    "vllm": "another release of vLLM may lay a page out anew: run the same one",
    "model": "config.json, the architecture or the quantization is another",
    "weights": "the files of weights are not the same, byte for byte: serve the same checkpoint, whatever its path",
    "speculative": "one of them drafts tokens, or with another draft",
    "kv_dtype": "give both the same --dtype and --kv-cache-dtype",
    "kv_layout": "another attention backend, page size or instruction set (CPU): run them on the same kind of node",
    "groups": "the layers' caches are of another kind or size",
    "chunk": "give both the same chunk_size and --block-size",
    "parallel": "give both the same --tensor-parallel-size and --pipeline-parallel-size",
    "loss": "give both the same remote_serde and local_disk_serde",
    "hash": "give both the same --prefix-caching-hash-algo, and PYTHONHASHSEED the same value or none",
}


def differences(first: Facts, other: Facts) -> Iterator[Finding]:
    """Compare two servers; exact where both have explained a request."""
    ours, theirs = first.explanation.get("components"), other.explanation.get("components")
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        yield from _of_what_is_shown(first, other)
        return
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    for name in names:
        what = _difference(name, str(ours.get(name, "nothing")), str(theirs.get(name, "nothing")))
        yield Finding("problem", f"{_pair(first, other)} never share: {name} differs: {what}", _way_out(name, what))
    if not names:
        yield Finding("ok", f"{_pair(first, other)} have one namespace: {first.explanation['namespace']}")


def _of_what_is_shown(first: Facts, other: Facts) -> Iterator[Finding]:
    seen, seen_of_other = dict(_shown(first)), dict(_shown(other))
    both = [name for name in seen if name in seen_of_other]
    for name in both:
        if seen[name] != seen_of_other[name]:
            what = f"{name} differs: {seen[name]} and {seen_of_other[name]}"
            yield Finding("problem", f"{_pair(first, other)} never share: {what}")
    silent = " and ".join(facts.url for facts in (first, other) if not facts.explanation.get("components"))
    rest = f"of what is shown, {', '.join(both)} were compared" if both else "nothing that they show could be compared"
    way_out = "start both with --enable_lmcache_endpoints, and see that --api-key-file has the key of both"
    yield Finding("note", f"{silent} did not explain: {rest}", way_out)


def _shown(facts: Facts) -> Iterator[tuple[str, str]]:
    for key in _SETTINGS:
        if (value := facts.setting(key)) is not None:
            yield key, value
    for labels, _ in facts.metrics.get("vllm:cache_config_info", ())[:1]:
        yield from ((name, labels[name]) for name in _LABELS if name in labels)


def _difference(name: str, ours: str, theirs: str) -> str:
    """Both values; of long ones where they differ first, of a model's settings which."""
    if name == "model" and (settings := _settings_that_differ(ours, theirs)):
        return settings
    if max(len(ours), len(theirs)) <= 2 * WINDOW_CHARS:
        return f"{ours} and {theirs}"
    pairs = zip(ours, theirs, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return f"{_around(ours, at)} and {_around(theirs, at)}"


def _settings_that_differ(ours: str, theirs: str) -> str:
    """`rope_theta is 10000 and 500000` of two `architectures/quantization/{json}`; empty where that is not all."""
    (head, mine), (other_head, his) = _model(ours), _model(theirs)
    if head != other_head or mine is None or his is None:
        return ""
    keys = [key for key in {**mine, **his} if mine.get(key) != his.get(key)]
    named = [f"{key} is {json.dumps(mine.get(key))} and {json.dumps(his.get(key))}" for key in keys[:MAX_NAMED]]
    more = f", and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(named) + more


def _model(text: str) -> tuple[str, dict[str, Any] | None]:
    head, brace, rest = text.partition("/{")
    try:
        found = json.loads("{" + rest) if brace else None
    except ValueError:
        found = None
    return head, found if isinstance(found, dict) else None


def _around(text: str, at: int) -> str:
    start, end = max(0, at - WINDOW_CHARS // 2), at + WINDOW_CHARS // 2
    return f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"


def _way_out(name: str, what: str) -> str:
    if name == "hash":
        algorithms = [value.partition("/")[0] for value in what.split(" and ")]
        if len(set(algorithms)) == 1 and not re.search(r"/python", what):
            return "the algorithm is the same, the seed is not: give PYTHONHASHSEED the same value on both, or none"
    return _MEANINGS.get(name, "")


def _pair(first: Facts, other: Facts) -> str:
    return f"{first.url} and {other.url}"
