"""A ConfigMap is changed under a server with traffic: each change arrives, and no request notices."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from tests.e2e.cache import CHUNK, ROW_BYTES, ask, cache_server, cached_tokens, evict, logprobs, prompt
from tests.e2e.test_remote import lm, standalone
from tests.kubelet import ConfigMapVolume

pytestmark = pytest.mark.e2e

NAME = "lmcache_config.yaml"
TOKENS = 3 * CHUNK + 40
REUSED = 3 * CHUNK
ARRIVES_S = 15.0
WRITTEN = "vllm:kv_offload_tiering_write_bytes_total"
READ = "vllm:kv_offload_tiering_read_bytes_total"


class Traffic:
    """Clients that send prompts, seen and new ones, one after the other until told to stop; all must be answered."""

    def __init__(self, server, clients: int = 2) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, client: int) -> None:
        with httpx.Client(base_url=self._server.url, timeout=60) as http:
            for turn in itertools.count():
                if self._stop.is_set():
                    return
                seed = 500 + turn % 3 if turn % 2 else 10_000 * (client + 1) + turn
                body = {"model": self._server.name, "prompt": prompt(seed, 2 * CHUNK + 9), "max_tokens": 2}
                answer = http.post("/openai/v1/completions", json=body)
                self.answered += 1
                if answer.status_code != 200:
                    self.failures.append(f"{answer.status_code}: {answer.text}")


class Tuned:
    """The server and the ConfigMap it mounts."""

    def __init__(self, server, volume) -> None:
        self.server = server
        self.volume = volume
        self.settings: dict[str, str] = {}

    def apply(self, **settings: str) -> dict:
        """`kubectl apply` with these settings changed; returns what the server shows once its engine has them."""
        self.settings |= settings
        self.volume.write({NAME: lines(self.settings)})
        seen = self.shown()
        wanted = seen["generation"]
        self.server.wait_for(lambda: self.shown()["generation"] > wanted, ARRIVES_S, "see the file")
        self.server.wait_for(self._engine_agrees, ARRIVES_S, "tell its engine's")
        return self.shown()

    def shown(self) -> dict:
        answer = self.server.get("/lmcache/v1/config")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _engine_agrees(self) -> bool:
        shown = self.shown()
        return [engine.get("digest") for engine in shown["engines"].values()] == [shown["digest"]]

    def sample(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        found = 0.0
        for line in self.server.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(label in series for label in wanted):
                found += float(value)
        return found


def lines(settings: dict[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in settings.items())


@contextmanager
def tuned_server(tmp_path, **settings: str) -> Iterator[Tuned]:
    volume = ConfigMapVolume(tmp_path / "mount", {NAME: lines(settings)})
    env = {"LMCACHE_CONFIG_FILE": str(tmp_path / "mount" / NAME)}
    options = {"args": ["--enable_lmcache_endpoints"], "cache": {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.25"}}
    with cache_server(gpu_blocks=40, env=env, **options) as server:
        tuned = Tuned(server, volume)
        tuned.settings = dict(settings)
        yield tuned


def test_a_configmap_is_changed_under_load_and_no_request_fails(tmp_path):
    with ExitStack() as stack:
        redis_url, (redis_process,) = standalone("redis", tmp_path, stack)
        lm_url, _ = lm(tmp_path, stack)
        start = {"chunk_size": "256", "max_local_cpu_size": "0.25", "remote_url": redis_url}
        with tuned_server(tmp_path, **start) as tuned:
            with Traffic(tuned.server) as traffic:
                capacity_shrinks_and_a_fixed_setting_is_refused(tuned)
                twin = the_remote_store_becomes_another(tuned, lm_url)
                redis_process.kill()
                a_freeze_arrives(tuned)
                a_bad_file_changes_nothing(tuned)
            assert traffic.failures == []
            assert traffic.answered > 20
            what_the_new_store_has_is_found_and_nothing_new_is_stored(tuned, twin)
            the_server_explains_what_it_does_not_find(tuned)


def capacity_shrinks_and_a_fixed_setting_is_refused(tuned):
    shown = tuned.apply(max_local_cpu_size="64Mi", chunk_size="128")
    assert tuned.sample("lmcache_ext:tier_capacity_bytes", tier="host") == 32 * ROW_BYTES
    assert shown["settings"]["max_local_cpu_size"]["live"]
    assert shown["settings"]["chunk_size"]["value"] == "256"
    (reason,) = shown["last_refusal"]["reasons"]
    assert f"{NAME}:1: chunk_size: 256 -> 128 needs a restart" in reason
    assert tuned.sample("lmcache_ext:config_reloads_total", outcome="partly") == 1


def the_remote_store_becomes_another(tuned, lm_url):
    """Returns the answer to `prompt(1)` that vLLM's own prefix cache helped with."""
    assert tuned.sample(WRITTEN, tier="1:redis") > 0
    shown = tuned.apply(remote_url=lm_url, chunk_size="256")
    assert shown["in_effect"]
    assert shown["settings"]["remote_url"]["value"] == lm_url
    ask(tuned.server, prompt(1, TOKENS))
    return ask(tuned.server, prompt(1, TOKENS))


