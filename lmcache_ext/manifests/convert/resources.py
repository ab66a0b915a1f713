"""What a model's pods ask for, and where they may run."""

from __future__ import annotations

import re
from typing import Any

from lmcache_ext.manifests.convert.ledger import Section, Values

GPU = "nvidia.com/gpu"
_HAMI = {
    "GPUMem": "nvidia.com/gpumem",
    "GPUMemPercentage": "nvidia.com/gpumem-percentage",
    "GPUCores": "nvidia.com/gpucores",
}


def model_resources(section: Section) -> tuple[Values, bool]:
    """(``resources``, whether there is a GPU in them)."""
    given = section.resources("resources")
    if given:
        section.refuse("resources is written, and wins", *_simple_keys())
        names = {name for part in given.values() for name in part}
        requests, limits = dict(given.get("requests", {})), dict(given.get("limits", {}))
        on_gpu = any("gpu" in name or "/" in name for name in names)
    else:
        requests, limits = _simple(section)
        on_gpu = _devices(section, requests, limits)
    if "memory" in requests and "memory" not in limits:
        limits["memory"] = requests["memory"]
        section.ledger.note(f"{section.path}: the memory limit is the request; the runtime's own would stay below it")
    return _strings({"requests": requests, "limits": limits}), on_gpu


def _simple(section: Section) -> tuple[Values, Values]:
    """(requests, limits) of requestCPU, limitMemory and their like."""
    requests: Values = {}
    limits: Values = {}
    for name, key in (("cpu", "CPU"), ("memory", "Memory")):
        request, limit = (section.take(f"{kind}{key}", f"resources.{kind}s.{name}") for kind in ("request", "limit"))
        requests |= {name: request} if request is not None else {}
        limits |= {name: limit} if limit is not None else {}
    return requests, limits


def _devices(section: Section, requests: Values, limits: Values) -> bool:
    count = section.take("requestGPU", "resources")
    kind = section.take("requestGPUType", "the name of the GPU resource", default=GPU)
    wanted = bool(re.fullmatch("[0-9]+", str(count))) and int(count) > 0
    if wanted:
        requests[kind] = limits[kind] = count
    if wanted and kind != GPU:
        requests[GPU] = limits[GPU] = 0  # takes back what the runtime asks for
    for key, name in _HAMI.items():
        for part, target in (("request", requests), ("limit", limits)):
            value = section.take(f"{part}{key}", f"resources: {name}")
            target |= {name: value} if value is not None else {}
    return wanted


def _simple_keys() -> tuple[str, ...]:
    keys = ("CPU", "Memory", *_HAMI)
    return (*(f"{part}{key}" for part in ("request", "limit") for key in keys), "requestGPU", "requestGPUType")


def _strings(value: Any) -> Any:  # noqa: ANN401 - a mapping of mappings
    return {name: _strings(item) for name, item in value.items()} if isinstance(value, dict) else str(value)


def write_placement(section: Section, serving: Section, predictor: Values) -> None:
    """Node selection and the like, of the model or of all models."""
    for key in ("serviceAccountName", "priorityClassName", "nodeName"):
        value = section.take(key, f"predictor.{key}")
        predictor |= {key: value} if value else {}
    inherited = serving.take("runtimeClassName", "predictor.runtimeClassName; empty: left out")
    runtime_class = section.take("runtimeClassName", "predictor.runtimeClassName", default=inherited)
    predictor |= {"runtimeClassName": runtime_class} if runtime_class else {}
    scheduler = serving.take("schedulerName", "predictor.schedulerName")
    predictor |= {"schedulerName": scheduler} if scheduler else {}
    pull = section.take("imagePullSecret", "predictor.imagePullSecrets")
    predictor |= {"imagePullSecrets": [{"name": pull}]} if pull else {}
    security = serving.mapping("securityContext", "predictor.securityContext")
    predictor |= {"securityContext": security} if security else {}
    _write_tolerations(section, serving, predictor)
    affinity = section.mapping("affinity", "predictor.affinity")
    terms = section.mappings("nodeSelectorTerms", "predictor.affinity.nodeAffinity")
    if not affinity and terms and not predictor.get("nodeName"):
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        affinity = {"nodeAffinity": required}
    predictor |= {"affinity": affinity} if affinity else {}


def _write_tolerations(section: Section, serving: Section, predictor: Values) -> None:
    everywhere = serving.mappings("tolerations", "predictor.tolerations")
    own = section.mappings("tolerations", "predictor.tolerations")
    policy = section.take("tolerationsPolicy", "predictor.tolerations", default="append")
    tolerations = own if own and policy == "override" else [*everywhere, *own]
    predictor |= {"tolerations": tolerations} if tolerations else {}


def write_replicas(section: Section, predictor: Values) -> None:
    """As many as the chart starts; KEDA's bounds, without its triggers."""
    count = section.whole("replicaCount", "predictor.minReplicas and maxReplicas", 1)
    keda = section.inner("keda")
    low = high = count
    if keda.take("enabled", "predictor.minReplicas and maxReplicas", default=False):
        low = keda.whole("minReplicaCount", "predictor.minReplicas", 1)
        high = keda.whole("maxReplicaCount", "predictor.maxReplicas", max(low, 1))
    predictor |= {"minReplicas": low, "maxReplicas": high}
    keda.close("KServe scales by predictor.scaleMetric or autoScaling, not by a ScaledObject")
