"""``lmcache-ext doctor URL``: why there are no hits, asked of running servers.

It reads what every server shows (/metrics), what the model server of this project shows to who may ask
(/lmcache/v1/config), and for one request /lmcache/v1/explain. Facts are gathered first and judged then, by
functions that do no I/O. Standard library only.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TIMEOUT_S = 60.0
CONFIG, EXPLAIN = "/lmcache/v1/config", "/lmcache/v1/explain"
NEARLY_FULL = 0.95

Level = Literal["ok", "note", "problem"]
Sample = tuple[Mapping[str, str], float]

_SERIES = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report, and what to do about it."""

    level: Level
    what: str
    way_out: str = ""


@dataclass(slots=True)
class Facts:
    """What one server said."""

    url: str
    config_status: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[Sample]] = field(default_factory=dict)
    explain_status: int = 0
    explanation: dict[str, Any] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of a metric's samples with these labels; None where there are none."""
        found = [value for has, value in self.metrics.get(name, ()) if labels.items() <= has.items()]
        return sum(found) if found else None

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Samples above zero, summed by some labels."""
        found: dict[tuple[str, ...], float] = {}
        for has, value in self.metrics.get(name, ()):
            if value > 0:
                key = tuple(has.get(label, "") for label in labels)
                found[key] = found.get(key, 0.0) + value
        return found

    def setting(self, key: str) -> str | None:
        """A setting's effective value, as text; None where the server did not say."""
        found = self.config.get("settings", {}).get(key)
        return None if found is None else str(found["value"])


# --- asking --------------------------------------------------------------------------------------


