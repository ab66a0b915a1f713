"""What reaches ``/metrics`` beyond vLLM's own ``vllm:kv_offload_*`` family.

Engine and worker processes cannot register with the API process's Prometheus registry: counts
travel in `OffloadingConnectorStats`, and the API process builds the metrics from these definitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata, OffloadingMetricMetadata

LOOKUP_REQUESTS = "lmcache:num_lookup_requests"
REQUESTED_TOKENS = "lmcache:num_requested_tokens"
HIT_TOKENS = "lmcache:num_hit_tokens"
CORRUPT_CHUNKS = "lmcache_ext:corrupt_chunks"
DROPPED_CHUNKS = "lmcache_ext:dropped_chunks"
STORE_FAILURES = "lmcache_ext:store_failures"
ABANDONED_CHUNKS = "lmcache_ext:abandoned_chunks"
TIER_UP = "lmcache_ext:tier_up"
TIER_USED_BYTES = "lmcache_ext:tier_used_bytes"
TIER_CAPACITY_BYTES = "lmcache_ext:tier_capacity_bytes"
TENANT_QUOTA_BYTES = "lmcache_ext:tenant_quota_bytes"
TENANT_CHARGED_BYTES = "lmcache_ext:tenant_charged_bytes"
TENANT_EVICTED_CHUNKS = "lmcache_ext:tenant_evicted_chunks"
TENANT_REJECTED_CHUNKS = "lmcache_ext:tenant_rejected_chunks"
HOOK_FAILURES = "lmcache_ext:hook_failures"
CACHE_ACTIVE = "lmcache_ext:cache_active"
CONFIG_RELOADS = "lmcache_ext:config_reloads"
CONFIG_GENERATION = "lmcache_ext:config_generation"
CONFIG_DIGEST = "lmcache_ext:config_digest"


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """Name -> documentation and labels of every metric we add."""
    counter, gauge = OffloadingCounterMetadata, OffloadingGaugeMetadata
    return {
        LOOKUP_REQUESTS: counter("Requests whose prefix was looked up in the cache."),
        REQUESTED_TOKENS: counter("Prompt tokens of the requests that were looked up."),
        HIT_TOKENS: counter("Tokens restored from the cache, by the tier that held them.", ("tier",)),
        CORRUPT_CHUNKS: counter(
            "Stored chunks whose frame or checksum was wrong; each was a miss and was deleted.", ("tier", "cause")
        ),
        DROPPED_CHUNKS: counter("Chunks not written to a tier, by cause.", ("tier", "cause")),
        STORE_FAILURES: counter("Failed operations of a tier's store, by cause.", ("tier", "cause")),
        ABANDONED_CHUNKS: counter("Chunks whose fetch outlived its deadline and was given up.", ("tier",)),
        TIER_UP: gauge("1 while the tier answers, 0 while its circuit breaker is open.", ("tier",)),
        TIER_USED_BYTES: gauge("Bytes the tier holds (an estimate where the store is shared).", ("tier",)),
        TIER_CAPACITY_BYTES: gauge("Bytes the tier may hold.", ("tier",)),
        TENANT_QUOTA_BYTES: gauge(
            "Bytes a tenant may hold; of * each other tenant; +Inf: no more.", ("tier", "tenant")
        ),
        TENANT_CHARGED_BYTES: gauge("Bytes a tenant holds; of * all other tenants together.", ("tier", "tenant")),
        TENANT_EVICTED_CHUNKS: counter("Chunks evicted because their tenant was over its quota.", ("tier", "tenant")),
        TENANT_REJECTED_CHUNKS: counter(
            "Chunks not taken in because their tenant's quota was used up by chunks in use or of the same prompt.",
            ("tier", "tenant"),
        ),
        HOOK_FAILURES: counter("Exceptions in the connector, each contained to its request.", ("hook",)),
        CACHE_ACTIVE: gauge("1 while the KV cache connector is on."),
        CONFIG_RELOADS: counter("Changed configuration files, by what became of them.", ("outcome",)),
        CONFIG_GENERATION: gauge("Live configurations that took effect since the start, which is the first."),
        CONFIG_DIGEST: gauge("First 32 bits of the SHA-256 of the file whose live part is in effect."),
    }


class Pace:
    """Which steps send statistics: those with news, and one a second.

    Collecting and shipping the gauges takes 0.1 ms, which is 2 to 3 % of a decode step of a small model
    (benchmarks/ttft.py), and in most decode steps nothing has happened.
    """

    def __init__(self, interval_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._news = True
        self._due_at = 0.0

    def mark(self) -> None:
        """Something happened that a counter should show soon."""
        self._news = True

    def is_due(self) -> bool:
        """Whether this step sends; each True starts the interval anew."""
        now = self._clock()
        if not self._news and now < self._due_at:
            return False
        self._news, self._due_at = False, now + self._interval_s
        return True
