"""Many requests at once, on small pools: answers stay right, limits hold, nothing stays pinned."""

from __future__ import annotations

import concurrent.futures
import random
import threading

import httpx
import pytest

from tests.e2e.cache import CHUNK, ask, cache_server, cached_tokens, chunk_files, logprobs, prompt

pytestmark = pytest.mark.e2e

MIB = 1 << 20


def test_two_servers_on_one_directory_stay_under_its_limit(tmp_path):
    limit = 40 * MIB
    cache = {"LMCACHE_MAX_LOCAL_DISK_SIZE": "40Mi", "LMCACHE_MAX_LOCAL_CPU_SIZE": "128Mi"}
    sizes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            sizes.append(sum(size_of(path) for path in tmp_path.rglob("*")))

    watcher = threading.Thread(target=watch)
    with (
        cache_server(tmp_path, gpu_blocks=40, cache=cache, wait=False) as one,
        cache_server(tmp_path, gpu_blocks=40, cache=cache, wait=False) as two,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        one.wait_ready()
        two.wait_ready()
        watcher.start()
        try:
            asked = [(server, seed) for seed in range(12) for server in (one, two)]
            list(pool.map(lambda pair: ask(pair[0], prompt(pair[1], 5 * CHUNK + 9), max_tokens=1), asked))
            one.wait_for(lambda: len(chunk_files(tmp_path)) >= 8, 30, "fill the directory")
        finally:
            done.set()
            watcher.join()
    assert max(sizes) <= limit
    assert max(sizes) > limit // 2


def size_of(path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def test_concurrent_requests_with_cancellations_and_preemptions(tmp_path):
    """64 requests over shared prefixes on a GPU pool and host rows too small for them."""
    cache = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "32Mi", "LMCACHE_SAVE_DECODE_CACHE": "true"}
    with cache_server(tmp_path, gpu_blocks=40, cache=cache, args=["--max-num-seqs=16"]) as server:
        prompts = [prompt(seed, 3 * CHUNK + 40, shared=2 * CHUNK) for seed in range(8)]
        alone = [logprobs(ask(server, tokens, max_tokens=12)) for tokens in prompts]
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(lambda i: storm(server, prompts, i), range(64)))
        for index, answer in answers:
            assert answer is None or close(logprobs(answer), alone[index])
        again = ask(server, prompts[0], max_tokens=12)
        assert cached_tokens(again) >= 2 * CHUNK
        server.wait_for(lambda: idle(server), 30, "come to rest with no row pinned")
        assert server.metrics().get("lmcache_ext:hook_failures_total", 0) == 0


def storm(server, prompts, i):
    """One of many requests; every fourth client leaves early."""
    index = i % len(prompts)
    if i % 4 == 3:
        body = {"model": "tiny", "prompt": prompts[index], "max_tokens": 64, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/openai/v1/completions", json=body, timeout=120) as response:
            for _ in zip(range(random.Random(i).randrange(1, 4)), response.iter_lines(), strict=False):
                pass
        return index, None
    return index, ask(server, prompts[index], max_tokens=12)


def close(answer, alone) -> bool:
    """Equal but for the noise of another batch: the likeliest token and its logprob at the first step."""
    token = max(alone[0], key=alone[0].__getitem__)
    return abs(answer[0].get(token, -99.0) - alone[0][token]) < 0.02


def idle(server) -> bool:
    server.complete("x", max_tokens=1)
    values = server.metrics()
    return values["vllm:num_requests_running"] == 0 and values["vllm:kv_offload_cpu_cache_usage_perc"] == 0
