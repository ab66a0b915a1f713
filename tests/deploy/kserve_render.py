"""The pod that KServe's controller makes of an InferenceService and its runtime.

As kserve/kserve at aaac4e294 does it (pkg/controller/v1beta1/inferenceservice: utils.MergeRuntimeContainers,
MergePodSpec, ReplacePlaceholders): a strategic merge of the two containers, arguments of both one after the other,
then Go's template over the whole container with the InferenceService's metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]

# patchMergeKey of the lists that are merged (k8s.io/api/core/v1); all others are replaced
MERGE_KEYS = {"env": "name", "volumeMounts": "mountPath", "ports": "containerPort", "volumes": "name"}
POD_FIELDS = {"volumes", "nodeSelector", "affinity", "tolerations", "imagePullSecrets"}  # of a runtime
KUBERNETES_GRACE_S = 30


@dataclass(frozen=True)
class Pod:
    """The pod's spec, with one container."""

    name: str
    spec: Manifest
    annotations: dict[str, str]

    @property
    def container(self) -> Manifest:
        (container,) = self.spec["containers"]
        return container

    @property
    def grace_s(self) -> int:
        return int(self.spec.get("terminationGracePeriodSeconds", KUBERNETES_GRACE_S))

    def volume(self, name: str) -> Manifest:
        (volume,) = [one for one in self.spec["volumes"] if one["name"] == name]
        return volume


def render(runtimes: Iterable[Manifest], service: Manifest) -> Pod:
    """What the controller makes of `service`; an AssertionError where it would refuse."""
    predictor = service["spec"]["predictor"]
    model = dict(predictor["model"])
    runtime = _choose(runtimes, model.pop("runtime", None), model)
    for name in ("modelFormat", "storageUri", "protocolVersion", "runtimeVersion"):
        model.pop(name, None)
    (base,) = [one for one in runtime["spec"]["containers"] if one["name"] == "kserve-container"]
    container = merge(base, model)
    container["args"] = [*base.get("args", []), *model.get("args", [])]
    container = _fill(container, service["metadata"])
    container["env"] = [*container.get("env", []), _env("INFERENCE_SERVICE_NAME", service["metadata"]["name"])]
    runtime_pod = {key: value for key, value in runtime["spec"].items() if key in POD_FIELDS}
    own = {key: value for key, value in predictor.items() if key not in ("model", "minReplicas", "maxReplicas")}
    spec = {**merge(runtime_pod, own), "containers": [container]}
    annotations = {**runtime["spec"].get("annotations", {}), **service["metadata"].get("annotations", {})}
    return Pod(service["metadata"]["name"], spec, annotations)


def _choose(runtimes: Iterable[Manifest], name: str | None, model: Manifest) -> Manifest:
    """The runtime that is named, or selects itself, and supports the format."""
    written = (model["modelFormat"]["name"], model["modelFormat"].get("version"))
    for runtime in runtimes:
        formats = [
            one for one in runtime["spec"]["supportedModelFormats"] if name is not None or one.get("autoSelect", False)
        ]
        known = {(one["name"], version) for one in formats for version in (None, one.get("version"))}
        if name in (None, runtime["metadata"]["name"]) and written in known:
            return runtime
    raise AssertionError(f"no runtime {name or 'that selects itself'} for model format {written}")


def merge(base: Any, patch: Any, key: str = "") -> Any:
    """Kubernetes' strategic merge of `patch` over `base`."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {name: merge(base.get(name), patch.get(name, base.get(name)), name) for name in {**base, **patch}}
    if isinstance(base, list) and isinstance(patch, list) and (by := MERGE_KEYS.get(key)):
        ours, theirs = ({one[by]: one for one in side} for side in (base, patch))
        return [merge(ours.get(name), theirs.get(name, ours.get(name))) for name in {**ours, **theirs}]
    return patch


def _fill(container: Manifest, metadata: Manifest) -> Manifest:
    """Go's template with the service's metadata: `{{.Name}}`, `{{.Labels.x}}`."""
    values = {".Name": metadata["name"], ".Namespace": metadata.get("namespace", "default")}
    values |= {f".Labels.{key}": value for key, value in (metadata.get("labels") or {}).items()}
    text = re.sub(r"{{\s*(\S+?)\s*}}", lambda match: values[match[1]], json.dumps(container))
    return json.loads(text)


def _env(name: str, value: str) -> Manifest:
    return {"name": name, "value": value}
