"""An InferenceService as a cluster would run it: rendered like KServe; started, probed, changed, ended like kubelet.

The tests are the life of one pod, in order; towards the end it is started a second time.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from tests.deploy.image import image
from tests.deploy.kserve_render import render
from tests.deploy.manifests import DEPLOY, EXAMPLES, build, of_kind
from tests.deploy.pod import Pod
from tests.deploy.test_monitoring import asked_for
from tests.e2e.cache import CHUNK, model, prompt
from tests.e2e.server import cached_tokens
from tests.lm_servers import serving
from tests.servers import Server as Backend
from tests.servers import free_port, redis_binary, until

pytestmark = pytest.mark.e2e

PASSWORD = "f3a9c04e"
SECRETS = {"lmcache-auth": {"password": PASSWORD}}
START_S = 150
ARRIVE_S = 15
PAUSE_S = 0.1
TOKENS = 3 * CHUNK + 9
REUSED = 3 * CHUNK
# Counters with labels begin with the first event; sizes are of tiers that know theirs, such as a disk.
NOT_IN_THIS_LIFE = {
    *("lmcache_ext:corrupt_chunks_total", "lmcache_ext:dropped_chunks_total", "lmcache_ext:store_failures_total"),
    *("lmcache_ext:abandoned_chunks_total", "lmcache_ext:hook_failures_total", "lmcache_ext:config_reloads_total"),
    *("lmcache_ext:tier_used_bytes", "lmcache_ext:tier_capacity_bytes"),
    *("lmcache_ext:tenant_charged_bytes", "lmcache_ext:tenant_quota_bytes"),  # nobody has a quota
    *("lmcache_ext:tenant_evicted_chunks_total", "lmcache_ext:tenant_rejected_chunks_total"),
}
# What differs on this machine: a tiny model from a volume, one core, little memory.
ARGS = ["--enforce-eager", "--dtype=float32", "--max-model-len=4608", "--num-gpu-blocks-override=40"]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "1", "HF_HUB_OFFLINE": "1"}


def inference_service(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The overlay's, for our model on a node without a GPU."""
    (found,) = copy.deepcopy(of_kind(manifests, "InferenceService"))
    served = found["spec"]["predictor"]["model"]
    served["runtime"] = "lmcache-vllm-cpu"
    served["storageUri"] = "pvc://models/tiny"
    served["args"] = [word for word in served["args"] if not word.startswith("--model_id=")] + ARGS
    served["env"] += [{"name": name, "value": value} for name, value in ENV.items()]
    return found


def readable_model() -> Path:
    """As KServe's storage initializer leaves it; safetensors writes for the owner alone."""
    path = model()
    for file in path.iterdir():
        file.chmod(0o644)
    return path


class Cluster:
    """The pod of one overlay, and its ConfigMap."""

    def __init__(self, overlay: str, directory: Path, **values: str) -> None:
        manifests = build(DEPLOY / "overlays" / overlay)
        maps = {one["metadata"]["name"]: dict(one["data"]) for one in of_kind(manifests, "ConfigMap")}
        self.text = maps["lmcache-config"]["lmcache_config.yaml"]
        maps["lmcache-config"]["lmcache_config.yaml"] = self.config(**values)
        rendered = render(build(DEPLOY / "base"), inference_service(manifests))
        self.pod = Pod(
            "qwen-predictor-7d4b9c-x2x9k",
            rendered.spec,
            image("cpu"),
            directory,
            config_maps=maps,
            secrets=SECRETS,
            ports={8080: free_port()},
            mounts={"/mnt/models": readable_model()},
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.pod.ports[8080]}", timeout=60.0)

    def config(self, **values: str) -> str:
        """The overlay's file with other values for some of its keys, or with keys it lacks."""
        lines = [line for line in self.text.splitlines() if line.partition(":")[0] not in values]
        return "\n".join([*lines, *(f"{key}: {value}" for key, value in values.items())]) + "\n"

    def apply(self, **values: str) -> None:
        """`kubectl apply` of a changed ConfigMap, and kubelet's next sync."""
        self.pod.volumes["lmcache-config"].write({"lmcache_config.yaml": self.config(**values)})

    def ask(self, seed: int) -> httpx.Response:
        body = {"model": "qwen", "prompt": prompt(seed, TOKENS), "max_tokens": 2, "temperature": 0}
        return self.http.post("/openai/v1/completions", json=body)

    def hit(self, seed: int) -> int:
        answer = self.ask(seed)
        assert answer.status_code == 200, answer.text
        return cached_tokens(answer.json())

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)


class Load:
    """Requests one after the other, each with a prompt nobody asked before, until `stop` or the first that fails."""

    def __init__(self, cluster: Cluster, first_seed: int) -> None:
        self.answered: list[int] = []
        self.failed: list[str] = []
        self._cluster, self._seeds = cluster, itertools.count(first_seed)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stopped.wait(PAUSE_S):
            seed = next(self._seeds)
            try:
                answer = self._cluster.ask(seed)
            except httpx.TransportError as error:
                self.failed.append(f"{seed}: {error!r}")
                return
            if answer.status_code != 200:
                self.failed.append(f"{seed}: {answer.status_code} {answer.text}")
                return
            self.answered.append(seed)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(60)


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    """What the overlay's ConfigMap points to."""
    port = free_port()
    words = ["--port", str(port), "--save", "", "--requirepass", PASSWORD]
    backend = Backend(redis_binary(), tmp_path_factory.mktemp("redis"), *words, port=port)
    yield backend.start()
    backend.kill()


