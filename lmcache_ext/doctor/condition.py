"""What keeps one server from hits, judged from what it says. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite

from lmcache_ext.doctor.findings import NEARLY_FULL, Finding, gib
from lmcache_ext.doctor.server import CONFIG, Facts


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
    own = facts.total("vllm:prefix_cache_hits_total") or 0
    asked = tokens * lookups
    share = hits / asked if asked else 0.0
    what = f"{hits:.0f} of {asked:.0f} prompt tokens came from the cache ({share:.1%}), in {lookups:.0f} requests"
    found = bool(hits or own)
    yield Finding("ok" if found else "note", what, "" if found else "explain one request: --prompt or --request")
    if own:
        what = f"{own:.0f} tokens were vLLM's own prefix cache (GPU/CPU pool), so nothing had to be loaded"
        yield Finding("ok", what)


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
            what = f"{tier} is full ({gib(used)} of {gib(capacity)}): the oldest chunks make way"
            yield Finding("note", what, "raise its limit if prefixes return later than they are evicted")


def _tenants(facts: Facts) -> Iterator[Finding]:
    quotas = {
        tenant: size
        for (tenant,), size in facts.by("lmcache_ext:tenant_quota_bytes", "tenant").items()
        if isfinite(size)
    }  # infinite: it had one
    for name, what in (("evicted", "made way for newer ones of its own"), ("rejected", "were not kept")):
        for (tenant,), count in facts.by(f"lmcache_ext:tenant_{name}_chunks_total", "tenant").items():
            quota = f", which is {gib(quotas[tenant])}" if tenant in quotas else ""
            way_out = "raise it in extra_config.quotas if its prefixes come back later than that"
            yield Finding("note", f"tenant {tenant}: {count:.0f} chunks {what}, for its quota{quota}", way_out)


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
        if told.get("salted"):
            way_out = "send the same cache_salt as whoever stored it, or none on both sides"
            yield Finding("note", "this request has a cache_salt, which is part of every key", way_out)
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
    _tenants,
    _losses,
)
