"""A serde named in the configuration runs in the real engine: smaller chunks, and the KV they promise."""

from __future__ import annotations

import json

import pytest

from tests.e2e.cache import (
    CHUNK,
    ROW_BYTES,
    ask,
    cache_server,
    cached_tokens,
    chunk_files,
    logprobs,
    nearly_equal,
    prompt,
)

pytestmark = pytest.mark.e2e

TOKENS = 6 * CHUNK + 100
REUSED = 6 * CHUNK


def disk_serde(name, **extra):
    return {"LMCACHE_LOCAL_DISK_SERDE": name, "LMCACHE_EXTRA_CONFIG": json.dumps(extra)}


def stored_sizes(directory):
    return [path.stat().st_size for path in chunk_files(directory)]


def store_prompt(server, directory):
    """Compute a prompt and wait for its chunks; the answer of vLLM's own prefix cache, to the same token."""
    assert cached_tokens(ask(server, prompt(1, TOKENS))) == 0
    twin = ask(server, prompt(1, TOKENS))
    assert cached_tokens(twin) == REUSED
    server.wait_for(lambda: len(chunk_files(directory)) == 6, 30, "write the chunks")
    return twin


def test_lossless_chunks_are_smaller_and_come_back_bit_for_bit(tmp_path):
    with cache_server(tmp_path, cache=disk_serde("lossless")) as writer:
        twin = store_prompt(writer, tmp_path)
    assert max(stored_sizes(tmp_path)) < 0.9 * ROW_BYTES  # float32: one byte of four is an exponent
    # a replica that was not told of lossless reads it all the same
    with cache_server(tmp_path) as reader:
        answer = ask(reader, prompt(1, TOKENS))
        assert cached_tokens(answer) == REUSED
        assert logprobs(answer) == logprobs(twin)
        assert reader.metrics().get("lmcache_ext:corrupt_chunks_total", 0) == 0


FINE = {"cachegen_key_bins": [256], "cachegen_value_bins": 256}


@pytest.mark.parametrize(("name", "options", "share"), [("fp8", {}, 0.26), ("cachegen", FINE, 0.24)])
def test_chunks_with_a_loss_are_small_and_nearly_the_same_kv(tmp_path, name, options, share):
    with cache_server(tmp_path, cache=disk_serde(name, **options)) as writer:
        twin = store_prompt(writer, tmp_path)
    assert max(stored_sizes(tmp_path)) < share * ROW_BYTES  # float32
    with cache_server(tmp_path, cache=disk_serde(name, **options)) as reader:
        answer = ask(reader, prompt(1, TOKENS))
        assert cached_tokens(answer) == REUSED
        assert reader.metrics().get("lmcache_ext:corrupt_chunks_total", 0) == 0
        assert logprobs(answer) != logprobs(twin)
        assert nearly_equal(answer, twin)
