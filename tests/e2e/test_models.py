"""Two ranks, several cache groups, adapters, no prefix caching, plain vLLM: the same promises everywhere."""

from __future__ import annotations

import json

import pytest

from examples.tiny_model import build_lora
from tests.e2e.cache import (
    BLOCK,
    CHUNK,
    ask,
    cache_server,
    cached_tokens,
    evict,
    external_hits,
    logprobs,
    model,
    prompt,
)
from tests.e2e.server import MODELS

pytestmark = pytest.mark.e2e

TOKENS = 6 * CHUNK + 100
REUSED = 6 * CHUNK


def seen_twice(server, tokens, **body):
    """Logprobs of vLLM's own prefix-cache hit, then of ours after eviction, and our reused tokens."""
    assert cached_tokens(ask(server, tokens, **body)) == 0
    twin = ask(server, tokens, **body)
    evict(server, prompts=2)
    before = external_hits(server)
    answer = ask(server, tokens, **body)
    return logprobs(twin), logprobs(answer), external_hits(server) - before


def test_two_ranks_share_each_chunk(tmp_path):
    args = ["--tensor-parallel-size=2"]
    with cache_server(tmp_path, gpu_blocks=40, args=args, cores="0|1") as server:
        twin, answer, reused = seen_twice(server, prompt(1, TOKENS))
        assert reused == REUSED
        assert answer == twin
        server.kill9()
        server.start()
        server.wait_ready()
        assert cached_tokens(ask(server, prompt(1, TOKENS))) == REUSED


def test_sliding_window_model_hits_by_the_block(tmp_path):
    with cache_server(tmp_path, model=model("gemma3"), gpu_blocks=120) as server:
        tokens = prompt(2, 12 * BLOCK + 50)
        assert cached_tokens(ask(server, tokens)) == 0
        twin = ask(server, tokens)
        evict(server, prompts=5)
        before = external_hits(server)
        answer = ask(server, tokens)
        assert external_hits(server) - before == 12 * BLOCK
        assert cached_tokens(twin) == 12 * BLOCK
        assert logprobs(answer) == logprobs(twin)
        server.kill9()
        server.start()
        server.wait_ready()
        again = ask(server, tokens)
        assert cached_tokens(again) == 12 * BLOCK
        assert logprobs(again) == logprobs(twin)


def test_hits_without_prefix_caching_as_the_helm_tutorials_set_it(tmp_path):
    args = ["--no-enable-prefix-caching", "--no-enable-chunked-prefill", "--max-num-batched-tokens=4608"]
    with cache_server(tmp_path, args=args) as server:
        cold = ask(server, prompt(3, TOKENS))
        assert cached_tokens(cold) == 0
        answer = ask(server, prompt(3, TOKENS))
        assert cached_tokens(answer) == REUSED


def test_another_adapter_never_hits_even_under_the_same_name(tmp_path):
    base = model()
    one = build_lora(MODELS / "lora-one", base, seed=1)
    two = build_lora(MODELS / "lora-two", base, seed=2)
    link = tmp_path / "adapter"
    link.symlink_to(one)
    args = ["--enable-lora", "--max-lora-rank=16", "--lora-modules", f"sql={link}", f"other={two}"]
    with cache_server(tmp_path / "kv", gpu_blocks=40, args=args) as server:
        twin, answer, reused = seen_twice(server, prompt(4, TOKENS), model="sql")
        assert reused == REUSED
        assert answer == twin
        assert cached_tokens(ask(server, prompt(4, TOKENS))) == 0
        assert cached_tokens(ask(server, prompt(4, TOKENS), model="other")) == 0
        server.kill9()
        link.unlink()
        link.symlink_to(two)
        server.start()
        server.wait_ready()
        assert cached_tokens(ask(server, prompt(4, TOKENS), model="sql")) == 0


@pytest.mark.parametrize("name", ["LMCacheConnectorV1", "LMCacheMPConnector"])  # the third name is as the second
def test_plain_vllm_with_the_json_of_the_tutorials(tmp_path, name):
    transfer = json.dumps({"kv_connector": name, "kv_role": "kv_both"})
    config = tmp_path / "lmcache_config.yaml"
    config.write_text(f"chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 0.5\nlocal_disk: {tmp_path}/kv\n")
    args = ["--kv-transfer-config", transfer, "--enable-prompt-tokens-details"]
    env = {"LMCACHE_CONFIG_FILE": str(config)}
    with cache_server(program="vllm", gpu_blocks=40, args=args, env=env) as server:
        twin, answer, reused = seen_twice(server, prompt(6, TOKENS))
        assert reused == REUSED
        assert answer == twin
        assert "LMCache-compatible KV cache is on" in server.log()


def test_plain_vllm_by_module_path(tmp_path):
    transfer = {
        "kv_connector": "LMCacheConnectorV1",
        "kv_role": "kv_both",
        "kv_connector_module_path": "lmcache_ext.connector",
        "kv_connector_extra_config": {"lmcache.chunk_size": BLOCK},
    }
    args = ["--kv-transfer-config", json.dumps(transfer), "--enable-prompt-tokens-details"]
    with cache_server(program="vllm", gpu_blocks=40, args=args, env={"VLLM_PLUGINS": ""}) as server:
        ask(server, prompt(7, TOKENS))
        evict(server, prompts=2)
        assert cached_tokens(ask(server, prompt(7, TOKENS))) == TOKENS // BLOCK * BLOCK
