"""The examples are valid, and the server takes what they give it; KServe's guide as it is, where KServe would."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lmcache_ext.config import load_config
from lmcache_ext.daemons.lm_args import parse as parse_lm_server
from lmcache_ext.host_memory import HostMemory
from lmcache_ext.manifests.check import check
from lmcache_ext.manifests.text import File
from runtime import args as runtime_args
from tests.deploy.kserve_models import read, written
from tests.deploy.kserve_render import Pod, render
from tests.deploy.manifests import DEPLOY, EXAMPLES, build, containers, load, of_kind, problems, quantity

SEEDS = Path(__file__).parents[1] / "data" / "seeds"
FOLDERS = sorted(path for path in EXAMPLES.iterdir() if (path / "README.md").exists())
ON_KSERVE = [path for path in FOLDERS if (path / "inferenceservice.yaml").exists()]
BASE = [DEPLOY / "base" / "gpu" / "runtime.yaml"]
MAX_README_LINES = 14


def named(folders):
    return pytest.mark.parametrize("folder", folders, ids=lambda path: path.name)


def manifests(folder: Path) -> list[dict]:
    return [one for path in sorted(folder.glob("*.yaml")) for one in load(path.read_text()) if "kind" in one]


def service(folder: Path) -> dict:
    (found,) = of_kind(manifests(folder), "InferenceService")
    return found


def rendered(found: dict) -> Pod:
    return render(build(DEPLOY / "base"), found)


def start(pod: Pod, config: str, tmp_path: Path, monkeypatch) -> runtime_args.Settings:
    """Parse the container's command line in its environment: what the server does first, and refuses if wrong."""
    shm = next(one["name"] for one in pod.container["volumeMounts"] if one["mountPath"] == "/dev/shm")
    shm_bytes = quantity(pod.volume(shm)["emptyDir"]["sizeLimit"])
    memory = HostMemory(shm_bytes, shm_bytes, quantity(pod.container["resources"]["limits"]["memory"]))
    monkeypatch.setattr(runtime_args, "read_host_memory", lambda: memory)
    file = tmp_path / "lmcache_config.yaml"
    file.write_text(config)
    for one in pod.container["env"]:
        monkeypatch.setenv(one["name"], one.get("value", "secret"))
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    return runtime_args.parse(pod.container["args"])


@named(FOLDERS)
def test_readme_answers_in_a_few_lines(folder):
    text = (folder / "README.md").read_text()
    assert len(text.splitlines()) <= MAX_README_LINES
    files = set(re.findall(r"[\w./-]+\.(?:yaml|json)\b", text))
    assert {path.name for path in folder.iterdir()} - {"README.md"} <= {Path(name).name for name in files}


@named(ON_KSERVE)
def test_api_server_would_take_all_of_it(folder):
    assert [line for one in manifests(folder) for line in problems(one)] == []
    assert written(read("V1beta1InferenceService", service(folder))) == service(folder)


@named(ON_KSERVE)
def test_server_takes_its_arguments_and_its_cache_fits(folder, tmp_path, monkeypatch):
    (config,) = of_kind(manifests(folder), "ConfigMap")
    settings = start(rendered(service(folder)), config["data"]["lmcache_config.yaml"], tmp_path, monkeypatch)
    assert settings.our_cache
    assert settings.notes == ()
    (name,) = [w.split("=")[1] for w in service(folder)["spec"]["predictor"]["model"]["args"] if "model_name=" in w]
    assert settings.model_name == name


@named(ON_KSERVE)
def test_check_finds_no_trap(folder):
    files = [File(str(path), path.read_text()) for path in (*sorted(folder.glob("*.yaml")), *BASE)]
    assert [one.message for one in check(files).findings if one.severity != "note"] == []


@named(ON_KSERVE)
def test_grace_covers_the_shutdown(folder):
    assert rendered(service(folder)).grace_s >= 50  # --shutdown-timeout 30 and 20


@named(ON_KSERVE)
def test_cache_server_takes_its_command(folder):
    for box in (box for one in of_kind(manifests(folder), "Deployment") for box in containers(one)):
        if box["name"] == "lmcache-server":
            assert box["command"][0] in ("lmcache_server", "lmcache_experimental_server")
            assert parse_lm_server(box["command"][1:], "lmcache_server").port == 8080


def test_compose_file_starts_two_servers_on_one_directory(tmp_path, monkeypatch):
    folder = EXAMPLES / "shared-directory"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    config = load_config(path=str(folder / "lmcache-config.yaml"), environ={})
    services = compose["services"].values()
    assert len({one["ports"][0].split(":")[0] for one in services}) == len(services) == 2
    for one in services:
        assert f"./kv:{config.disk_paths[0]}" in one["volumes"]
        assert int(one["shm_size"].removesuffix("gb")) * 10**9 >= config.live.host_capacity_bytes
        monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(folder / "lmcache-config.yaml"))
        assert runtime_args.parse(one["command"]).our_cache
    assert len(json.loads((folder / "request.json").read_text())["prompt"].split()) > 256


def test_plain_vllm_has_the_seeds_file():
    theirs = (SEEDS / "003_lmcache_config.yaml").read_text()
    assert (EXAMPLES / "plain-vllm" / "lmcache_config.yaml").read_text() == theirs


# ---- KServe's guide, as it is


def seed(name: str) -> list[dict]:
    return load((SEEDS / f"004_{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["configmap", "secret", "redis"])
def test_guides_manifests_that_kserve_accepts_are_valid_as_they_are(name):
    assert [line for one in seed(name) for line in problems(one)] == []


def test_guides_cache_server_is_refused_by_kubernetes_and_not_by_us():
    deployment, port = seed("lm_server_deployment")
    assert problems(port) == []
    (line,) = problems(deployment)
    assert "8080 is not of type 'string'" in line
    (box,) = containers(deployment)
    assert parse_lm_server(box["command"][1:], box["command"][0]).port == 8080


def test_guides_service_lacks_its_version_and_names_a_resource_that_does_not_exist():
    (found,) = seed("inferenceservice")
    assert any("apiVersion" in line for line in problems(found))
    assert problems({"apiVersion": "serving.kserve.io/v1beta1", **found}) == []  # the rest is the schema's
    assert "nvidia.com.gpu" in found["spec"]["predictor"]["model"]["resources"]["requests"]


def test_guides_arguments_work_as_they_are(tmp_path, monkeypatch):
    """With quotes within an argument, a mixture of dashes and underscores, and the legacy variable."""
    (found,) = seed("inferenceservice")
    found["spec"]["predictor"]["model"]["runtime"] = "lmcache-vllm"
    (config,) = seed("configmap")
    settings = start(rendered(found), config["data"]["lmcache_config.yaml"], tmp_path, monkeypatch)
    assert settings.our_cache
    assert settings.model_names[0] == "llama3"
    assert settings.engine.kv_transfer_config.kv_role == "kv_both"
    assert settings.engine.max_model_len == 10000
