"""Probes, the end of a pod, and what KServe does to both."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lmcache_ext.manifests.bundle import Bundle
from lmcache_ext.manifests.caches import caches
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Edits, Node, insert, put, remove, replace
from lmcache_ext.manifests.pods import ENGINE_CONTAINER, RUNTIMES, Container, Pod, pods

SHUTDOWN_S = 30  # this runtime's default of --shutdown-timeout
AFTER_SHUTDOWN_S = 20  # workers, the last writes, the interpreter
DEFAULT_GRACE_S = 30  # Kubernetes'
READY, LIVE = "/v2/health/ready", "/v2/health/live"
PORT = 8080


def _probe(bundle: Bundle) -> Iterator[Found]:
    for pod in pods(bundle):
        for container in pod.containers:
            for path in _probe_paths(container):
                found = re.fullmatch(r"/v[12]/models/(.+?)(?:/ready)?", path.text)
                served = _other_model(pod, container, found[1]) if found else None
                if found is not None and served:
                    message = f"the probe asks for the model {found[1]}, and the model is {served}"
                    edits = replace(path, "/v2/health/ready")
                    yield Found(path, message, "write /v2/health/ready", edits, at_value=True)


def _other_model(pod: Pod, container: Container, asked: str) -> str | None:
    """The model that is served where a probe asks for another; None if it asks for the right one, or nobody knows."""
    template = asked.replace(" ", "") == "{{.Name}}"
    if pod.is_template:
        return "what --model_name of the InferenceService says" if template else None
    model = container.flag("model_name") or container.flag("served-model-name")
    served = model.text.replace("{{.Name}}", pod.document.name) if model is not None else None
    return None if served in (None, pod.document.name if template else asked) else served


def _probe_paths(container: Container) -> Iterator[Node]:
    for node in container.nodes:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = node.at(probe, "httpGet", "path")
            if path is not None:
                yield path


def _grace(bundle: Bundle) -> Iterator[Found]:
    for cache in caches(bundle):
        pod = cache.pod
        if pod.is_template:
            continue  # a runtime has no such field
        need = _pre_stop_s(cache.container) + _shutdown_s(cache.container) + AFTER_SHUTDOWN_S
        written = pod.spec.at("terminationGracePeriodSeconds")
        have = int(written.text) if written is not None and written.text.isdigit() else DEFAULT_GRACE_S
        if have < need:
            better = -(-need // 10) * 10
            message = f"{have} s to terminate, and the engine may need {need} s"
            edits = put(pod.spec, "terminationGracePeriodSeconds", better)
            yield Found(written or pod.spec, message, f"write terminationGracePeriodSeconds: {better}", edits)


def _shutdown_s(container: Container) -> int:
    written = container.flag("shutdown-timeout")
    return int(written.text) if written is not None and written.text.isdigit() else SHUTDOWN_S


def _pre_stop_s(container: Container) -> int:
    for node in reversed(container.nodes):
        seconds = node.text_at("lifecycle", "preStop", "sleep", "seconds")
        words = " ".join(item.text for item in node.items_at("lifecycle", "preStop", "exec", "command"))
        found = re.search(r"\bsleep +([0-9]+)", words)
        if seconds.isdigit() or found:
            return int(seconds) if seconds.isdigit() else int(found[1]) if found else 0
    return 0


def _server_type(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.of("ClusterServingRuntime", "ServingRuntime"):
        for path in (("metadata", "annotations"), ("spec", "annotations")):
            node = document.node.at(*path, "serving.kserve.io/server-type")
            if node is not None and node.text in ("huggingfaceserver", "vllmserver"):
                yield Found(node, f"the runtime calls itself {node.text}", "leave the annotation out", remove(node))


def _no_probe(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.of(*RUNTIMES):
        for container in document.node.items_at("spec", "containers"):
            if container.text_at("name") != ENGINE_CONTAINER:
                continue
            missing = [name for name in ("readinessProbe", "livenessProbe") if container.at(name) is None]
            edits: Edits = ()
            for name in missing:
                path = READY if name == "readinessProbe" else LIVE
                edits = (*edits, *insert(container, name, {"httpGet": {"path": path, "port": PORT}}))
            if missing:
                yield Found(container, f"no {' and no '.join(missing)}", f"ask {READY} and {LIVE}", edits)


def _serverless(bundle: Bundle) -> Iterator[Found]:
    for document in bundle.of("InferenceService"):
        mode = document.node.at("metadata", "annotations", "serving.kserve.io/deploymentMode")
        lifecycle = document.node.at("spec", "predictor", "model", "lifecycle")
        if lifecycle is not None and (mode is None or mode.text in ("Serverless", "Knative")):
            fix = "annotate serving.kserve.io/deploymentMode: RawDeployment"
            yield Found(lifecycle, "lifecycle, where the deployment may be Knative's", fix)


RULES = (
    Rule(
        "probe-model",
        "error",
        "KServe fills in the InferenceService's name, the server knows --model_name: the probe fails for ever",
        _probe,
    ),
    Rule(
        "grace-period",
        "warning",
        "after it the kubelet kills: what is not yet written is lost (preStop + --shutdown-timeout + 20 s)",
        _grace,
    ),
    Rule(
        "server-type",
        "warning",
        "KServe appends -gpu to the tag, or -cpu to the name, of an image it takes for its own",
        _server_type,
    ),
    Rule(
        "probe-missing",
        "warning",
        "KServe's default is a TCP probe, which sees neither loading nor a dead engine",
        _no_probe,
    ),
    Rule(
        "knative-lifecycle",
        "note",
        "Knative refuses lifecycle; a cluster's default mode is not known here",
        _serverless,
    ),
)
