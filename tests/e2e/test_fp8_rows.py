"""Rows of eight bits in the real engine: half the host memory, the same hits, nearly the same KV."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.cache import (
    CHUNK,
    ask,
    cache_server,
    cached_tokens,
    chunk_files,
    evict,
    external_hits,
    logprobs,
    nearly_equal,
    prompt,
)

pytestmark = pytest.mark.e2e

NUM_CHUNKS = 3
TOKENS, REUSED = NUM_CHUNKS * CHUNK + 100, NUM_CHUNKS * CHUNK
NATIVE_ROW_BYTES = CHUNK * 4096  # a chunk of the tiny model in bfloat16
FP8 = {"LMCACHE_EXTRA_CONFIG": json.dumps({"host_kv_dtype": "fp8"})}


def server(directory, **cache):
    options = {"dtype": "bfloat16", "gpu_blocks": 18, "max_model_len": 2048}
    return cache_server(directory, cache={"LMCACHE_MAX_LOCAL_CPU_SIZE": "64Mi", **cache}, **options)


def chunks_in_host_memory(running):
    return int(re.search(r"host memory 64\.00 MiB \((\d+) chunks\)", running.log()).group(1))


def test_rows_take_half_the_memory_and_hit_from_host_memory_and_disk(tmp_path):
    with server(tmp_path, **FP8) as writer:
        assert "chunks) as fp8 -> disk" in writer.log()
        assert chunks_in_host_memory(writer) == 2 * (64 * 2**20 // NATIVE_ROW_BYTES) - 1  # scales take a 500th
        assert cached_tokens(ask(writer, prompt(1, TOKENS))) == 0
        twin = ask(writer, prompt(1, TOKENS))  # vLLM's own prefix cache: exact
        assert external_hits(writer) == 0
        evict(writer, num_tokens=2000)
        answer = ask(writer, prompt(1, TOKENS))
        assert (cached_tokens(answer), external_hits(writer)) == (REUSED, REUSED)
        assert logprobs(answer) != logprobs(twin)
        assert nearly_equal(answer, twin)
        writer.wait_for(lambda: len(chunk_files(tmp_path)) >= NUM_CHUNKS, 30, "write the chunks")
    assert max(path.stat().st_size for path in chunk_files(tmp_path)) < 0.51 * NATIVE_ROW_BYTES

    with server(tmp_path, **FP8) as reader:
        answer_from_disk = ask(reader, prompt(1, TOKENS))
        assert cached_tokens(answer_from_disk) == REUSED
        assert logprobs(answer_from_disk) == logprobs(answer)
        assert reader.metrics().get("lmcache_ext:corrupt_chunks_total", 0) == 0