@pytest.fixture(scope="module")
def lm():
    """Where it shall point later."""
    port = free_port()
    with serving("--http-port", str(port)) as server:
        yield SimpleNamespace(url=f'"lm://localhost:{server.port}"', http=port)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, redis):
    found = Cluster("redis", tmp_path_factory.mktemp("pod"), **common(f'"redis://localhost:{redis.port}"'))
    found.pod.start()
    yield found
    found.pod.kill()


def common(url: str) -> dict[str, str]:
    return {"max_local_cpu_size": "0.5", "remote_url": url}


def num_objects(lm: SimpleNamespace) -> int:
    """Objects that the cache server holds."""
    text = httpx.get(f"http://127.0.0.1:{lm.http}/metrics", timeout=5.0).text
    (line,) = [line for line in text.splitlines() if line.startswith("lmcache_server_objects ")]
    return int(line.split()[1])


def changes(cluster: Cluster, load: Load, lines: Sequence[str], **values: str) -> None:
    """Apply, and wait until the engine has said each of `lines` and answered twice after that."""
    seen = len(cluster.pod.log())
    cluster.apply(**values)
    until(lambda: all(line in cluster.pod.log()[seen:] for line in lines) or bool(load.failed), f"{lines}", ARRIVE_S)
    more(load, 2)


def more(load: Load, count: int) -> None:
    """Wait for more answers."""
    enough = len(load.answered) + count
    until(lambda: len(load.answered) >= enough or bool(load.failed), f"{count} answers", 60)
    assert load.failed == []


def test_probes_say_when_it_is_ready(cluster):
    pod = cluster.pod
    until(lambda: pod.probe("livenessProbe") or not pod.alive, "alive while it loads", START_S)
    assert pod.alive, pod.tail()
    assert not pod.probe("readinessProbe")
    pod.wait_started(START_S)
    assert pod.probe("readinessProbe")
    assert pod.probe("livenessProbe")


def test_readmes_last_command_shows_an_answer_from_the_cache(cluster):
    url = f"http://localhost:{cluster.pod.ports[8080]}"
    said = cluster.pod.run("python", str(EXAMPLES / "ask_twice.py"), url, timeout_s=60) or ""
    first, second = re.findall(r"^qwen: (\d+) prompt tokens, (\d+) from the cache, \d+ ms$", said, re.MULTILINE)
    assert first[1] == "0"
    assert int(second[1]) > int(first[0]) - CHUNK, said
    print(said)


def test_configmap_changes_arrive_under_load_and_fail_no_request(cluster, redis, lm):
    url = f'"redis://localhost:{redis.port}"'
    with Load(cluster, 1000) as load:
        more(load, 2)
        assert num_objects(lm) == 0
        changes(cluster, load, ["max_local_cpu_size"], **(common(url) | {"max_local_cpu_size": "0.25"}))
        changes(cluster, load, ["remote_url"], **common(lm.url))
        until(lambda: num_objects(lm) > 0, "chunks in the cache server", 30)
        changes(cluster, load, ["freeze"], **common(lm.url), freeze="true")
        frozen = settled(lambda: num_objects(lm))
        more(load, 4)
        assert num_objects(lm) == frozen
        changes(cluster, load, ["freeze"], **common(lm.url))
        until(lambda: num_objects(lm) > frozen, "chunks written again", 30)
    assert load.failed == []
    assert cluster.hit(1000) == REUSED  # stored before the first change, and never lost
    assert cluster.metric("lmcache_ext:config_reloads_total") == 4


def settled(read: Callable[[], int]) -> int:
    """The number once it has not changed for a second: what was under way has come through."""
    last, since = read(), time.monotonic()
    while time.monotonic() - since < 1.0:
        time.sleep(0.1)
        if (now := read()) != last:
            last, since = now, time.monotonic()
    return last


def test_pod_ends_in_time_and_loses_no_pending_store(cluster):
    pod = cluster.pod
    with Load(cluster, 1) as load:
        more(load, 4)
        began = time.monotonic()
        assert pod.stop() == 0, pod.tail()
        took_s = time.monotonic() - began
    assert took_s < pod.spec["terminationGracePeriodSeconds"]
    assert "shutting down" in load.failed[0], load.failed  # the one that met the closed door
    pod.start()
    pod.wait_started(START_S)
    assert [cluster.hit(seed) for seed in load.answered] == [REUSED] * len(load.answered)


def test_what_the_dashboard_and_the_alerts_ask_for_is_there(cluster):
    assert cluster.hit(9000) == 0  # stored, after what was fetched above
    until(lambda: cluster.metric("vllm:kv_offload_tiering_write_bytes_total") > 0, "written", 30)
    lines = cluster.http.get("/metrics").text.splitlines()
    exposed = {re.split(r"[{ ]", line, maxsplit=1)[0] for line in lines if not line.startswith("#")}
    ours = {name for name in asked_for() if not name.startswith("lmcache_server_")}
    assert ours - exposed - NOT_IN_THIS_LIFE == set()


def test_container_ends_with_its_engine(cluster):
    """Process 1 must not live on without it, nor leave a process that nobody waits for."""
    pod = cluster.pod
    assert [one for one in pod.processes() if one.status() == psutil.STATUS_ZOMBIE] == []
    (engine,) = [one for one in pod.processes() if "EngineCore" in " ".join(one.cmdline())]
    engine.kill()
    until(lambda: not pod.probe("livenessProbe"), "dead by its probe", 10)
    assert pod.process is not None
    assert pod.process.wait(30) == 1