def a_freeze_arrives(tuned):
    """And with it so little host memory that only the remote store still has `prompt(1)`."""
    tuned.apply(freeze="true", max_local_cpu_size="2Mi")
    tuned.server.wait_for(lambda: is_still(lambda: tuned.sample(WRITTEN, tier="1:lm")), 30, "finish what it had begun")
    tuned.apply(max_local_cpu_size="20Mi")


def a_bad_file_changes_nothing(tuned):
    before = tuned.shown()
    tuned.volume.write({NAME: lines(tuned.settings | {"freeze": "perhaps"})})
    tuned.server.wait_for(lambda: not tuned.shown()["in_effect"], ARRIVES_S, "refuse the file")
    after = tuned.shown()
    assert after["settings"] == before["settings"]
    assert "freeze: 'perhaps' is not a yes or a no" in after["last_refusal"]["reasons"][0]
    count = ("lmcache_ext:config_reloads_total", {"outcome": "invalid"})
    tuned.server.wait_for(lambda: tuned.sample(count[0], **count[1]) == 1, ARRIVES_S, "count the refusal")


def what_the_new_store_has_is_found_and_nothing_new_is_stored(tuned, twin):
    server = tuned.server
    written, read = tuned.sample(WRITTEN, tier="1:lm"), tuned.sample(READ, tier="1:lm")
    ask(server, prompt(2, TOKENS))
    evict(server)
    again = ask(server, prompt(1, TOKENS))
    assert cached_tokens(again) == REUSED
    assert logprobs(again) == logprobs(twin)
    assert cached_tokens(ask(server, prompt(2, TOKENS))) == 0
    assert tuned.sample(READ, tier="1:lm") > read
    assert tuned.sample(WRITTEN, tier="1:lm") == written > 0


def the_server_explains_what_it_does_not_find(tuned):
    explain = {seed: tuned.server.post("/lmcache/v1/explain", {"prompt": prompt(seed, TOKENS)}) for seed in (1, 3)}
    found, missing = explain[1].json(), explain[3].json()
    assert (found["reason"], found["gpu_tokens"] + found["cache_tokens"]) == ("all", REUSED)
    assert (missing["reason"], missing["first_missing_token"]) == ("frozen", 0)
    assert missing["tiers"] == {"host": "miss", "lm": "miss"}
    assert missing["text_after"]
    assert missing["components"]["chunk"] == f"blocks=2 row={ROW_BYTES}"


def is_still(value) -> bool:
    """Whether a number has stopped changing."""
    before = value()
    time.sleep(1.0)
    return value() == before


def test_a_file_that_is_edited_in_place_reaches_plain_vllm(tmp_path):
    path = tmp_path / NAME
    path.write_text("chunk_size: 256\nmax_local_cpu_size: 0.25\n")
    options = {"program": "vllm", "args": ["--enable-prompt-tokens-details"]}
    with cache_server(gpu_blocks=40, env={"LMCACHE_CONFIG_FILE": str(path)}, **options) as server:
        ask(server, prompt(1, TOKENS))
        path.write_text("chunk_size: 256\nmax_local_cpu_size: 0.25\nfreeze: true\n")
        server.wait_for(lambda: "is in effect: freeze: false -> true" in poked(server), ARRIVES_S, "take the file")
        ask(server, prompt(2, TOKENS))
        evict(server)
        assert cached_tokens(ask(server, prompt(1, TOKENS))) == REUSED
        assert cached_tokens(ask(server, prompt(2, TOKENS))) == 0
        assert server.metrics()["lmcache_ext:config_generation"] == 2


def poked(server) -> str:
    """The log, after a request that makes an idle engine take a step."""
    ask(server, prompt(3, 20), max_tokens=1)
    return server.log()
