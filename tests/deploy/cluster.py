"""What kubectl needs of a cluster: an API server that says what it knows, takes what its schemas allow, and keeps it.

No controller runs behind it: an object is as it was sent, and Ready if it is of a kind that becomes so.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.deploy.manifests import problems

Manifest = dict[str, Any]

# group and version -> (plural, kind, whether it is in a namespace)
KINDS = {
    "v1": [
        ("configmaps", "ConfigMap", True),
        ("namespaces", "Namespace", False),
        ("persistentvolumeclaims", "PersistentVolumeClaim", True),
        ("secrets", "Secret", True),
        ("services", "Service", True),
    ],
    "apps/v1": [("deployments", "Deployment", True), ("statefulsets", "StatefulSet", True)],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy", True)],
    "policy/v1": [("poddisruptionbudgets", "PodDisruptionBudget", True)],
    "monitoring.coreos.com/v1": [("podmonitors", "PodMonitor", True), ("prometheusrules", "PrometheusRule", True)],
    "serving.kserve.io/v1alpha1": [("clusterservingruntimes", "ClusterServingRuntime", False)],
    "serving.kserve.io/v1beta1": [("inferenceservices", "InferenceService", True)],
}
READY = {"conditions": [{"type": "Ready", "status": "True"}]}


class Cluster:
    """The server; a context manager. `objects` are by path, `refused` says what was not taken and why."""

    def __init__(self) -> None:
        self.objects: dict[str, Manifest] = {"/api/v1/namespaces/default": {"kind": "Namespace", "apiVersion": "v1"}}
        self.refused: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.cluster = self  # type: ignore[attr-defined]

    def __enter__(self) -> Cluster:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def create(self, path: str, manifest: Manifest) -> tuple[int, Manifest]:
        """POST to a collection."""
        wrong = problems(manifest)
        if wrong:
            self.refused += wrong
            return 422, _status(422, "Invalid", "; ".join(wrong))
        name = manifest["metadata"]["name"]
        metadata = {**manifest["metadata"], "uid": name, "resourceVersion": "1"}
        self.objects[f"{path}/{name}"] = stored = {**manifest, "metadata": metadata, "status": READY}
        return 201, stored

    def get(self, path: str) -> tuple[int, Manifest]:
        """An object, the objects of a collection, or what there is to be had."""
        if path in self.objects:
            return 200, self.objects[path]
        found = _discovery(path)
        if found is not None:
            return 200, found
        if path.rpartition("/")[2] in {plural for kinds in KINDS.values() for plural, _, _ in kinds}:
            items = [one for place, one in self.objects.items() if place.rpartition("/")[0] == path]
            return 200, {"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items}
        return 404, _status(404, "NotFound", f"{path} is not found")


def _status(code: int, reason: str, message: str) -> Manifest:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


def _root(version: str) -> str:
    return f"/api/{version}" if "/" not in version else f"/apis/{version}"


def _discovery(path: str) -> Manifest | None:
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = []
        for name in dict.fromkeys(one.partition("/")[0] for one in KINDS if "/" in one):
            versions = [{"groupVersion": one, "version": one[len(name) + 1 :]} for one in KINDS if one.startswith(name)]
            groups.append({"name": name, "versions": versions, "preferredVersion": versions[-1]})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        return {"paths": {_root(one)[1:]: {"serverRelativeURL": f"/openapi/v3{_root(one)}"} for one in KINDS}}
    for version, kinds in KINDS.items():
        if path == _root(version):
            verbs = ["create", "get", "list", "patch", "watch"]
            rows = [{"name": plural, "kind": kind, "namespaced": own, "verbs": verbs} for plural, kind, own in kinds]
            return {"kind": "APIResourceList", "groupVersion": version, "resources": rows}
        if path == f"/openapi/v3{_root(version)}":
            return _schemas(version)
    return None


def _schemas(version: str) -> Manifest:
    """As much as tells kubectl to leave the validation to the server."""
    group, _, number = version.rpartition("/")
    paths = {}
    for plural, kind, _ in KINDS[version]:
        identity = {"group": group, "version": number, "kind": kind}
        patch = {
            "x-kubernetes-group-version-kind": identity,
            "parameters": [{"name": "fieldValidation", "in": "query"}],
        }
        paths[f"{_root(version)}/{plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.32.0"}, "paths": paths}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def cluster(self) -> Cluster:
        return self.server.cluster  # type: ignore[attr-defined,no-any-return]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        code, answer = self.cluster.get(url.path)
        if "watch" in parse_qs(url.query):
            answer = {"type": "ADDED", "object": answer["items"][0]}
        self._answer(code, answer)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(*self.cluster.create(urlsplit(self.path).path, json.loads(body)))

    def _answer(self, code: int, answer: Manifest) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
