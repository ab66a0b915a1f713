"""A prefix computed once is not computed again: after eviction, after kill -9, by a second server."""

from __future__ import annotations

from pathlib import Path

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
    model,
    prompt,
)

pytestmark = pytest.mark.e2e

# 15 chunks and 100 tokens: vLLM's own prefix cache (blocks of 128) reuses exactly as many tokens as ours.
TOKENS = 15 * CHUNK + 100
REUSED = 15 * CHUNK


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def server(directory):
    with cache_server(directory, gpu_blocks=40) as running:
        yield running


@pytest.fixture(scope="module")
def twin(server):
    """The same request answered by vLLM's own prefix cache, at the boundary ours restores too."""
    cold = ask(server, prompt(1, TOKENS))
    assert cached_tokens(cold) == 0
    hit = ask(server, prompt(1, TOKENS))
    assert cached_tokens(hit) == REUSED
    assert external_hits(server) == 0
    return hit


def test_start_line_proves_that_the_cache_is_on(server, directory):
    log = server.log()
    assert f"disk {directory}" in log
    assert "LMCache-compatible KV cache is on" in log


def test_evicted_prefix_comes_back_from_host_memory_bit_for_bit(server, twin):
    evict(server)
    before = external_hits(server)
    answer = ask(server, prompt(1, TOKENS))
    assert cached_tokens(answer) == REUSED
    assert external_hits(server) - before == REUSED
    assert logprobs(answer) == logprobs(twin)
    assert server.metrics()["lmcache:num_hit_tokens_total"] >= REUSED
    assert server.metrics()["lmcache_ext:cache_active"] == 1
    assert f"Total tokens {TOKENS}, LMCache hit tokens: {REUSED}, need to load: {REUSED}" in server.log()


def test_chat_streaming_and_not_reuse_a_prefix(server):
    message = [{"role": "user", "content": "to be told again and again. " * 130}]
    body = {"messages": message, "max_tokens": 4, "temperature": 0, "stream_options": {"include_usage": True}}
    first = list(server.stream("/openai/v1/chat/completions", body))
    evict(server)
    again = list(server.stream("/openai/v1/chat/completions", body))
    assert cached_tokens(first[-1]) == 0
    assert cached_tokens(again[-1]) >= 14 * CHUNK
    evict(server)
    whole = server.chat(message[0]["content"], max_tokens=4, temperature=0)
    assert cached_tokens(whole) >= 14 * CHUNK
    told = "".join(event["choices"][0]["delta"].get("content") or "" for event in first if event["choices"])
    assert whole["choices"][0]["message"]["content"] == told


def test_another_salt_never_hits(server, twin):
    evict(server)
    before = external_hits(server)
    assert cached_tokens(ask(server, prompt(1, TOKENS), cache_salt="tenant-b")) == 0
    assert external_hits(server) == before
    evict(server)
    assert cached_tokens(ask(server, prompt(1, TOKENS), cache_salt="tenant-b")) == REUSED


def test_a_longer_prompt_reuses_the_shared_part(server, twin):
    evict(server)
    longer = prompt(1, 10 * CHUNK + 3) + prompt(55, 3 * CHUNK)
    assert cached_tokens(ask(server, longer)) == 10 * CHUNK


def test_second_server_hits_on_its_first_request(server, directory, twin):
    with cache_server(directory, gpu_blocks=40) as second:
        answer = ask(second, prompt(1, TOKENS))
        assert cached_tokens(answer) == REUSED
        assert logprobs(answer) == logprobs(twin)
        assert second.metrics()["vllm:kv_offload_tiering_read_bytes_total"] > 0


def test_another_model_of_the_same_shape_never_hits(server, directory, twin):
    with cache_server(directory, gpu_blocks=40, model=model(seed=7)) as other:
        assert cached_tokens(ask(other, prompt(1, TOKENS))) == 0
        assert external_hits(other) == 0


@pytest.fixture(scope="module")
def left():
    """Rows of an engine that was killed while it started."""
    path = Path("/dev/shm/vllm_offload_lmcache_ext-of-a-dead-engine.mmap")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def restarted(server, directory, left):
    """The server after kill -9."""
    before = rows_in_memory()
    server.kill9()
    assert rows_in_memory() == before == set()
    assert len(chunk_files(directory)) >= 15
    left.write_bytes(b"\0" * 4096)
    server.start()
    server.wait_ready()
    return server


def test_killed_server_hits_from_disk_after_its_restart_and_leaks_no_memory(twin, restarted):
    answer = ask(restarted, prompt(1, TOKENS))
    assert cached_tokens(answer) == REUSED
    assert logprobs(answer) == logprobs(twin)


@pytest.mark.usefixtures("restarted")
def test_rows_of_an_engine_killed_while_starting_are_reclaimed(left):
    assert not left.exists()
    assert len(rows_in_memory()) <= 1  # its own, which has a name while its processes open it


def rows_in_memory():
    return set(Path("/dev/shm").glob("vllm_offload_lmcache_ext-*"))
