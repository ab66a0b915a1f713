"""deploy/overlays/p2p as its manifests say: a controller and two replicas, each a pod with an address of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.image import image
from tests.deploy.kserve_render import render
from tests.deploy.manifests import DEPLOY, build, of_kind
from tests.deploy.network import network
from tests.deploy.pod import Pod
from tests.deploy.test_kubelet import REUSED, SECRETS, START_S, TOKENS, inference_service, readable_model
from tests.e2e.cache import prompt
from tests.e2e.server import cached_tokens
from tests.servers import until

pytestmark = pytest.mark.e2e

CONTROLLER, REPLICAS = "lmcache-controller", ("qwen-predictor-7d4b9c-x2x9k", "qwen-predictor-7d4b9c-zzq8w")
# A client in the cluster: POST a body, print the answer.
CLIENT = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


class Cluster:
    """The overlay's three pods on a network, by name."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        built = build(DEPLOY / "overlays" / "p2p")
        (deployment,) = of_kind(built, "Deployment")
        service = inference_service(built)
        maps = {one["metadata"]["name"]: dict(one["data"]) for one in of_kind(built, "ConfigMap")}
        text = maps["lmcache-config"]["lmcache_config.yaml"]
        assert "max_local_cpu_size: 4.0" in text
        maps["lmcache-config"]["lmcache_config.yaml"] = text.replace("size: 4.0", "size: 0.5")  # two on one machine
        specs = {CONTROLLER: (deployment["spec"]["template"]["spec"], "server", {})}
        for core, name in enumerate(REPLICAS):
            spec = render(build(DEPLOY / "base"), on_core(service, core)).spec
            specs[name] = (spec, "cpu", {"/mnt/models": readable_model()})
        places = stack.enter_context(network(len(specs)))
        hosts = "".join(f"{address} {name}\n" for name, (_, address) in zip(specs, places, strict=True))
        self.pods: dict[str, Pod] = {}
        for (name, (spec, kind, mounts)), (namespace, address) in zip(specs.items(), places, strict=True):
            (directory / name).mkdir()
            where: dict[str, Any] = {"network": namespace, "hosts": hosts, "ip": address, "mounts": mounts}
            options = {"config_maps": maps, "secrets": SECRETS, **where}
            self.pods[name] = Pod(name, spec, image(kind), directory / name, **options)
            stack.callback(self.pods[name].kill)

    def post(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What a pod's service answers a client in the cluster."""
        said = self.pods[CONTROLLER].run("python", "-c", CLIENT, url, json.dumps(body), timeout_s=90.0)
        assert said is not None, f"no answer from {url}"
        answer: dict[str, Any] = json.loads(said)
        return answer

    def ask(self, replica: str, tokens: Sequence[int]) -> dict[str, Any]:
        body = {"model": "qwen", "prompt": tokens, "max_tokens": 4, "temperature": 0}
        return self.post(f"http://{replica}:8080/openai/v1/completions", body)

    def holders(self, tokens: Sequence[int]) -> set[str]:
        """The replicas whose host memory has a prompt, as the controller knows it."""
        return set(self.post(f"http://{CONTROLLER}:9000/lookup", {"tokens": tokens})["layout_info"])


def on_core(service: dict[str, Any], core: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(service))
    (bound,) = [one for one in found["spec"]["predictor"]["model"]["env"] if one["name"] == "VLLM_CPU_OMP_THREADS_BIND"]
    bound["value"] = str(core)
    return found


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        found = Cluster(tmp_path, stack)
        for pod in found.pods.values():
            pod.start()
        for pod in found.pods.values():
            pod.wait_started(START_S)
        yield found


def test_the_first_request_of_a_replica_is_answered_from_the_memory_of_the_other(cluster):
    one, two = REPLICAS
    tokens = prompt(1, TOKENS)
    computed = cluster.ask(one, tokens)
    assert cached_tokens(computed) == 0
    until(lambda: cluster.holders(tokens) == {one}, "the controller knows who has it", 30)
    fetched = cluster.ask(two, tokens)
    assert cached_tokens(fetched) == REUSED, cluster.pods[two].tail()
    assert fetched["choices"][0]["text"] == computed["choices"][0]["text"]
    assert f"need to load: {REUSED}" in cluster.pods[two].log()
    until(lambda: cluster.holders(tokens) == {one, two}, "both have it now", 30)
    assert "asks for no token" not in cluster.pods[one].log() + cluster.pods[two].log()
    for pod in cluster.pods.values():
        assert pod.probe("readinessProbe")
        assert pod.probe("livenessProbe")
