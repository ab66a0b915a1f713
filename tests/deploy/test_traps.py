"""What goes wrong on KServe although the schema allows it; each trap is a test."""

from __future__ import annotations

import json
import re

import pytest

import lmcache_ext
from lmcache_ext.config import load_config
from runtime.server import FLUSH_FLOOR_S, HTTP_CLOSE_S
from tests.deploy.kserve_render import render
from tests.deploy.manifests import DEPLOY, build, containers, kustomizations, of_kind, quantity

GIB = 1 << 30
HOST_BYTES = 8 * GIB  # what vLLM's processes take beside the cache and, on CPU, the KV space
SHM_SPARE_BYTES = GIB  # what vLLM itself puts into /dev/shm, with tensor parallelism
RUNTIME_NAMES_OF_KSERVE = ("kserve-huggingfaceserver", "kserve-vllmserver", "kserve-tensorflow-serving")
RESOURCES = re.compile(r"cpu|memory|ephemeral-storage|hugepages-\S+|[a-z0-9.-]+\.[a-z]+/[a-z0-9-]+")

RUNTIMES = build(DEPLOY / "base")
OVERLAYS = [pytest.param(path, id=path.name) for path in kustomizations(DEPLOY / "overlays")]
ALL = [pytest.param(path, id=str(path.relative_to(DEPLOY))) for path in kustomizations(DEPLOY)]


@pytest.fixture(params=RUNTIMES, ids=lambda one: one["metadata"]["name"])
def runtime(request):
    return request.param


@pytest.fixture
def config(path, tmp_path):
    """The overlay's LMCache file, as the server reads it."""
    (found,) = [one for one in of_kind(build(path), "ConfigMap") if one["metadata"]["name"] == "lmcache-config"]
    file = tmp_path / "lmcache_config.yaml"
    file.write_text(found["data"]["lmcache_config.yaml"])
    return load_config(path=str(file), environ=addresses(service(path)))


def addresses(found):
    """What a pod's variables say of its own address, which no file can."""
    env = found["spec"]["predictor"]["model"]["env"]
    return {one["name"]: "10.1.0.7" for one in env if "status.podIP" in str(one.get("valueFrom"))}


def service(path):
    (one,) = of_kind(build(path), "InferenceService")
    return one


def test_runtime_has_the_one_container_the_controller_looks_for(runtime):
    assert [one["name"] for one in runtime["spec"]["containers"]] == ["kserve-container"]


def test_controller_leaves_the_image_alone(runtime):
    assert "serving.kserve.io/server-type" not in (runtime["metadata"].get("annotations") or {})
    assert runtime["metadata"]["name"] not in RUNTIME_NAMES_OF_KSERVE


def test_image_is_the_version_of_this_checkout(runtime):
    image = runtime["spec"]["containers"][0]["image"]
    kind = "cpu" if runtime["metadata"]["name"].endswith("-cpu") else "gpu"
    assert image == f"registry.example.com/kserve-lmcache-runtime:{lmcache_ext.__version__}-{kind}"


def test_runtime_serves_both_formats_but_never_selects_itself(runtime):
    formats = runtime["spec"]["supportedModelFormats"]
    assert {one["name"] for one in formats} == {"huggingface", "vLLM", "vllm"}
    assert not any(one["autoSelect"] for one in formats)


