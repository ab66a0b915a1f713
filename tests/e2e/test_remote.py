"""Two replicas share every prefix through a remote backend, with the YAML files that people were given.

`tests/data/seeds` has them verbatim; only hosts and ports are replaced here, and the scheme where it is another backend
than the guide's Redis.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from tests import mooncake_servers, servers
from tests.e2e.cache import CHUNK, ask, cache_server, cached_tokens, external_hits, logprobs, prompt
from tests.e2e.server import Server
from tests.servers import until

pytestmark = pytest.mark.e2e

SEEDS = itertools.count(100)
DATA = Path(__file__).parents[1] / "data" / "seeds"
TOKENS = 6 * CHUNK + 100
REUSED = 6 * CHUNK
Backend = tuple[str, Sequence[servers.Server]]
"""The URL, and the processes that may be ended and started again."""


def standalone(kind: str, directory: Path, stack: ExitStack) -> Backend:
    server = stack.enter_context(servers.server(kind, directory))
    return f"{kind}://localhost:{server.port}", [server]


def sentinel(directory: Path, stack: ExitStack) -> Backend:
    master = stack.enter_context(servers.server("redis", directory))
    watches = stack.enter_context(servers.sentinels("redis", directory, master, num=2))
    return "redis-sentinel://" + ",".join(f"localhost:{watch.port}" for watch in watches), [master]


def cluster(directory: Path, stack: ExitStack) -> Backend:
    nodes = stack.enter_context(servers.cluster("redis", directory))
    return "redis-cluster://" + ",".join(f"localhost:{node.port}" for node in nodes), nodes


def lm(directory: Path, stack: ExitStack) -> Backend:
    """`lmcache_server localhost 65432` of the tutorial, on a free port."""
    port = servers.free_port()
    command = ["-m", "lmcache_ext.daemons.lmserver", "localhost", str(port)]
    server = servers.Server(sys.executable, directory, *command, port=port)
    stack.callback(server.kill)
    return f"lm://localhost:{port}", [server.start()]


def mooncake(directory: Path, stack: ExitStack) -> Backend:
    """A master; the engines bring the memory."""
    master = stack.enter_context(mooncake_servers.master(directory))
    return f"mooncakestore://localhost:{master.port}/", [master]


BACKENDS: dict[str, Callable[[Path, ExitStack], Backend]] = {
    "redis": lambda directory, stack: standalone("redis", directory, stack),
    "redis-sentinel": sentinel,
    "redis-cluster": cluster,
    "valkey": lambda directory, stack: standalone("valkey", directory, stack),
    "lm": lm,
    "mooncake": mooncake,
}


def seed_004(url: str) -> str:
    """KServe's guide: the ConfigMap's file, with the line for the lm server where that is used."""
    text: str = yaml.safe_load((DATA / "004_configmap.yaml").read_text())["data"]["lmcache_config.yaml"]
    if url.startswith("lm:"):
        line = (DATA / "004_lm_server.yaml").read_text().strip()
        text, num_replaced = re.subn(r"remote_url:.*", line, text)
        assert num_replaced == 1
    return with_url(text, url)


def seed_003(url: str) -> str:
    """LMCache's example of a centralized server."""
    return with_url((DATA / "003_lmcache_config.yaml").read_text(), url)


def with_url(text: str, url: str) -> str:
    changed, num_replaced = re.subn(r'(remote_url: ")[^"]*"', rf'\g<1>{url}"', text)
    assert num_replaced == 1
    return changed


@contextmanager
def replicas(directory: Path, text: str) -> Iterator[tuple[Server, Server]]:
    """Two servers with this file; they start at the same time."""
    config = directory / "lmcache_config.yaml"
    config.write_text(text)
    env = {"LMCACHE_CONFIG_FILE": str(config), "LMCACHE_USE_EXPERIMENTAL": "True"}
    options = {"gpu_blocks": 40, "env": env, "wait": False}
    with cache_server(**options) as one, cache_server(**options) as two:
        for server in (one, two):
            server.wait_ready()
        yield one, two


@pytest.fixture(autouse=True)
def no_hash_seed(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


@pytest.mark.parametrize("name", BACKENDS)
def test_replicas_share_a_prefix_and_survive_their_backend(tmp_path, name):
    with ExitStack() as stack:
        url, processes = BACKENDS[name](tmp_path, stack)
        one, two = stack.enter_context(replicas(tmp_path, seed_004(url)))
        ask(one, prompt(1, TOKENS))
        twin = ask(one, prompt(1, TOKENS))
        assert cached_tokens(twin) == REUSED
        one.wait_for(lambda: written(one) >= REUSED * 8192, 30, "write the chunks")
        answer = ask(two, prompt(1, TOKENS))
        assert external_hits(two) == REUSED
        assert logprobs(answer) == logprobs(twin)

        for process in processes:
            process.kill()
        assert cached_tokens(ask(one, prompt(2, TOKENS))) == 0
        for process in processes:
            process.start()
        two.wait_for(lambda: shared_again(one, two), 60, "share again")


def test_replicas_share_through_the_example_of_a_centralized_server(tmp_path):
    with ExitStack() as stack:
        url, _ = lm(tmp_path, stack)
        one, two = stack.enter_context(replicas(tmp_path, seed_003(url)))
        assert f"remote {url} as cachegen" in one.log()
        ask(one, prompt(1, TOKENS))
        twin = ask(one, prompt(1, TOKENS))
        assert cached_tokens(twin) == REUSED
        one.wait_for(lambda: written(one) >= REUSED * 8192, 30, "write the chunks")
        answer = ask(two, prompt(1, TOKENS))
        assert external_hits(two) == REUSED
        assert logprobs(answer) != logprobs(twin)  # there is a loss, and random weights make much of it
        assert two.metrics().get("lmcache_ext:corrupt_chunks_total", 0) == 0


def written(server: Server) -> float:
    return server.metrics().get("vllm:kv_offload_tiering_write_bytes_total", 0.0)


def shared_again(one: Server, two: Server) -> bool:
    """Whether a prompt that only one server computed is a hit for the other."""
    seed = next(SEEDS)
    before = written(one)
    ask(one, prompt(seed, CHUNK + 9), max_tokens=1)
    try:
        until(lambda: written(one) > before, "written", 3)
    except pytest.fail.Exception:
        return False
    return cached_tokens(ask(two, prompt(seed, CHUNK + 9), max_tokens=1)) == CHUNK
