"""`lmcache-ext doctor` asked of a live server, once for each reason why a request may find nothing.

Two servers start, side by side: the one whose condition is changed, by its ConfigMap and by what happens to its Redis,
and one that can never share with it. The tests are one life of theirs, in order.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext import cli
from tests import servers
from tests.e2e.cache import CHUNK, ROW_BYTES, cache_server, evict, model
from tests.e2e.server import Server
from tests.e2e.test_reload import NAME, Tuned, lines
from tests.kubelet import ConfigMapVolume

pytestmark = pytest.mark.e2e

KEY = "the-servers-key"
HEAD = "You are a helpful assistant of the harbour office. " * 12  # 612 tokens: two chunks and a hundred
TAIL = " Tell me which ships are due, and where they are to berth. " * 8
ASKED = HEAD + "It is 10:41." + TAIL  # of four chunks
NUMBERS = itertools.count()
SALT = "the-salt-of-a-tenant"
ARGS = ["--enable_lmcache_endpoints", "--api-key", KEY]
SMALL = {"gpu_blocks": 12, "max_model_len": 1280, "wait": False}


class Patient:
    """A server under a ConfigMap, its Redis, and what the doctor says of it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.redis = stack.enter_context(servers.server("redis", directory))
        self.url = f"redis://localhost:{self.redis.port}"
        start = {"chunk_size": str(CHUNK), "max_local_cpu_size": "64Mi", "remote_url": self.url}
        volume = ConfigMapVolume(directory / "mount", {NAME: lines(start)})
        self.server = cache_server(env={"LMCACHE_CONFIG_FILE": f"{directory}/mount/{NAME}"}, **SMALL, args=ARGS)
        self.server._client.headers["Authorization"] = f"Bearer {KEY}"
        self.tuned = Tuned(self.server, volume)
        self.tuned.settings = dict(start)
        self.key_file = directory / "key"
        self.key_file.write_text(KEY + "\n")
        self._body = directory / "body.json"

    def send(self, text: str, **body: Any) -> None:
        """A request that leaves nothing in vLLM's own prefix cache, which is asked before ours."""
        self.server.complete(text, max_tokens=1, **body)
        evict(self.server, num_tokens=1200)

    def apply(self, **settings: str) -> None:
        """`kubectl apply` with these settings changed, until the engine has them; an idle one needs a request."""
        before = self.tuned.shown()["generation"]
        self.tuned.settings |= settings
        self.tuned.volume.write({NAME: lines(self.tuned.settings)})
        self.server.wait_for(lambda: self.tuned.shown()["generation"] > before, 15, "see the file")
        self.server.wait_for(self._takes_it, 15, "take the file")

    def _takes_it(self) -> bool:
        self.server.complete("?", max_tokens=1)
        return self.tuned._engine_agrees()

    def doctor(self, capsys: Any, *words: str, text: str | None = None, **body: Any) -> tuple[int, list[str]]:
        """Its exit code and its lines; with a text, the request with it is explained."""
        if text is not None:
            self._body.write_text(json.dumps({"prompt": text, **body}))
            words = ("--request", str(self._body), *words)
        capsys.readouterr()
        code = cli.main(["doctor", self.server.url, "--api-key-file", str(self.key_file), *words])
        return code, capsys.readouterr().out.splitlines()

    def reason(self, capsys: Any, text: str, **body: Any) -> str:
        """What it says of one request."""
        _, said = self.doctor(capsys, text=text, **body)
        (line,) = [line for line in said if ": this request: " in f": {line}"]
        return line


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[tuple[Patient, Server]]:
    with ExitStack() as stack:
        patient = Patient(tmp_path_factory.mktemp("doctor"), stack)
        options = {"cache": {"LMCACHE_CHUNK_SIZE": "128"}, "env": {"PYTHONHASHSEED": "7"}}
        stranger = cache_server(model=model(seed=1), args=ARGS, cores="0", **SMALL, **options)
        for server in (patient.server, stranger):
            stack.enter_context(server)
            stack.callback(server.kill9)  # nothing is left to write, and nobody to write it to
        for server in (patient.server, stranger):
            server.wait_ready()
        yield patient, stranger


@pytest.fixture
def patient(pair):
    return pair[0]


def problems(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("problem: ")]


def test_whoever_has_no_key_is_told_so_and_nothing_else(patient, capsys):
    capsys.readouterr()
    assert cli.main(["doctor", patient.server.url, "--prompt", ASKED]) == 0
    said = capsys.readouterr().out
    assert "note: /lmcache/v1/config: needs the server's API key" in said
    assert "note: this request could not be explained: " in said
    assert "namespace" not in said


def test_servers_that_never_share_are_told_each_part_in_which_they_differ(pair, capsys):
    patient, stranger = pair
    code, said = patient.doctor(capsys, "--peer", stranger.url)
    differing = {match[1]: match[2] for line in said if (match := re.search(r"never share: (\w+) differs: (.*)", line))}
    assert code == 1
    assert set(differing) == {"weights", "chunk", "hash"}
    assert differing["chunk"] == f"blocks=2 row={ROW_BYTES} and blocks=1 row={ROW_BYTES // 2}"
    assert "    the algorithm is the same, the seed is not: give PYTHONHASHSEED the same value on both, or none" in said


def test_a_server_agrees_with_itself(patient, capsys):
    assert any("have one namespace: " in line for line in patient.doctor(capsys, "--peer", patient.server.url + "/")[1])


