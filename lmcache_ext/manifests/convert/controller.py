"""The controller, which the chart has in its router: here a Deployment and a Service of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lmcache_ext.config_values import ports as read_ports
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.convert.ledger import Section, Values
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.manifests.convert.servers import PREDICTOR_PORT
from lmcache_ext.manifests.convert.settings import URLS

HTTP_PORT = 9090  # /health and /metrics; the chart's ports for engines are from 9000 on
_NOBODY = "no model tells the controller of the router anything (lmcacheConfig.enableController)"
_OF_ROUTER = {
    "pull": "lmcacheControllerPort",
    "reply": "lmcacheControllerReplyPort",
    "heartbeat": "lmcacheControllerHeartbeatPort",
}
_NONE = 0
_LEVELS = {"DEBUG": "debug", "INFO": "info", "WARNING": "warning", "ERROR": "error", "CRITICAL": "error"}
_MEMORY = "1Gi"  # 1.2 million chunks, each once per engine
_ENGINES = "serving.kserve.io/inferenceservice"  # KServe labels a model's pods by it


def controller(router: Section, options: Options, files: Mapping[str, Values]) -> list[Values]:
    """The controller of all models whose files name it, and who may reach what; nothing where none does."""
    told = [file for file in files.values() if _port(file, "controller_pull_url", options)]
    if not told:
        router.refuse(_NOBODY, *_OF_ROUTER.values())
        return _peer_policy(options, files, router)
    ports = _ports(router, options, told)
    _extra_ports(router, {port for port, _ in ports})
    labels = {"app.kubernetes.io/name": "lmcache-controller", "app.kubernetes.io/instance": options.release}
    http = next(port for port in range(HTTP_PORT, 65536) if port not in dict(ports))
    listening: dict[str, int] = {}
    for port, role in ports:
        listening.setdefault(role, port)
    router.ledger.note(
        f"the controller is at {options.controller_service}, HTTP at {http}; the chart's was in its router. It asks "
        "for no token (controller_token_file, as in deploy/components/controller), so it refuses /clear"
    )
    pod = {"metadata": {"labels": labels}, "spec": _pod_spec(router, options, listening, http)}
    spec = {"replicas": 1, "strategy": {"type": "Recreate"}, "selector": {"matchLabels": labels}, "template": pod}
    metadata = {"name": f"{options.release}-deployment-lmcache-controller", "labels": labels}
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec},
        _service(options, labels, ports, http),
        _policy(options.controller_service, {"matchLabels": labels}, _ANY_ENGINE, list(listening.values()), http),
        *_peer_policy(options, files, router),
    ]


def _port(file: Values, url: str, options: Options) -> int | None:
    """The port of our controller that a file names."""
    host, _, port = str(file.get(url, "")).rpartition(":")
    is_ours = file.get("enable_controller") and host == options.controller_service and port.isdigit()
    return int(port) if is_ours else None


def _ports(router: Section, options: Options, told: list[Values]) -> list[tuple[int, str]]:
    """(port of the Service, what for): the first of each role is where the controller listens.

    Engines may name others than the router's keys: the Service has them all, as each model was told.
    """
    target = f"a port of {options.controller_service}"
    ports: dict[int, str] = {}
    for role, url in zip(("pull", "reply"), URLS, strict=True):
        named = [port for file in told if (port := _port(file, url, options))]
        first = router.port(_OF_ROUTER[role], target, _NONE)
        for port in (first, *named):
            ports.setdefault(port, role)
    ports.setdefault(router.port(_OF_ROUTER["heartbeat"], target, _NONE), "heartbeat")
    return [(port, role) for port, role in ports.items() if port != _NONE]


def _extra_ports(router: Section, ports: set[int]) -> None:
    """Those of the router's Service that only the controller needs are on its own."""
    extra = router.peek("extraPorts", [])
    if extra and all(isinstance(item, dict) and item.get("port") in ports for item in extra):
        router.mappings("extraPorts", "the ports of the controller's Service")


def _pod_spec(router: Section, options: Options, listening: Mapping[str, int], http: int) -> Values:
    monitors = json.dumps(listening, separators=(",", ":"))
    args = ["--host=0.0.0.0", f"--port={http}", f"--monitor-ports={monitors}", "--lmcache-worker-timeout=60"]
    args += _log_level(router.inner("lmcacheConfig"))
    probe = {"httpGet": {"path": "/health", "port": http}, "timeoutSeconds": 5}
    container = {
        "name": "lmcache-controller",
        "image": options.server_image,
        "command": ["lmcache_controller"],
        "args": args,
        "ports": [
            {"name": "metrics", "containerPort": http},
            *({"name": role, "containerPort": port} for role, port in listening.items()),
        ],
        "readinessProbe": {**probe, "periodSeconds": 5},
        "livenessProbe": {**probe, "periodSeconds": 10, "failureThreshold": 6},
        "resources": {"requests": {"cpu": "250m", "memory": _MEMORY}, "limits": {"memory": _MEMORY}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 10,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }


def _log_level(section: Section) -> list[str]:
    level = _LEVELS.get(str(section.peek("logLevel")).upper())
    if level is not None:
        section.take("logLevel", "--log-level of the controller")
    section.close(f"the controller's log has the levels {', '.join(sorted(_LEVELS))}, and nothing else to set")
    return [f"--log-level={level}"] if level is not None else []


def _service(options: Options, labels: Values, ports: list[tuple[int, str]], http: int) -> Values:
    taken: set[str] = set()
    items: list[Values] = [{"name": "http", "port": http, "targetPort": http}]
    for port, role in ports:
        items.append({"name": f"{role}-{port}" if role in taken else role, "port": port, "targetPort": role})
        taken.add(role)
    metadata = {"name": options.controller_service}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": labels, "ports": items}}


# --- who may reach what -------------------------------------------------------------------

_ANY_ENGINE = {"matchExpressions": [{"key": _ENGINES, "operator": "Exists"}]}


def _peer_policy(options: Options, files: Mapping[str, Values], router: Section) -> list[Values]:
    """Engines read each other's memory, and nobody else does."""
    peers = [name for name, file in files.items() if file.get("enable_p2p")]
    found = {
        port for name in peers for key in ("p2p_init_ports", "p2p_lookup_ports") for port in _list(files[name], key)
    }
    if not found:
        return []
    name = f"{options.release}-lmcache-peers"
    router.ledger.note(
        f"NetworkPolicy {name}: pods of {', '.join(peers)} are reached at {PREDICTOR_PORT} by all, at "
        f"{', '.join(map(str, sorted(found)))} by each other, and nowhere else"
    )
    pods = {"matchExpressions": [{"key": _ENGINES, "operator": "In", "values": peers}]}
    return [_policy(name, pods, pods, sorted(found), PREDICTOR_PORT)]


def _list(file: Values, key: str) -> list[int]:
    try:
        return list(read_ports(file[key])) if file.get(key) else []
    except ValueError as error:
        raise ManifestError(f"LMCACHE_{key.upper()}: {file[key]!r} {error}") from None


def _policy(name: str, pods: Values, engines: Values, ports: list[int], public: int) -> Values:
    """``ports`` of ``pods`` are for ``engines``, ``public`` is for everybody, and what else there is for nobody."""
    own = {"from": [{"podSelector": engines}], "ports": [{"port": port} for port in ports]}
    spec = {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": [own, {"ports": [{"port": public}]}]}
    kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    return {**kind, "metadata": {"name": name}, "spec": spec}
