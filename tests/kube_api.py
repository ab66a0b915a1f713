"""An API server to test against: HTTP on a local port, the shapes of Kubernetes' answers, RBAC, server-side apply.

It keeps objects, asks for a bearer token, allows what the given rules allow, and knows of apply what matters to
a client: the content type, the field manager, dry runs, force, and conflicts over fields that another manager owns.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml

Manifest = dict[str, Any]
TOKEN = "token-of-a-service-account"
APPLY = "application/apply-patch+yaml"
_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+)(?:/(?P<rest>.+))?)?"
)


class Request(NamedTuple):
    """One request as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    content_type: str
    body: Any


class KubeApi:
    """The server; a context manager. ``objects`` are by (resource, name), ``owners`` say who owns which fields."""

    def __init__(self, rules: list[Manifest] | None = None, metrics: str = "") -> None:
        self.objects: dict[tuple[str, str], Manifest] = {}
        self.owners: dict[tuple[str, str], dict[tuple[str, ...], str]] = {}
        self.requests: list[Request] = []
        self.rules = rules
        self.metrics = metrics
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.api = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> KubeApi:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, resource: str, manifest: Manifest, owner: str = "") -> None:
        """An object, all of whose fields ``owner`` has applied."""
        key = resource, manifest["metadata"]["name"]
        version = {"resourceVersion": "1", "uid": "c0ffee", "creationTimestamp": "2026-11-25T00:00:00Z"}
        managed = [{"manager": owner or "kubectl", "operation": "Update", "fieldsType": "FieldsV1", "fieldsV1": {}}]
        metadata = {**manifest["metadata"], **version, "managedFields": managed}
        self.objects[key] = {**manifest, "metadata": metadata}
        self.owners[key] = dict.fromkeys(leaves(manifest), owner) if owner else {}

    def kubeconfig(self, token: str = TOKEN) -> str:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        return yaml.safe_dump(config)

    def of(self, method: str) -> list[Request]:
        return [each for each in self.requests if each.method == method]


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of a manifest's fields; a list is one, as KServe's volumes are. What names the object is nobody's."""
    for name, item in value.items() if isinstance(value, dict) else ():
        if path == () and name in ("apiVersion", "kind", "metadata"):
            continue
        yield from leaves(item, (*path, name)) if isinstance(item, dict) else iter([(*path, name)])


def at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{name: merged(old.get(name), item) for name, item in new.items()}}
    return new


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes

    @property
    def api(self) -> KubeApi:
        return self.server.api  # type: ignore[attr-defined,no-any-return]

    def do_GET(self) -> None:
        found = self._receive(None)
        if found is None:
            return
        resource, name, rest = found["resource"], found["name"], found["rest"]
        if resource == "services" and rest == "proxy/metrics":
            self._send(200, self.api.metrics.encode(), "text/plain; version=0.0.4")
        elif name is None:
            items = [each for (kind, _), each in self.api.objects.items() if kind == resource]
            plain = [{key: each[key] for key in each if key not in ("apiVersion", "kind")} for each in items]
            self._answer(
                200, {"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "9"}, "items": plain}
            )
        elif (resource, name) in self.api.objects:
            self._answer(200, self.api.objects[resource, name])
        else:
            self._fail(404, "NotFound", f'{resource} "{name}" not found')

    def do_PATCH(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        found = self._receive(yaml.safe_load(body))
        if found is None:
            return
        request, key = self.api.requests[-1], (found["resource"], found["name"])
        if request.content_type != APPLY:
            self._fail(415, "UnsupportedMediaType", "the body of the request was in an unknown format")
        elif not request.query.get("fieldManager"):
            self._fail(422, "Invalid", "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value")
        elif request.body["metadata"]["name"] != key[1] or key not in self.api.objects:
            self._fail(404, "NotFound", f'{key[0]} "{key[1]}" not found')
        else:
            self._apply(key, request)

    def _apply(self, key: tuple[str, str], request: Request) -> None:
        owners, manager = self.api.owners[key], request.query["fieldManager"]
        old = self.api.objects[key]
        wanted = {path: at(request.body, path) for path in leaves(request.body)}
        conflicts = [
            (path, owners[path])
            for path, value in wanted.items()
            if owners.get(path, manager) != manager and at(old, path) != value
        ]
        if conflicts and request.query.get("force") != "true":
            self._conflict(conflicts)
            return
        new = merged(old, {name: part for name, part in request.body.items() if name != "metadata"})
        if request.query.get("dryRun") != "All":
            self.api.objects[key] = new
            owners.update(dict.fromkeys(wanted, manager))
        self._answer(200, new)

    def _conflict(self, conflicts: list[tuple[tuple[str, ...], str]]) -> None:
        causes = [
            {
                "reason": "FieldManagerConflict",
                "message": f'conflict with "{owner}" using v1',
                "field": "." + ".".join(path),
            }
            for path, owner in conflicts
        ]
        first = f"{causes[0]['message']}: {causes[0]['field']}"
        self._fail(409, "Conflict", f"Apply failed with {len(causes)} conflict(s): {first}", {"causes": causes})

    def _receive(self, body: Any) -> re.Match[str] | None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        query = dict(parse_qsl(parts.query))
        request = Request(self.command, path, query, self.headers.get("Content-Type", ""), body)
        self.api.requests.append(request)
        found = _PATH.fullmatch(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(401, "Unauthorized", "Unauthorized")
        elif found is None:
            self._fail(404, "NotFound", "the server could not find the requested resource")
        elif not self._allowed(found):
            self._fail(403, "Forbidden", f'{found["resource"]} is forbidden: User "u" cannot do that')
        else:
            return found
        return None

    def _allowed(self, found: re.Match[str]) -> bool:
        if self.api.rules is None:
            return True
        verb = "patch" if self.command == "PATCH" else "get" if found["name"] else "list"
        resource = found["resource"] + ("/proxy" if (found["rest"] or "").startswith("proxy") else "")
        return any(
            (found["group"] or "") in rule["apiGroups"]
            and resource in rule["resources"]
            and verb in rule["verbs"]
            and found["name"] in rule.get("resourceNames", [found["name"]])
            for rule in self.api.rules
        )

    def _fail(self, code: int, reason: str, message: str, details: Manifest | None = None) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
        self._answer(code, {**status, "reason": reason, "details": details or {}, "code": code})

    def _answer(self, code: int, value: Manifest) -> None:
        self._send(code, json.dumps(value).encode(), "application/json")

    def _send(self, code: int, body: bytes, content_type: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test says what was asked."""
