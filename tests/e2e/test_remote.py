"""Two replicas share every prefix through a remote backend, with the YAML files that people were given.

`tests/data/seeds` has them verbatim; only hosts and ports are replaced here, and the scheme where it is another backend
than the guide's Redis. Two servers start with Redis; the file is then changed under them, backend by backend.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
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


class Replicas:
    """Two servers that read one file; `use` starts them, later it changes the file under them."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._config = directory / "lmcache_config.yaml"
        self._stack = stack
        self._servers: list[Server] = []

    def use(self, text: str) -> tuple[Server, Server]:
        """Both servers, with this file in effect."""
        in_effect = [server.log().count("is in effect") for server in self._servers]
        self._config.write_text(text)
        if not self._servers:
            self._start()
        for server, before in zip(self._servers, in_effect, strict=False):
            server.wait_for(lambda s=server, n=before: stepped(s).count("is in effect") > n, 60, "use the file")
        one, two = self._servers
        return one, two

    def _start(self) -> None:
        env = {"LMCACHE_CONFIG_FILE": str(self._config), "LMCACHE_USE_EXPERIMENTAL": "True"}
        for _ in range(2):  # at the same time
            self._servers.append(self._stack.enter_context(cache_server(gpu_blocks=40, env=env, wait=False)))
        for server in self._servers:
            server.wait_ready()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).delenv("PYTHONHASHSEED", raising=False)
        yield Replicas(tmp_path_factory.mktemp("replicas"), stack)


@pytest.mark.parametrize("name", BACKENDS)
def test_replicas_share_a_prefix_and_survive_their_backend(replicas, tmp_path, name):
    with ExitStack() as stack:
        url, processes = BACKENDS[name](tmp_path, stack)
        both = Replicas(tmp_path, stack) if name == "mooncake" else replicas  # engines bring its memory, at their start
        one, two = both.use(seed_004(url))
        tokens = prompt(next(SEEDS), TOKENS)
        written_before, hits_before = written(one), external_hits(two)
        ask(one, tokens)
        twin = ask(one, tokens)
        assert cached_tokens(twin) == REUSED
        one.wait_for(lambda: written(one) >= written_before + REUSED * 8192, 30, "write the chunks")
        answer = ask(two, tokens)
        assert external_hits(two) == hits_before + REUSED
        assert logprobs(answer) == logprobs(twin)

        for process in processes:
            process.kill()
        assert cached_tokens(ask(one, prompt(next(SEEDS), TOKENS))) == 0
        for process in processes:
            process.start()
        two.wait_for(lambda: shared_again(one, two), 60, "share again")


def test_with_admission_a_prompt_travels_when_a_second_request_uses_it(replicas, tmp_path):
    with ExitStack() as stack:
        url, (process,) = BACKENDS["redis"](tmp_path, stack)
        one, two = replicas.use(seed_004(url) + "remote_min_uses: 2\n")
        tokens = prompt(next(SEEDS), TOKENS)
        dropped, sent = one.metrics().get("lmcache_ext:dropped_chunks_total", 0.0), written(one)
        ask(one, tokens)
        wanted = dropped + REUSED / CHUNK
        one.wait_for(lambda: one.metrics().get("lmcache_ext:dropped_chunks_total", 0.0) >= wanted, 30, "drop them")
        assert servers.command(process.port, "DBSIZE") == b":0\r\n"
        ask(one, tokens)
        one.wait_for(lambda: written(one) >= sent + REUSED * 8192, 30, "write the chunks")
        assert cached_tokens(ask(two, tokens, max_tokens=1)) == REUSED


def test_replicas_share_through_the_example_of_a_centralized_server(tmp_path):
    with ExitStack() as stack:
        url, _ = lm(tmp_path, stack)
        one, two = Replicas(tmp_path, stack).use(seed_003(url))
        assert f"remote {url} as cachegen" in one.log()
        ask(one, prompt(1, TOKENS))
        twin = ask(one, prompt(1, TOKENS))
        assert cached_tokens(twin) == REUSED
        one.wait_for(lambda: written(one) >= REUSED * 8192, 30, "write the chunks")
        answer = ask(two, prompt(1, TOKENS))
        assert external_hits(two) == REUSED
        assert logprobs(answer) != logprobs(twin)  # there is a loss, and random weights make much of it
        assert two.metrics().get("lmcache_ext:corrupt_chunks_total", 0) == 0


def stepped(server: Server) -> str:
    """The log after one more step: a change takes effect between two steps."""
    ask(server, prompt(next(SEEDS), 16), max_tokens=1)
    return server.log()


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
