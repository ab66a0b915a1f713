"""Manifests as `kubectl kustomize` builds them, and whether an API server would take them."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft7Validator

Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
EXAMPLES = ROOT / "examples"
CRDS = Path(__file__).parent / "crd"
KUBERNETES = "1.34.0"  # any that kubernetes-validate has; the kinds we use have not changed since 1.27
BUILD_S = 30
# What people write in metadata; the API server takes more, but not from us.
METADATA = {"name", "namespace", "labels", "annotations", "generateName"}


def kustomizer() -> list[str]:
    """The command that builds; the test is skipped where neither is installed."""
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            return command
    reason = "no kubectl and no kustomize: kubernetes.io/docs/tasks/tools has both"
    pytest.skip(reason, allow_module_level=True)  # modules build while they are read


@functools.cache
def _built(path: Path) -> str:
    run = subprocess.run([*kustomizer(), str(path)], capture_output=True, text=True, timeout=BUILD_S, check=False)
    assert run.returncode == 0, f"{path} does not build: {run.stderr}"
    assert not run.stderr.strip(), f"{path} builds with warnings: {run.stderr}"
    return run.stdout


def build(path: Path) -> list[Manifest]:
    """The objects that a directory with a kustomization amounts to."""
    return load(_built(path))


def load(text: str) -> list[Manifest]:
    """The objects in a YAML stream; duplicate keys are an error, as for an API server."""
    return [one for one in yaml.load_all(text, Loader=_Strict) if one is not None]


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"duplicate key in {node.start_mark}"
        return super().construct_mapping(node, deep)


def kustomizations(root: Path, kind: str = "Kustomization") -> list[Path]:
    """Directories below `root` that can be built by themselves (or, kind Component, not)."""
    found = sorted(root.rglob("kustomization.yaml"))
    return [path.parent for path in found if yaml.safe_load(path.read_text())["kind"] == kind]


def problems(manifest: Manifest) -> list[str]:
    """Why an API server would refuse it or drop a part of it; empty where it takes the whole."""
    name = f"{manifest.get('kind')}/{(manifest.get('metadata') or {}).get('name')}"
    try:
        return [f"{name}: {line}" for line in (*_schema_problems(manifest), *_metadata_problems(manifest))]
    except KeyError as error:
        return [f"{name}: no {error}"]


def _schema_problems(manifest: Manifest) -> Iterator[str]:
    crd = _crds().get((manifest["apiVersion"], manifest["kind"]))
    if crd is not None:
        for error in Draft7Validator(crd).iter_errors(manifest):
            yield f"{error.json_path}: {error.message[:300]}"
        return
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{error.message[:300]} at {list(error.path)}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield f"no such kind: {error}"


def _metadata_problems(manifest: Manifest) -> Iterator[str]:
    metadata = manifest["metadata"]
    if unknown := metadata.keys() - METADATA:
        yield f"metadata has {sorted(unknown)}"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", metadata["name"]):
        yield f"{metadata['name']!r} is no name"
    for part in ("labels", "annotations"):
        for key, value in (metadata.get(part) or {}).items():
            if not isinstance(value, str):
                yield f"metadata.{part}.{key} is not a string"


@functools.cache
def _crds() -> dict[tuple[str, str], Any]:
    found = [json.loads(path.read_text()) for path in sorted(CRDS.glob("*.json"))]
    return {(one["apiVersion"], one["kind"]): _strict(one["schema"]) for one in found}


def _strict(schema: Any) -> Any:
    """The same schema, in JSON Schema's terms, with unknown fields refused."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        made["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable"):
        made["type"] = [made["type"], "null"]
    return made


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] in kinds]


def containers(manifest: Manifest) -> list[Manifest]:
    """Containers of a workload, a runtime or an InferenceService."""
    spec = manifest.get("spec") or {}
    pods = [spec, (spec.get("template") or {}).get("spec") or {}, spec.get("predictor") or {}]
    found = [one for pod in pods for key in ("containers", "initContainers") for one in pod.get(key) or []]
    model = (spec.get("predictor") or {}).get("model")
    return [*found, model] if model else found


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str | int) -> int:
    """Bytes of a Kubernetes quantity."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert match, f"{text!r} is no quantity"
    return int(float(match[1]) * _UNITS[match[2]])