def test_new_prompt_and_the_same_once_it_is_stored(patient, capsys):
    assert patient.reason(capsys, ASKED).startswith("problem: this request: not even the first chunk is known")
    patient.send(ASKED)
    code, said = patient.doctor(capsys, text=ASKED)
    assert code == 0, said
    assert any(line.startswith("ok: this request: every whole chunk was found") for line in said)


def test_prompt_without_a_whole_chunk(patient, capsys):
    line = patient.reason(capsys, "hello")
    assert line.startswith("problem: this request: the prompt has 5 tokens")
    assert f"no whole chunk of {CHUNK} is left to reuse" in line


def test_prefix_that_breaks_and_the_text_around(patient, capsys):
    line = patient.reason(capsys, ASKED.replace("10:41", "10:42"))
    assert "tokens up to 512 are known; in the 256 that follow this prompt differs" in line
    assert f"...{HEAD[512 - 24 : 512]!r} | {HEAD[512 : 512 + 24]!r}..." in line


def test_salt_that_nobody_stored_under(patient, capsys):
    code, said = patient.doctor(capsys, text=ASKED, cache_salt=SALT)
    assert code == 1
    assert any("not even the first chunk is known under this cache_salt" in line for line in said)
    assert "note: this request has a cache_salt, which is part of every key" in said
    assert SALT not in "\n".join(said)


@pytest.mark.parametrize(
    ("mode", "meaning", "of_request"),
    [
        ("bypass", "nothing is looked up or stored", "bypass is true: nothing is looked up"),
        ("freeze", "nothing new is stored", "freeze is true: what is new is not stored"),
    ],
)
def test_mode_that_the_configmap_sets(patient, capsys, mode, meaning, of_request):
    patient.apply(**{mode: "true"})
    code, said = patient.doctor(capsys, text=f"Nobody has ever asked for a {mode}. " * 20)
    patient.apply(**{mode: "false"})
    assert code == 1
    (line,) = [line for line in problems(said) if f"{mode} is true (" in line]
    assert re.search(rf"/{NAME}:\d\): {meaning}$", line)
    assert any(of_request in line for line in problems(said))


def test_file_that_is_refused(patient, capsys):
    settings = patient.tuned.settings
    patient.tuned.volume.write({NAME: lines(settings | {"chunk_size": "128"})})
    patient.server.wait_for(lambda: not patient.tuned.shown()["in_effect"], 15, "refuse the file")
    code, said = patient.doctor(capsys)
    patient.tuned.volume.write({NAME: lines(settings)})
    assert code == 1
    assert any("chunk_size: 256 -> 128 needs a restart" in line for line in problems(said))


def test_tenant_whose_quota_is_used_up(patient, capsys):
    quota = {"quotas": {"*": {"host": f"{ROW_BYTES}B", "name": "each"}, "unsalted": "1Gi"}}
    patient.apply(extra_config=json.dumps(quota), remote_url="null")
    patient.send(ASKED, cache_salt=SALT)
    code, said = patient.doctor(capsys, text=ASKED, cache_salt=SALT)
    patient.apply(extra_config="{}", remote_url=patient.url)
    assert code == 1
    assert any(f"the quota of each in host memory holds 1 chunks of {CHUNK} tokens" in line for line in problems(said))
    assert any(line.startswith("note: tenant each: ") and "were not kept" in line for line in said)


def test_store_that_is_full(patient, capsys):
    """And refuses what is new; what the server could not write is counted there, too."""
    assert patient.doctor(capsys, "--backend", patient.url)[0] == 0
    servers.command(patient.redis.port, "CONFIG", "SET", "maxmemory", "2mb")
    patient.send("The store has no room for this. " * 30)
    code, said = patient.doctor(capsys, "--backend", patient.url)
    servers.command(patient.redis.port, "CONFIG", "SET", "maxmemory", "0")
    assert code == 1
    assert any("when it is full: noeviction: it is full, and refuses what is new" in line for line in problems(said))
    assert any(re.match(r"note: redis: \d+ chunks were not written: ", line) for line in said), said


def test_chunks_that_were_stored_and_are_gone(patient, capsys):
    patient.send(ASKED)
    servers.command(patient.redis.port, "FLUSHALL")
    patient.apply(max_local_cpu_size=f"{2 * ROW_BYTES}B")
    patient.send("This takes the last of the room that there is. " * 20)
    line = patient.reason(capsys, ASKED)
    patient.apply(max_local_cpu_size="64Mi")
    assert "were stored by this server before and are gone: evicted, expired" in line


def test_store_that_is_down(patient, capsys):
    patient.redis.kill()
    patient.server.wait_for(lambda: is_down(patient), 30, "open the breaker")
    code, said = patient.doctor(capsys, "--backend", patient.url, text="What nobody has ever asked. " * 20)
    assert code == 1
    assert any(re.match(r"problem: redis: its circuit breaker is open \(failures so far: ", line) for line in said), (
        said
    )
    assert any("while the circuit breaker of redis is open" in line for line in problems(said))
    assert any(f"localhost:{patient.redis.port} does not answer: " in line for line in problems(said)), said


def is_down(patient: Patient) -> bool:
    """Whether its server has given Redis up, which it does when requests fail."""
    patient.server.complete(f"{next(NUMBERS)} asks: is the store there? " * 15, max_tokens=1)
    return patient.tuned.sample("lmcache_ext:tier_up", tier="redis") == 0
