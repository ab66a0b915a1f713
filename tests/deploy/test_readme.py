"""What the README tells a person to type on KServe does what it shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

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


def kubectl_commands(readme: Path) -> list[str]:
    """The indented lines of a README that call kubectl, comments off."""
    lines = [line.strip().partition("   #")[0] for line in readme.read_text().splitlines() if line.startswith("    ")]
    return [line.strip() for line in lines if line.startswith("kubectl ")]


READMES = [path for path in (ROOT / "deploy/README.md", *ROOT.glob("examples/*/README.md")) if kubectl_commands(path)]


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

        def run(command: str, folder: Path = ROOT) -> tuple[int, str, Cluster]:
            options = {"shell": True, "capture_output": True, "text": True, "timeout": 60, "check": False}
            done = subprocess.run(command, cwd=folder, env=env, **options)
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


@pytest.mark.e2e  # a second for each
@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_other_readmes_commands_create_all_they_name(type_in, readme):
    for command in kubectl_commands(readme):
        if command.startswith("kubectl create"):  # which sends protobuf
            command += " --dry-run=client -o yaml | kubectl apply -f -"
        code, said, _ = type_in(command, readme.parent)
        assert code == 0, f"{command}: {said}"
        assert all(line.endswith(" created") for line in said.splitlines()), said


@pytest.mark.e2e
@pytest.mark.parametrize("overlay", sorted((ROOT / "deploy/overlays").iterdir()), ids=lambda path: path.name)
def test_every_overlay_is_applied_whole(type_in, overlay):
    code, said, cluster = type_in(f"kubectl apply -k {overlay}")
    assert (code, cluster.refused) == (0, []), said
    assert len(said.splitlines()) == len(build(overlay))


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
