"""The cache server, and the Services by whose names the chart's users reach things."""

from __future__ import annotations

from lmcache_ext.manifests import chart
from lmcache_ext.manifests.convert.ledger import Section, Values
from lmcache_ext.manifests.convert.options import Options

HTTP_PORT = 9090  # /healthz and /metrics of the cache server
PREDICTOR_PORT = 8080
_DEFAULT_LIMIT = "8Gi"
_ROUTER = "KServe's Service spreads requests over the replicas: there is no router"


def cache_server(section: Section, options: Options) -> tuple[list[Values], tuple[str, str] | None]:
    """(objects, (remote_url, serde)) of cacheserverSpec by either generation; nothing where none is wanted."""
    if section.node is None or not chart.is_on(section.node):
        section.refuse(
            "no cache server is wanted", *(pair.name for pair in (section.node.pairs() if section.node else ()))
        )
        return [], None
    section.take("enabled", "whether there is a cache server")
    if "enabled" not in section:
        section.ledger.note(f"{section.path}: written for the older chart, which starts a server without enabled: true")
    section.refuse("the image of this package has the server", "image", "repository", "tag")
    count = section.whole("replicaCount", "replicas", 1)
    port = section.whole("containerPort", "the port the server listens at", 8000)
    service_port = section.whole("servicePort", "the port of the Service", 80)
    serde = section.take("serde", "remote_serde", default="") or "naive"
    labels = {"app.kubernetes.io/name": "lmcache-server", "app.kubernetes.io/instance": options.release}
    extra = {name: str(value) for name, value in section.mapping("labels", "labels").items()}
    template = _template(section, options, port, {**labels, **extra})
    workload = _workload(section, options, count, labels, template)
    service = _service(section, options, count, service_port, port, labels)
    section.close()
    return [workload, service], (_url(options, count, service_port, port), str(serde))


def _template(section: Section, options: Options, port: int, labels: Values) -> Values:
    container = _container(section, options, port)
    spec: Values = {"automountServiceAccountToken": False, "containers": [container]}
    keys = ("priorityClassName", "runtimeClassName", "schedulerName", "tolerations", "securityContext")
    for key in (*keys, "affinity", "nodeSelector", "imagePullSecrets"):
        value = section.take(key, f"{key} of the cache server's pods")
        spec |= {key: value} if value else {}
    return {"metadata": {"labels": labels}, "spec": spec}


def _container(section: Section, options: Options, port: int) -> Values:
    resources = section.resources("resources of the cache server")
    if "memory" not in resources.get("limits", {}):
        resources = {**resources, "limits": {**resources.get("limits", {}), "memory": _DEFAULT_LIMIT}}
        section.ledger.note(
            f"{section.path}: no memory limit is written; the cache is bounded by one of {_DEFAULT_LIMIT}"
        )
    probe = {"httpGet": {"path": "/healthz", "port": HTTP_PORT}}
    timing = section.mapping("livenessProbe", "timing of the liveness probe, which asks /healthz")
    container: Values = {
        "name": "lmcache-server",
        "image": options.server_image,
        "command": ["lmcache_server"],
        # memory for objects is 80% of the limit unless --max-bytes says otherwise
        "args": ["0.0.0.0", str(port), f"--http-port={HTTP_PORT}"],
        "ports": [{"name": "lm", "containerPort": port}, {"name": "metrics", "containerPort": HTTP_PORT}],
        "readinessProbe": probe,
        "livenessProbe": {
            **probe,
            **{key: value for key, value in timing.items() if key.endswith(("Seconds", "Threshold"))},
        },
        "resources": {part: {name: str(value) for name, value in each.items()} for part, each in resources.items()},
    }
    security = section.mapping("containerSecurityContext", "securityContext of the cache server's container")
    container |= {"securityContext": security} if security else {}
    policy = section.take("imagePullPolicy", "imagePullPolicy")
    return container | ({"imagePullPolicy": policy} if policy else {})


def _workload(section: Section, options: Options, count: int, labels: Values, template: Values) -> Values:
    annotations = section.mapping("annotations", "annotations of the cache server")
    metadata = {"name": f"{options.release}-deployment-cache-server", "labels": labels}
    metadata |= {"annotations": annotations} if annotations else {}
    spec: Values = {"replicas": count, "selector": {"matchLabels": labels}, "template": template}
    strategy = section.mapping("strategy", "strategy of the Deployment; a StatefulSet has none")
    if count == 1:
        spec |= {"strategy": strategy} if strategy else {}
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}
    spec |= {"serviceName": options.cache_service, "podManagementPolicy": "Parallel"}
    section.ledger.note(
        f"{section.path}: {count} servers share the keys, each named in remote_url; the chart let them miss by turns"
    )
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": spec}


def _service(section: Section, options: Options, count: int, port: int, target: int, labels: Values) -> Values:
    kind = section.take("serviceType", "the type of the Service", default="ClusterIP")
    annotations = section.mapping("serviceAnnotations", "annotations of the Service")
    metadata: Values = {"name": options.cache_service}
    metadata |= {"annotations": annotations} if annotations else {}
    spec: Values = {"type": kind} if count == 1 else {"clusterIP": "None"}
    spec |= {
        "selector": labels,
        "ports": [{"name": "lm", "port": port if count == 1 else target, "targetPort": target}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def _url(options: Options, count: int, service_port: int, port: int) -> str:
    if count == 1:
        return f"lm://{options.cache_service}:{service_port}"
    pod = f"{options.release}-deployment-cache-server"
    return "lm://" + ",".join(f"{pod}-{index}.{options.cache_service}:{port}" for index in range(count))


def engine_service(options: Options, name: str, section: Section, port: int) -> Values:
    """The chart's Service of one model, in front of its predictor."""
    annotations = section.mapping("serviceAnnotations", "annotations of the model's Service")
    return _predictor_service(f"{options.release}-{name}-engine-service", name, {"port": port}, annotations)


def router_service(section: Section, options: Options, models: list[str]) -> list[Values]:
    """The router's Service, in front of the only model; more than one model has no single address here."""
    enabled = section.take("enableRouter", "whether there is a Service of that name", default=True)
    port = section.whole("servicePort", "the port of that Service", 80)
    kind = section.take("serviceType", "the type of that Service", default="ClusterIP")
    node_port = section.take("nodePort", "nodePort of that Service")
    annotations = section.mapping("serviceAnnotations", "annotations of that Service")
    section.close(_ROUTER)
    if not enabled or len(models) != 1:
        if enabled and models:
            section.ledger.note(f"no {options.router_service}: each model has its own Service, {', '.join(models)}")
        return []
    ports = {"port": port} | ({"nodePort": int(node_port)} if node_port and kind == "NodePort" else {})
    service = _predictor_service(options.router_service, models[0], ports, annotations)
    service["spec"] = {"type": kind, **service["spec"]}
    return [service]


def _predictor_service(name: str, model: str, port: Values, annotations: Values | None) -> Values:
    metadata: Values = {"name": name} | ({"annotations": annotations} if annotations else {})
    selector = {"serving.kserve.io/inferenceservice": model, "component": "predictor"}
    ports = [{"name": "http", **port, "targetPort": PREDICTOR_PORT}]
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": selector, "ports": ports}}
