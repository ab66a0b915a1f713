"""Two replicas share every prefix through a remote backend, with the YAML of the tutorials."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.cache import CHUNK, ask, cache_server, cached_tokens, external_hits, logprobs, prompt
from tests.servers import Server as Backend
from tests.servers import free_port, redis_binary, until

pytestmark = pytest.mark.e2e

SEEDS = itertools.count(100)
TOKENS = 6 * CHUNK + 100
REUSED = 6 * CHUNK


@contextmanager
def redis(directory: Path) -> Iterator[tuple[str, Backend]]:
    port = free_port()
    backend = Backend(redis_binary(), directory, "--port", str(port), "--save", "", port=port)
    backend.start()
    try:
        yield f"redis://localhost:{port}", backend
    finally:
        backend.kill()


@contextmanager
def lm(directory: Path) -> Iterator[tuple[str, Backend]]:
    """`lmcache_server localhost 65432` of the tutorial, on a free port."""
    port = free_port()
    backend = Backend(
        sys.executable, directory, "-m", "lmcache_ext.daemons.lmserver", "localhost", str(port), port=port
    )
    backend.start()
    try:
        yield f"lm://localhost:{port}", backend
    finally:
        backend.kill()


# KServe's guide with Redis; LMCache's example of a centralized server, whose serde is tolerated with a word
CONFIGS = {
    redis: 'local_cpu: true\nchunk_size: 256\nmax_local_cpu_size: 0.5\nremote_url: "{url}"\nremote_serde: "naive"\n',
    lm: 'chunk_size: 256\nlocal_cpu: true\nremote_url: "{url}"\nremote_serde: "cachegen"\n',
}


@pytest.mark.parametrize("backend", [redis, lm])
def test_replicas_share_a_prefix_and_survive_their_backend(tmp_path, backend):
    with backend(tmp_path) as (url, process):
        config = tmp_path / "lmcache_config.yaml"
        config.write_text(CONFIGS[backend].format(url=url))
        env = {"LMCACHE_CONFIG_FILE": str(config), "LMCACHE_USE_EXPERIMENTAL": "True"}
        with cache_server(gpu_blocks=40, env=env) as one, cache_server(gpu_blocks=40, env=env) as two:
            ask(one, prompt(1, TOKENS))
            twin = ask(one, prompt(1, TOKENS))
            assert cached_tokens(twin) == REUSED
            one.wait_for(lambda: written(one) >= REUSED * 8192, 30, "write the chunks")
            answer = ask(two, prompt(1, TOKENS))
            assert external_hits(two) == REUSED
            assert logprobs(answer) == logprobs(twin)

            process.kill()
            assert cached_tokens(ask(one, prompt(2, TOKENS))) == 0
            process.start()
            two.wait_for(lambda: shared_again(one, two), 120, "share again")


def written(server) -> float:
    return server.metrics().get("vllm:kv_offload_tiering_write_bytes_total", 0.0)


def shared_again(one, two) -> bool:
    """Whether a prompt that only one server computed is a hit for the other."""
    seed = next(SEEDS)
    before = written(one)
    ask(one, prompt(seed, CHUNK + 9), max_tokens=1)
    try:
        until(lambda: written(one) > before, "written", 3)
    except pytest.fail.Exception:
        return False
    return cached_tokens(ask(two, prompt(seed, CHUNK + 9), max_tokens=1)) == CHUNK