def test_probes_ask_the_engine_and_name_no_model(runtime):
    (container,) = runtime["spec"]["containers"]
    paths = {kind: container[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {
        "startupProbe": "/v2/health/ready",
        "readinessProbe": "/v2/health/ready",
        "livenessProbe": "/v2/health/live",
    }
    assert not any("successThreshold" in container[kind] and kind != "readinessProbe" for kind in paths)


def test_only_known_fields_of_the_service_are_templated(runtime):
    text = json.dumps(runtime["spec"]["containers"])
    assert set(re.findall(r"{{(.*?)}}", text)) == {".Name"}


def test_runtime_runs_as_nobody_special(runtime):
    security = runtime["spec"]["containers"][0]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_runtime_can_be_scraped(runtime):
    annotations = runtime["spec"]["annotations"]
    assert annotations == {"prometheus.kserve.io/port": "8080", "prometheus.kserve.io/path": "/metrics"}


def test_memory_holds_all_that_counts_against_it(runtime):
    """An emptyDir of memory is the container's memory too."""
    (container,) = runtime["spec"]["containers"]
    shm = sum(
        quantity(volume["emptyDir"]["sizeLimit"])
        for volume in runtime["spec"]["volumes"]
        if volume.get("emptyDir", {}).get("medium") == "Memory"
    )
    env = {one["name"]: one["value"] for one in container.get("env", [])}
    kv_space = int(env.get("VLLM_CPU_KVCACHE_SPACE", "0")) * GIB
    assert quantity(container["resources"]["limits"]["memory"]) >= shm + kv_space + HOST_BYTES
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("path", ALL)
def test_nothing_is_mounted_by_subpath(path):
    mounts = [mount for one in build(path) for box in containers(one) for mount in box.get("volumeMounts") or []]
    assert not any("subPath" in mount or "subPathExpr" in mount for mount in mounts)


@pytest.mark.parametrize("path", ALL)
def test_resource_names_exist(path):
    for box in (box for one in build(path) for box in containers(one)):
        for part in (box.get("resources") or {}).values():
            assert [name for name in part if not RESOURCES.fullmatch(name)] == []


@pytest.mark.parametrize("path", ALL)
def test_every_emptydir_has_a_limit(path):
    """What grows without one takes the node's memory or disk with it."""
    for one in build(path):
        spec = one.get("spec") or {}
        pods = [spec, spec.get("predictor") or {}, (spec.get("template") or {}).get("spec") or {}]
        for volume in (volume for pod in pods for volume in pod.get("volumes") or []):
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], volume["name"]


@pytest.mark.parametrize("path", OVERLAYS)
def test_grace_is_long_enough_to_drain_and_flush(path):
    predictor = service(path)["spec"]["predictor"]
    container = render(RUNTIMES, service(path)).container
    pre_stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    (timeout,) = [word for word in container["args"] if word.startswith("--shutdown-timeout=")]
    need_s = pre_stop_s + int(timeout.split("=")[1]) + FLUSH_FLOOR_S + HTTP_CLOSE_S
    assert predictor["terminationGracePeriodSeconds"] >= need_s


@pytest.mark.parametrize("path", OVERLAYS)
def test_cache_fits_into_shared_memory(path, config):
    pod = render(RUNTIMES, service(path))
    (mount,) = [one for one in pod.container["volumeMounts"] if one["mountPath"] == "/dev/shm"]
    volume = pod.volume(mount["name"])["emptyDir"]
    assert volume["medium"] == "Memory"
    assert quantity(volume["sizeLimit"]) >= config.live.host_capacity_bytes + SHM_SPARE_BYTES


@pytest.mark.parametrize("path", OVERLAYS)
def test_config_is_mounted_as_the_directory_it_is_read_from(path):
    pod = render(RUNTIMES, service(path))
    env = {one["name"]: one.get("value") for one in pod.container["env"]}
    (mount,) = [one for one in pod.container["volumeMounts"] if one["mountPath"] == "/lmcache"]
    assert env["LMCACHE_CONFIG_FILE"] == "/lmcache/lmcache_config.yaml"
    assert pod.volume(mount["name"])["configMap"]["name"] == "lmcache-config"
    (config,) = [one for one in of_kind(build(path), "ConfigMap") if one["metadata"]["name"] == "lmcache-config"]
    assert list(config["data"]) == ["lmcache_config.yaml"]


@pytest.mark.parametrize("path", OVERLAYS)
def test_config_says_only_what_has_an_effect(config):
    assert [note for note in config.notes if re.search("without effect|not needed", note)] == []
