"""What the README tells a person to type on KServe does what it shows."""

from __future__ import annotations

import re

import lmcache_ext
from tests.deploy.manifests import ROOT, build

README = (ROOT / "README.md").read_text()
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
