"""deploy/components/sentinel as its manifests say: six pods on a network, of which the master dies."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.deploy.image import Image
from tests.deploy.manifests import DEPLOY, build, of_kind
from tests.deploy.network import network
from tests.deploy.pod import Pod
from tests.deploy.test_components import PASSWORD, SECRETS, programs
from tests.servers import until

pytestmark = pytest.mark.e2e

FAILOVER_S = 60
# Our store, in the words of LMCACHE_EXTRA_CONFIG.
CLIENT = """
import json, sys
from lmcache_ext.stores.registry import open_store
store = open_store(sys.argv[1], options=json.loads(sys.argv[2]))
if sys.argv[3] == "put":
    store.put(b"n" * 16 + b"key", [memoryview(b"value")])
row = memoryview(bytearray(5))
print(store.get_into(b"n" * 16 + b"key", [row]), bytes(row).decode())
"""


class Pods:
    """Both StatefulSets' pods by name."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        built = build(DEPLOY / "overlays" / "sentinel")
        maps = {one["metadata"]["name"]: one["data"] for one in of_kind(built, "ConfigMap")}
        sets = of_kind(built, "StatefulSet")
        names = [
            (one, f"{one['metadata']['name']}-{index}") for one in sets for index in range(one["spec"]["replicas"])
        ]
        places = stack.enter_context(network(len(names)))
        addresses = {name: address for (_, name), (_, address) in zip(names, places, strict=True)}
        hosts = "".join(f"{addresses[name]} {name}.{one['spec']['serviceName']}\n" for one, name in names)
        hosts += "".join(f"{addresses[name]} {one['spec']['serviceName']}\n" for one, name in names)
        folder = programs("redis", directory / "bin")
        self.pods = {}
        for (one, name), (namespace, _) in zip(names, places, strict=True):
            (directory / name).mkdir()
            spec, user = one["spec"]["template"]["spec"], Image({}, 999, 999)
            options = {"config_maps": maps, "secrets": SECRETS, "programs": folder, "hosts": hosts}
            self.pods[name] = Pod(name, spec, user, directory / name, network=namespace, **options)
            stack.callback(self.pods[name].kill)
        self.config = maps["lmcache-config"]["lmcache_config.yaml"]
        (service,) = of_kind(built, "InferenceService")
        env = {one["name"]: one.get("value", "") for one in service["spec"]["predictor"]["model"]["env"]}
        self.options = env["LMCACHE_EXTRA_CONFIG"].replace("$(LMCACHE_AUTH)", PASSWORD)

    def cli(self, name: str, *words: str) -> str:
        port = "26379" if "sentinel" in name else "6379"
        return (self.pods[name].run("redis-cli", "-p", port, "--raw", *words, timeout_s=5.0) or "").strip()

    def master(self) -> str:
        """What all sentinels say it is; nothing while they do not agree."""
        words = ("SENTINEL", "get-master-addr-by-name", "redismaster")
        found = {self.cli(name, *words) for name in self.sentinels}
        return found.pop().split("\n")[0] if len(found) == 1 else ""

    @property
    def sentinels(self) -> list[str]:
        return [name for name in self.pods if "sentinel" in name]

    def known(self, name: str) -> dict[str, str]:
        """What a sentinel knows of the master."""
        words = self.cli(name, "SENTINEL", "MASTER", "redismaster").split("\n")
        return dict(zip(words[::2], words[1::2], strict=False))

    def are_acquainted(self) -> bool:
        """Whether all sentinels know each other and both replicas: from hello messages and INFO, within 10 s."""
        found = [self.known(name) for name in self.sentinels]
        return all((one.get("num-slaves"), one.get("num-other-sentinels")) == ("2", "2") for one in found)

    def written(self, name: str) -> int:
        """How far a master's stream of commands has come, in bytes."""
        lines = self.cli(name, "INFO", "replication").splitlines()
        return next(int(line.partition(":")[2]) for line in lines if line.startswith("master_repl_offset"))

    def followers(self, name: str, offset: int) -> int:
        """Replicas that have all of a master's stream up to there. One that is online may still have to be sent it."""
        lines = self.cli(name, "INFO", "replication").splitlines()
        found = [re.search(r"state=online,offset=(\d+)", line) for line in lines if line.startswith("slave")]
        return sum(one is not None and int(one[1]) >= offset for one in found)


@pytest.fixture
def pods(tmp_path):
    with ExitStack() as stack:
        yield Pods(tmp_path, stack)


def test_another_redis_takes_over_when_the_master_dies(pods):
    for pod in pods.pods.values():  # in parallel, as podManagementPolicy says: the sentinels' master may not answer yet
        pod.start()
    for pod in pods.pods.values():
        pod.wait_started(30)
    until(lambda: pods.master() == "redis-0.redis" and pods.followers("redis-0", 0) == 2, "the first is the master", 30)
    until(pods.are_acquainted, lambda: f"sentinels know all: {[pods.known(n) for n in pods.sentinels]}", 30)
    assert client(pods, "redis-1", "put") == "5 value"
    written = pods.written("redis-0")
    until(lambda: pods.followers("redis-0", written) == 2, "both replicas have it", 30)
    pods.pods["redis-0"].kill()
    until(lambda: pods.master() in ("redis-1.redis", "redis-2.redis"), "another master", FAILOVER_S)
    heir = pods.master().removesuffix(".redis")
    until(
        lambda: client(pods, heir, "get") == "5 value",
        lambda: f"what was replicated is found by the overlay's URL: {pods.pods[heir].tail()}",
        20,
    )
    pods.pods["redis-0"].start()
    pods.pods["redis-0"].wait_started(30)
    until(
        lambda: pods.followers(heir, 0) == 2,
        lambda: f"the old master follows: {pods.pods['redis-0'].tail()}",
        FAILOVER_S,
    )
    assert pods.master() == f"{heir}.redis"


def client(pods: Pods, name: str, verb: str) -> str:
    """What our store finds by the overlay's URL and the variables that its InferenceService gets, run in a pod."""
    url = yaml.safe_load(pods.config)["remote_url"]
    said = pods.pods[name].run("python", "-c", CLIENT, url, pods.options, verb, timeout_s=20)
    return (said or "").strip()