def gather(url: str, *, api_key: str | None = None, request: Mapping[str, Any] | None = None) -> Facts:
    """Ask one server. Raises OSError where it cannot be reached, ValueError where `url` is not one of http."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is not a server's address: write it as http://host:8080")
    facts = Facts(url.rstrip("/"))
    status, text = _fetch(facts.url + "/metrics", api_key)
    facts.metrics = parse_metrics(text) if status == 200 else {}
    facts.config_status, text = _fetch(facts.url + CONFIG, api_key)
    facts.config = _json(text)
    if request is not None:
        facts.explain_status, text = _fetch(facts.url + EXPLAIN, api_key, request)
        facts.explanation = _json(text)
    return facts


def _fetch(url: str, api_key: str | None, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """Status and text of an answer, whatever it is."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    data = None
    if body is not None:
        data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
    call = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(call, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def parse_metrics(text: str) -> dict[str, list[Sample]]:
    """Prometheus' text format: name -> samples."""
    found: dict[str, list[Sample]] = {}
    for line in text.splitlines():
        matched = None if line.startswith("#") else _SERIES.match(line)
        if matched is not None:
            found.setdefault(matched[1], []).append((dict(_LABEL.findall(matched[2] or "")), float(matched[3])))
    return found


# --- judging -------------------------------------------------------------------------------------


def findings(facts: Facts, with_request: bool = True) -> Iterator[Finding]:
    """Everything that can be said of one server, the most fundamental first; of the request it explained, last."""
    for judge in JUDGES:
        yield from judge(facts)
    if with_request:
        yield from _request(facts)


def _cache(facts: Facts) -> Iterator[Finding]:
    has_metrics = any(name.startswith("lmcache_ext:") for name in facts.metrics)
    if not facts.metrics:
        yield Finding("problem", "there is no /metrics", "is this the server's address, and does it load still?")
    elif not has_metrics:
        way_out = 'start the server with --kv-transfer-config={"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
        yield Finding("problem", "the cache is off: /metrics has nothing of it", way_out)
    elif facts.total("lmcache_ext:cache_active") == 0:
        yield Finding("problem", "the cache turned itself off after failures of its own", "see the log, and restart")
    else:
        yield Finding("ok", "the cache is on")


def _access(facts: Facts) -> Iterator[Finding]:
    refused = {
        401: ("needs the server's API key", "--api-key-file FILE"),
        403: (str(facts.config.get("error", "is refused")), "ask from the same machine, as with kubectl port-forward"),
    }
    if facts.config_status in refused:
        what, way_out = refused[facts.config_status]
        yield Finding("note", f"{CONFIG}: {what}", way_out)


def _modes(facts: Facts) -> Iterator[Finding]:
    settings = facts.config.get("settings", {})
    for key, meaning in (("bypass", "nothing is looked up or stored"), ("freeze", "nothing new is stored")):
        if facts.setting(key) == "true":
            yield Finding("problem", f"{key} is true ({settings[key]['origin']}): {meaning}", f"set {key}: false")


def _file(facts: Facts) -> Iterator[Finding]:
    config = facts.config
    if config.get("in_effect") is False and config.get("last_refusal"):
        for reason in config["last_refusal"]["reasons"]:
            yield Finding("problem", f"the file is not wholly in effect: {reason}")
    for number, engine in config.get("engines", {}).items():
        if config.get("digest") and engine.get("digest") not in (None, config["digest"]):
            what = f"engine {number} runs file {engine['digest']}, and the file is {config['digest']}"
            yield Finding(
                "note", what, "it takes a change with its next request; if it has refused it, its log says why"
            )


def _hash(facts: Facts) -> Iterator[Finding]:
    for labels, _ in facts.metrics.get("vllm:cache_config_info", ()):
        algorithm = labels.get("prefix_caching_hash_algo", "")
        if algorithm.startswith("xxhash"):
            what = f"the hash algorithm {algorithm} gives every process other keys: only host memory is used"
            yield Finding("problem", what, "--prefix-caching-hash-algo=sha256_cbor")
        if labels.get("enable_prefix_caching") == "False":
            yield Finding("problem", "vLLM's prefix caching is off", "leave out --no-enable-prefix-caching")


def _traffic(facts: Facts) -> Iterator[Finding]:
    lookups = facts.total("lmcache:num_lookup_requests_total") or 0
    if not lookups:
        if any(name.startswith("lmcache_ext:") for name in facts.metrics):
            yield Finding("note", "no request has been looked up since the start")
        return
    tokens = (facts.total("lmcache:num_requested_tokens_total") or 0) / lookups
    chunk = facts.setting("chunk_size") or ""
    if chunk.isdigit() and tokens <= int(chunk):
        what = (
            f"prompts have {tokens:.0f} tokens on average, and a chunk has {chunk}: most have no whole chunk to reuse"
        )
        yield Finding("problem", what, "lower chunk_size (restart), or put what prompts share at their beginning")
    hits = facts.total("lmcache:num_hit_tokens_total") or 0
    asked = tokens * lookups
    share = hits / asked if asked else 0.0
    what = f"{hits:.0f} of {asked:.0f} prompt tokens came from the cache ({share:.1%}), in {lookups:.0f} requests"
    yield Finding("ok" if hits else "note", what, "" if hits else "explain one request: --prompt or --request")


def _tiers(facts: Facts) -> Iterator[Finding]:
    for labels, is_up in facts.metrics.get("lmcache_ext:tier_up", ()):
        if not is_up:
            tier = labels.get("tier", "")
            causes = [
                cause for name, cause in facts.by("lmcache_ext:store_failures_total", "tier", "cause") if name == tier
            ]
            why = f" (failures so far: {', '.join(sorted(causes))})" if causes else ""
            yield Finding(
                "problem", f"{tier}: its circuit breaker is open{why}", "see whether its store is up and fast"
            )
    capacities = facts.by("lmcache_ext:tier_capacity_bytes", "tier")
    for (tier,), used in facts.by("lmcache_ext:tier_used_bytes", "tier").items():
        capacity = capacities.get((tier,), 0.0)
        if capacity and used >= NEARLY_FULL * capacity:
            what = f"{tier} is full ({used / 2**30:.1f} of {capacity / 2**30:.1f} GiB): the oldest chunks make way"
            yield Finding("note", what, "raise its limit if prefixes return later than they are evicted")


def _losses(facts: Facts) -> Iterator[Finding]:
    for (tier, cause), count in facts.by("lmcache_ext:dropped_chunks_total", "tier", "cause").items():
        yield Finding("note", f"{tier}: {count:.0f} chunks were not written: {cause}")
    for (tier, cause), count in facts.by("lmcache_ext:corrupt_chunks_total", "tier", "cause").items():
        yield Finding("problem", f"{tier}: {count:.0f} stored chunks were wrong: {cause}", "look at its medium")
    for (tier,), count in facts.by("lmcache_ext:abandoned_chunks_total", "tier").items():
        way_out = "raise blocking_timeout_secs, or find out why the store is slow"
        yield Finding("note", f"{tier}: {count:.0f} fetches took longer than anybody waits", way_out)


def _request(facts: Facts) -> Iterator[Finding]:
    if facts.explanation.get("reason"):
        told = facts.explanation
        where = f": ...{told['text_before']!r} | {told['text_after']!r}..." if "text_after" in told else ""
        yield Finding("ok" if told["reason"] == "all" else "problem", f"this request: {told['text']}{where}")
    elif facts.explain_status:
        error = facts.explanation.get("error", f"HTTP status {facts.explain_status}")
        yield Finding("note", f"this request could not be explained: {error}")


JUDGES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _cache,
    _access,
    _modes,
    _file,
    _hash,
    _traffic,
    _tiers,
    _losses,
)


def differences(first: Facts, other: Facts) -> Iterator[Finding]:
    """Why two servers would not find each other's chunks; both must have explained a request."""
    ours, theirs = first.explanation.get("components"), other.explanation.get("components")
    if not ours or not theirs:
        way_out = "start both with --enable_lmcache_endpoints"
        yield Finding("note", f"{first.url} and {other.url} cannot be compared: not both explain", way_out)
        return
    different = [name for name in ours if ours[name] != theirs.get(name)]
    for name in different:
        what = f"{first.url} and {other.url} never share: {name} differs: {ours[name]} and {theirs.get(name)}"
        yield Finding("problem", what)
    if not different:
        yield Finding("ok", f"{first.url} and {other.url} have one namespace: {first.explanation['namespace']}")
