"""An InferenceService as a cluster would run it: rendered like KServe; started, probed and ended like kubelet."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.image import image
from tests.deploy.kserve_render import render
from tests.deploy.manifests import DEPLOY, build, of_kind
from tests.deploy.pod import Pod
from tests.e2e.cache import CHUNK, model, prompt
from tests.e2e.server import cached_tokens
from tests.servers import Server as Backend
from tests.servers import free_port, redis_binary, until

pytestmark = pytest.mark.e2e

PASSWORD = "f3a9c04e"
SECRETS = {"lmcache-auth": {"password": PASSWORD}}
START_S = 150
PAUSE_S = 0.1
TOKENS = 3 * CHUNK + 9
REUSED = 3 * CHUNK
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


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    port = free_port()
    words = ["--port", str(port), "--save", "", "--requirepass", PASSWORD]
    backend = Backend(redis_binary(), directory, *words, port=port)
    backend.start()
    try:
        yield f'"redis://localhost:{port}"'
    finally:
        backend.kill()


def test_pod_keeps_every_pending_store_through_its_end(tmp_path):
    (tmp_path / "pod").mkdir()
    with redis(tmp_path) as url:
        cluster = Cluster("redis", tmp_path / "pod", remote_url=url, max_local_cpu_size="0.5")
        pod = cluster.pod
        try:
            pod.start()
            assert not pod.probe("readinessProbe")
            pod.wait_started(START_S)
            assert pod.probe("readinessProbe")
            assert pod.probe("livenessProbe")
            with Load(cluster, 1) as load:
                until(lambda: len(load.answered) >= 4 or bool(load.failed), "answers", 60)
                began = time.monotonic()
                assert pod.stop() == 0, pod.tail()
                took_s = time.monotonic() - began
            assert took_s < pod.spec["terminationGracePeriodSeconds"]
            assert "shutting down" in load.failed[0], load.failed  # the one that met the closed door
            pod.start()
            pod.wait_started(START_S)
            assert [cluster.hit(seed) for seed in load.answered] == [REUSED] * len(load.answered)
        finally:
            pod.kill()
