"""Real engines and a real controller process: what an engine stores is known, whatever happens to the controller."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.cache import ask, cache_server, cached_tokens, external_hits, prompt
from tests.e2e.server import ROOT, free_port
from tests.servers import until

pytestmark = pytest.mark.e2e
TOKENS = prompt(1, 1002)  # seed 003's 1,002 tokens: three chunks of 256
SEEDS = ROOT / "tests" / "data" / "seeds"
WAIT_S = 40.0  # a controller that was away is tried again after up to 15 s


class Controller:
    """`lmcache_controller` as the tutorial starts it, on free ports."""

    def __init__(self, directory: Path) -> None:
        self.ports = {name: free_port() for name in ("http", "pull", "reply")}
        self._log = directory / "controller.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        monitors = json.dumps({name: self.ports[name] for name in ("pull", "reply")})
        words = ["--host", "localhost", "--port", str(self.ports["http"]), "--monitor-ports", monitors]
        command = [sys.executable, "-m", "lmcache_ext.daemons.controller", *words]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        until(lambda: self.get("/health") is not None, "the controller is up")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def get(self, path: str) -> Any:
        try:
            return httpx.get(f"http://127.0.0.1:{self.ports['http']}{path}").json()
        except httpx.TransportError:
            return None

    def lookup(self, tokens: list[int]) -> Any:
        answer = httpx.post(f"http://127.0.0.1:{self.ports['http']}/lookup", json={"tokens": tokens})
        return answer.json()["layout_info"]


@pytest.fixture
def controller(tmp_path):
    running = Controller(tmp_path)
    running.start()
    yield running
    running.kill()


def test_an_engine_tells_what_it_stores_and_survives_the_controllers_death(controller):
    cache = {
        "LMCACHE_ENABLE_CONTROLLER": "true",
        "LMCACHE_LMCACHE_INSTANCE_ID": "lmcache_instance_1",
        "LMCACHE_CONTROLLER_PULL_URL": f"localhost:{controller.ports['pull']}",
        "LMCACHE_CONTROLLER_REPLY_URL": f"localhost:{controller.ports['reply']}",
        "LMCACHE_LMCACHE_WORKER_PORTS": "8500",
    }
    with cache_server(cache=cache, max_model_len=2048) as server:
        until(lambda: len(controller.get("/controller/workers")["workers"]) == 1, "the engine has registered")
        first = ask(server, TOKENS)
        expected = {"lmcache_instance_1": ["LocalCPUBackend", 768]}
        until(lambda: controller.lookup(TOKENS) == expected, "its chunks are known, under vLLM's own hashes")
        assert controller.lookup([1, *TOKENS]) == {}

        controller.kill()
        ask(server, prompt(2, 1002))  # stored while nobody listens
        again = ask(server, TOKENS)
        assert again["choices"][0]["text"] == first["choices"][0]["text"]
        assert cached_tokens(again) >= 768

        controller.start()
        until(lambda: controller.lookup(prompt(2, 1002)) == expected, "all of it is told again", WAIT_S)
        assert controller.lookup(TOKENS) == expected
        assert server.log().count("Registered at the controller") == 2
        assert server.stop() == 0
        assert controller.get("/controller/workers")["workers"] == []


def seed_file(number: int, controller: Controller, directory: Path) -> tuple[Path, dict[str, int]]:
    """The tutorial's file of one instance, its ports (which may be taken here) exchanged for free ones."""
    text = (SEEDS / f"003_p2p_example{number}.yaml").read_text()
    written = yaml.safe_load(text)
    ports = {name: free_port() for name in ("p2p_init_ports", "p2p_lookup_ports", "lmcache_worker_ports")}
    for name, port in ports.items():
        text = text.replace(f"{name}: {written[name]}", f"{name}: {port}")
    text = text.replace("localhost:8300", f"localhost:{controller.ports['pull']}")
    text = text.replace("localhost:8400", f"localhost:{controller.ports['reply']}")
    path = directory / f"p2p_example{number}.yaml"
    path.write_text(
        text.replace("max_local_cpu_size: 5", "max_local_cpu_size: 0.5")
    )  # two engines on one small machine
    return path, ports


def test_two_engines_of_the_tutorial_share_what_either_computes(controller, tmp_path):
    (one, ports), (two, _) = (seed_file(number, controller, tmp_path) for number in (1, 2))
    options: dict[str, Any] = {"max_model_len": 2048, "wait": False}
    with (
        cache_server(env={"LMCACHE_CONFIG_FILE": str(one), "PYTHONHASHSEED": "123"}, **options) as first,
        cache_server(env={"LMCACHE_CONFIG_FILE": str(two), "PYTHONHASHSEED": "123"}, **options) as second,
    ):
        first.wait_ready()
        second.wait_ready()
        until(lambda: len(controller.get("/controller/workers")["workers"]) == 2, "both have registered")
        computed = ask(first, TOKENS)
        until(lambda: "lmcache_instance_1" in controller.lookup(TOKENS), "its chunks are known")
        fetched = ask(second, TOKENS)
        assert cached_tokens(fetched) == external_hits(second) == 768
        assert fetched["choices"][0] == computed["choices"][0]
        peer, lookup = (f"localhost:{ports[name]}" for name in ("p2p_init_ports", "p2p_lookup_ports"))
        log = second.log()
        assert f"Got layout info from controller: ('lmcache_instance_1', 'LocalCPUBackend', 3, '{peer}')" in log
        assert f"Established connection to peer_init_url {peer}. The peer_lookup_url: {lookup}" in log
        assert "Total tokens 1002, LMCache hit tokens: 768, need to load: 768" in log
        assert "nixl: TCP stands in" in log
        until(lambda: len(controller.lookup(TOKENS)) == 2, "the second holds them now, too")

        other = prompt(3, 1002)  # the other way round
        computed = ask(second, other)
        until(lambda: "lmcache_instance_2" in controller.lookup(other), "its chunks are known")
        fetched = ask(first, other)
        assert cached_tokens(fetched) == 768
        assert fetched["choices"][0] == computed["choices"][0]

        lost = prompt(4, 1002)  # computed by an engine that is gone without a word when the other asks for it
        ask(first, lost)
        until(lambda: "lmcache_instance_1" in controller.lookup(lost), "its chunks are known")
        first.kill9()
        assert cached_tokens(ask(second, lost)) == 0
        assert cached_tokens(ask(second, TOKENS)) >= 768
        assert second.stop() == 0
