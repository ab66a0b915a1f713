"""What the README tells a person to type on KServe does what it shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

import lmcache_ext
from tests.deploy.cluster import Cluster
from tests.deploy.manifests import ROOT, build

README = (ROOT / "README.md").read_text()
CONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "{url}"}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
users: [{{name: u, user: {{}}}}]
current-context: x
"""
PLURAL = {
    "ClusterServingRuntime": "clusterservingruntime.serving.kserve.io",
    "InferenceService": "inferenceservice.serving.kserve.io",
}


def commands() -> dict[str, list[str]]:
    """Command -> the output shown below it, of the section's one console."""
    (block,) = re.findall(r"```console\n(.*?)```", README.split("## On KServe")[1].split("\n## ")[0], re.DOTALL)
    found: dict[str, list[str]] = {}
    for line in block.splitlines():
        if line.startswith("$ "):
            found[line[2:]] = []
        else:
            found[list(found)[-1]].append(line)
    return found


def test_five_commands_are_enough():
    assert len(commands()) <= 5
    assert not any("&&" in one or ";" in one for one in commands())


def test_what_is_applied_is_what_is_built():
    for command, output in commands().items():
        if match := re.search(r"(?:apply -k|kubectl kustomize) (deploy/\S+)", command):
            built = [
                f"{PLURAL.get(one['kind'], one['kind'].lower())}/{one['metadata']['name']}"
                for one in build(ROOT / match[1])
            ]
            assert output == [f"{name} created" for name in built]


@pytest.fixture
def type_in(tmp_path):
    """Runs a command of the README in a shell whose kubectl talks to a cluster; (exit code, output, the cluster)."""
    if shutil.which("kubectl") is None:
        assert not os.environ.get("CI"), "kubectl is missing"
        pytest.skip("no kubectl")
    with Cluster() as cluster:
        config = tmp_path / "config"
        config.write_text(CONFIG.format(url=cluster.url))
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "KUBECONFIG": str(config),
            "REGISTRY": "r.example.org",
        }

        def run(command: str) -> tuple[int, str, Cluster]:
            options = {"shell": True, "capture_output": True, "text": True, "timeout": 60, "check": False}
            done = subprocess.run(command, cwd=ROOT, env=env, **options)
            return done.returncode, done.stdout + done.stderr, cluster

        yield run


def test_kubectl_says_what_is_shown(type_in):
    typed = [command for command in commands() if "kubectl kustomize" in command or "kubectl apply" in command]
    typed += [command for command in commands() if command.startswith("kubectl wait")]
    assert len(typed) == 3
    for command in typed:
        code, said, cluster = type_in(command)
        assert (code, said.splitlines()) == (0, commands()[command])
    runtimes = [one for one in cluster.objects.values() if one["kind"] == "ClusterServingRuntime"]
    images = {box["image"].partition("/")[0] for one in runtimes for box in one["spec"]["containers"]}
    assert images == {"r.example.org"}


def test_that_cluster_takes_nothing_that_its_schemas_do_not_know(type_in):
    code, said, cluster = type_in(
        "kubectl kustomize deploy/base | sed s/readinessProbe/readinesProbe/ | kubectl apply -f -"
    )
    assert code == 1
    assert "readinesProbe" in said
    assert len(cluster.refused) == 2


def test_image_is_the_one_the_runtime_names():
    (build_command,) = [one for one in commands() if one.startswith("docker")]
    (tag,) = re.findall(r"-t \$REGISTRY/(\S+)", build_command)
    assert tag == f"kserve-lmcache-runtime:{lmcache_ext.__version__}-gpu"
    images = [box["image"] for one in build(ROOT / "deploy" / "base") for box in one["spec"]["containers"]]
    assert f"registry.example.com/{tag}" in images


def test_services_name_is_the_overlays():
    (wait,) = [one for one in commands() if one.startswith("kubectl wait")]
    (ask,) = [one for one in commands() if one.startswith("kubectl exec")]
    (service,) = [one for one in build(ROOT / "deploy/overlays/local-cpu") if one["kind"] == "InferenceService"]
    name = service["metadata"]["name"]
    assert wait.endswith(f"inferenceservice/{name}")
    assert f"deploy/{name}-predictor " in ask  # KServe's name for a Standard deployment
    assert (ROOT / ask.split("< ")[1]).exists()
