"""The Dockerfile, as far as it can be judged without an engine that builds images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

import lmcache_ext
from scripts.check_image import silent_vllm
from tests.deploy.image import DOCKERFILE, image, instructions, stages
from tests.deploy.manifests import ROOT

LINT_S = 60
# What a container needs of its image to run with a read-only root and any uid.
WRITABLE = {"HOME": "/tmp", "HF_HOME": "/tmp/huggingface"}


def runs(target: str) -> str:
    """All that is run to build a target, its bases included."""
    base, own = stages()[target]
    return (runs(base) if base in stages() else "") + "\n".join(rest for name, rest in own if name == "RUN")


def test_hadolint_has_no_complaint():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=LINT_S, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_targets_are_those_the_manifests_name():
    assert {"gpu", "cpu", "server"} <= stages().keys()
    tags = set(re.findall(r"kserve-lmcache-runtime:(\S+)", DOCKERFILE.read_text()))
    assert tags == {f"{lmcache_ext.__version__}-{kind}" for kind in ("gpu", "cpu", "server")}


def test_gpu_is_what_is_built_unless_told_otherwise():
    assert list(stages())[-1] == "gpu"


@pytest.mark.parametrize("target", ["gpu", "cpu", "server"])
def test_image_runs_as_nobody_special_and_writes_below_tmp(target):
    found = image(target)
    assert (found.uid, found.gid) == (1000, 1000)
    assert found.env.items() >= WRITABLE.items()
    assert found.env["USER"]  # getpass would look the uid up, and find no name


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_server_is_process_one_and_spawns(target):
    entry = [json.loads(rest) for name, rest in stages()[target][1] if name == "ENTRYPOINT"]
    assert entry == [["python", "-m", "runtime"]]
    assert image(target).env["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_both_bases_set_the_same_environment():
    cpu, gpu = image("cpu").env, dict(image("gpu").env)
    assert gpu.pop("CUDA_HOME") == "/usr/local/cuda"
    assert cpu == gpu


@pytest.mark.parametrize("target", ["gpu", "cpu", "server"])
def test_every_install_is_constrained_and_checked(target):
    installs = re.findall(r"pip install ([^&]+)", runs(target))
    assert installs
    assert all("--constraint constraints.txt" in words for words in installs)
    assert f"check_image.py {target}" in runs(target)


@pytest.mark.parametrize("target", ["gpu", "cpu", "server"])
def test_versions_are_those_that_ci_installs(target):
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, version in re.findall(r"(\S+)==([\w.]+)", runs(target)):
        assert version.partition("+")[0] == pinned[name], name


@pytest.mark.e2e  # ten seconds of vLLM's imports
def test_this_environment_is_what_the_cpu_image_must_be():
    """The same check that ends the image's build."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_image.py", "cpu"],
        capture_output=True,
        text=True,
        timeout=LINT_S,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_check_of_an_image_finds_a_torch_for_another_machine():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_image.py", "gpu"],
        capture_output=True,
        text=True,
        timeout=LINT_S,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert "is for CUDA None" in done.stderr
    assert "vllm is 0.32.0+cpu, expected 0.32.0" in done.stderr


def test_check_of_an_image_finds_a_command_vllm_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert list(silent_vllm("cpu")) == ["no command vllm: No such file or directory"]
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho PackageNotFoundError: vllm >&2\nexit 1\n")
    program.chmod(0o755)
    assert list(silent_vllm("cpu")) == ["vllm --version fails: PackageNotFoundError: vllm"]


def test_image_for_cpus_gives_vllm_its_name():
    assert "/opt/vllm_name" in runs("cpu")
    named = tomllib.loads((ROOT / "scripts/vllm_name/pyproject.toml").read_text())["project"]
    assert f"vllm=={named['version'].partition('+')[0]}" in (ROOT / "constraints.txt").read_text().split()
    assert named["dependencies"][0] in (ROOT / "constraints.txt").read_text().split()


def test_image_for_gpus_brings_the_kernels_along():
    build = " ".join(rest for name, rest in stages()["cuda-build"][1] if name == "RUN")
    assert build.index("scripts/build_cuda.py") < build.index("pip wheel")
    assert "cuda-build" in " ".join(rest for name, rest in stages()["gpu"][1] if name == "COPY")


def test_context_holds_what_is_copied_and_no_secrets():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = [rest.split()[0] for name, rest in instructions(DOCKERFILE.read_text()) if name == "COPY"]
    own = {path.rstrip("/") for path in copied if not path.startswith("--from") and path != "."}
    assert own <= allowed
    assert all((ROOT / path).exists() for path in allowed)
    assert not any(fnmatch(secret, path) for path in allowed for secret in (".env", ".git", ".cache", ".venv"))
