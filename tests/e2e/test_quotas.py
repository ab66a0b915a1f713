"""Two tenants and one host memory: a flood by one leaves the other's prefix alone, whatever its quota becomes."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.e2e.cache import CHUNK, ROW_BYTES, ask, cached_tokens, evict, logprobs, prompt
from tests.e2e.test_reload import Traffic, tuned_server

pytestmark = pytest.mark.e2e

TOKENS = 3 * CHUNK + 40
REUSED = 3 * CHUNK
QUIET, NOISY = "the-salt-of-the-quiet-one", "the-salt-of-the-noisy-one"
KEY = "sha256:" + hashlib.sha256(NOISY.encode()).hexdigest()
ROWS = 24  # of host memory; a prompt takes three
CHARGED, LIMIT = "lmcache_ext:tenant_charged_bytes", "lmcache_ext:tenant_quota_bytes"
EVICTED, REJECTED = "lmcache_ext:tenant_evicted_chunks_total", "lmcache_ext:tenant_rejected_chunks_total"


def quotas(rows: int) -> str:
    return json.dumps({"quotas": {KEY: {"host": f"{rows * ROW_BYTES}B", "name": "noisy"}, "*": "1Gi", "unsalted": 0}})


def flood(server, seed: int, prompts: int) -> None:
    for i in range(seed, seed + prompts):
        ask(server, prompt(i, TOKENS), cache_salt=NOISY, max_tokens=1)


def test_a_flood_by_one_tenant_does_not_evict_the_prefix_of_another(tmp_path):
    host = {"max_local_cpu_size": f"{ROWS * ROW_BYTES}B"}
    with tuned_server(tmp_path, **host, chunk_size=str(CHUNK), extra_config=quotas(9)) as tuned:
        server = tuned.server
        computed = ask(server, prompt(1, TOKENS), cache_salt=QUIET)
        twin = ask(server, prompt(1, TOKENS), cache_salt=QUIET)  # with vLLM's own prefix cache, as a hit has it
        assert cached_tokens(computed) == 0
        flood(server, 100, prompts=14)  # 42 chunks, and 40 blocks of vLLM's own: neither would keep anything else
        again = ask(server, prompt(1, TOKENS), cache_salt=QUIET)
        assert cached_tokens(again) == REUSED
        assert logprobs(again) == logprobs(twin)
        assert (tuned.sample(LIMIT, tenant="noisy"), tuned.sample(CHARGED, tenant="noisy")) == (9 * ROW_BYTES,) * 2
        assert tuned.sample(CHARGED, tenant="*") == 3 * ROW_BYTES
        assert tuned.sample(EVICTED, tenant="noisy") == 42 - 9

        with Traffic(server, clients=1) as traffic:  # without a salt: nothing of it is kept
            shown = tuned.apply(extra_config=quotas(3))
            server.wait_for(lambda: tuned.sample(CHARGED, tenant="noisy") == 3 * ROW_BYTES, 15, "evict to the quota")
            tuned.apply(extra_config=quotas(0))
            server.wait_for(lambda: tuned.sample(CHARGED, tenant="noisy") == 0, 15, "evict all of it")
        assert traffic.failures == []
        setting = shown["settings"]["extra_config.quotas"]
        assert (setting["value"].startswith("noisy="), setting["live"]) == (True, True)

        evict(server)  # vLLM's own prefix cache
        assert cached_tokens(ask(server, prompt(113, TOKENS), cache_salt=NOISY)) == 0
        assert cached_tokens(ask(server, prompt(1, TOKENS), cache_salt=QUIET)) == REUSED
        assert tuned.sample(REJECTED, tenant="noisy") == 3

        told = server.log() + server.get("/metrics").text + server.get("/lmcache/v1/config").text
        assert "noisy" in told
        assert not [salt for salt in (QUIET, NOISY) if salt in told]
