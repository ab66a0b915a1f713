"""From values to manifests: the order of things, and what no part of them has a place for."""

from __future__ import annotations

import re
from typing import NamedTuple

import yaml

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests import chart
from lmcache_ext.manifests.bundle import HELM, kind_of
from lmcache_ext.manifests.check import check, mend
from lmcache_ext.manifests.convert import controller, models, servers
from lmcache_ext.manifests.convert.ledger import Ledger, Section, Values
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.manifests.convert.resources import write_placement, write_replicas
from lmcache_ext.manifests.convert.settings import FILE, Cache, lmcache_settings
from lmcache_ext.manifests.nodes import documents
from lmcache_ext.manifests.text import File

_PLACE = re.compile(r" \(manifests:[0-9]+:[0-9]+\)")
_NO_RAY = "a model over several nodes is KServe's workerSpec: see its multi-node runtimes"
_PROBES = "the runtime's probes ask the engine, at /v2/health"
_ELSEWHERE = {
    "loraAdapters": "adapters are --lora-modules here",
    "loraController": "adapters are --lora-modules here",
    "grafanaDashboards": "not a part of serving; deploy/components/monitoring has rules and a dashboard",
    "kube-prometheus-stack": "not a part of serving: install it by itself",
    "prometheus-adapter": "not a part of serving: install it by itself",
}


class Converted(NamedTuple):
    objects: list[Values]
    ledger: Ledger


def convert(file: File, options: Options) -> Converted:
    """Raises ManifestError for what is no values file, and for values that cannot be carried over."""
    nodes = documents(file.window())
    if len(nodes) != 1 or kind_of(nodes[0]) != HELM:
        raise ManifestError(f"{file.name}: not one document of Helm values: it has no servingEngineSpec")
    ledger = Ledger()
    root = Section(nodes[0], "", ledger)
    server_objects, remote = servers.cache_server(root.inner("cacheserverSpec"), options)
    storage, shared = _shared_storage(root.inner("sharedPvcStorage"), options)
    serving = root.inner("servingEngineSpec")
    engines, files = _engines(serving, options, remote, shared)
    router = root.inner("routerSpec")
    control = controller.controller(router, options, files)
    service = servers.router_service(router, options, list(files))
    extra = root.mappings("extraObjects", "as they are")
    for name, why in _ELSEWHERE.items():
        root.refuse(why, name)
    root.close()
    objects = [*storage, *server_objects, *control, *engines, *service, *extra]
    return Converted([_in_namespace(each, options) for each in objects], ledger)


def _in_namespace(manifest: Values, options: Options) -> Values:
    if not options.namespace:
        return manifest
    return {**manifest, "metadata": {**manifest["metadata"], "namespace": options.namespace}}


def _engines(
    serving: Section, options: Options, remote: tuple[str, str] | None, shared: str
) -> tuple[list[Values], dict[str, Values]]:
    """(objects, the LMCache file of each model by its name, {} where its cache is off)."""
    wanted = serving.take("enableEngine", "whether there are models", default=True)
    port = serving.whole("servicePort", "the port of each model's Service", 80)
    made: list[tuple[models.Model, Cache | None]] = []
    objects: list[Values] = _configs(serving, options)
    for section in serving.each("modelSpec"):
        if section.take("enabled", "whether there is an InferenceService", default=True) and wanted:
            made.append(_model(section, serving, options, remote, shared))
        else:
            section.close("the model is not enabled")
    with_cache = [model for model, cache in made if cache is not None]
    for model, cache in made:
        name = "lmcache-config" if len(with_cache) == 1 else f"lmcache-config-{model.name}"
        models.write_cache(model, cache, name)
        if cache is not None:
            objects.append(models.config_map(name, {FILE: _yaml(cache.settings)}))
        service = models.inference_service(model, serving)
        objects += [*model.objects, service, servers.engine_service(options, model.name, model.section, port)]
        _close_model(model.section)
    _close_serving(serving, any_model=bool(made))
    files = {model.name: cache.settings if cache is not None else {} for model, cache in made}
    return [*_secret(made, options), *objects], files


def _model(
    section: Section, serving: Section, options: Options, remote: tuple[str, str] | None, shared: str
) -> tuple[models.Model, Cache | None]:
    model = models.new_model(section, options)
    write_replicas(section, model.predictor)
    write_placement(section, serving, model.predictor)
    models.write_args(model)
    models.write_env(model, serving)
    models.write_storage(model, shared)
    models.write_templates(model)
    _write_init_container(model)
    is_alone = model.predictor["maxReplicas"] == 1
    cache = lmcache_settings(section.inner("lmcacheConfig"), options, model.env, remote, shared, is_alone=is_alone)
    return model, cache


def _write_init_container(model: models.Model) -> None:
    section = model.section
    container = section.peek("initContainer")
    if not container:
        section.take("initContainer", "nothing: it is empty")
        return
    if "cache-server" in str(container) or "SERVER_SERVICE_PORT" in str(container):
        section.refuse("the engine starts without the cache server, and finds it when it is there", "initContainer")
        return
    container = dict(section.mapping("initContainer", "predictor.initContainers"))
    mounts = list(container.pop("extraVolumeMounts", None) or [])
    if container.pop("mountPvcStorage", False):
        mounts += [mount for mount in model.mounts if mount["mountPath"] == "/data"]
    container |= {"volumeMounts": mounts} if mounts else {}
    model.predictor["initContainers"] = [{key: value for key, value in container.items() if value}]


def _close_model(section: Section) -> None:
    section.refuse("the image is the runtime's, which has vLLM and the cache", "repository", "tag")
    ray = section.inner("raySpec")
    if ray.peek("enabled", default=True) is False:
        ray.take("enabled", "no Ray cluster")
    ray.close(_NO_RAY)
    section.refuse("write a PodDisruptionBudget over serving.kserve.io/inferenceservice", "pdb")
    section.close()


def _close_serving(serving: Section, *, any_model: bool) -> None:
    serving.refuse("KServe's container listens at 8080", "containerPort")
    serving.refuse(_PROBES, "startupProbe", "livenessProbe", "readinessProbe")
    serving.refuse("the image is the runtime's: its policy is there too", "imagePullPolicy")
    serving.refuse("KServe rolls out by predictor.deploymentStrategy", "strategy")
    serving.refuse("no side car: adapters are --lora-modules here", "sidecar")
    serving.refuse("the InferenceService is annotated for scraping", "serviceMonitor")
    serving.refuse("a Service of your own can have more ports", "extraPorts")
    if not any_model:
        serving.refuse(
            "there is no model it is for", *chart.SERVING - {"modelSpec", "enableEngine", "servicePort", "configs"}
        )
    serving.close()


def _configs(serving: Section, options: Options) -> list[Values]:
    data = serving.mapping("configs", f"ConfigMap {options.release}-configs, envFrom")
    values = {str(key): str(value) for key, value in data.items()}
    return [models.config_map(f"{options.release}-configs", values)] if values else []


def _secret(made: list[tuple[models.Model, Cache | None]], options: Options) -> list[Values]:
    data = {key: value for model, _ in made for key, value in model.secrets.items()}
    metadata = {"name": options.secret}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "stringData": data}
    return [secret] if data else []


def _shared_storage(section: Section, options: Options) -> tuple[list[Values], str]:
    """(objects, the directory all models share or "")."""
    if not section.take("enabled", "a PersistentVolumeClaim of all models", default=False):
        section.close("sharedPvcStorage.enabled is not true")
        return [], ""
    name = f"{options.release}-shared-pvc-storage"
    spec: Values = {
        "accessModes": section.items("accessModes", "the claim of all models", ["ReadWriteMany"]),
        "resources": {"requests": {"storage": str(section.take("size", "the claim of all models", default="100Gi"))}},
    }
    storage_class = section.take("storageClass", "the claim of all models")
    spec |= {"storageClassName": storage_class} if storage_class else {}
    path = section.take("hostPath", "a PersistentVolume")
    nfs = section.mapping("nfs", "a PersistentVolume")
    section.refuse("the claim is mounted, and needs no image", "image")
    section.close()
    objects: list[Values] = []
    if path or (nfs.get("server") and nfs.get("path")):
        source = {"hostPath": {"path": path}} if path else {"nfs": {"server": nfs["server"], "path": nfs["path"]}}
        volume = {"capacity": {"storage": spec["resources"]["requests"]["storage"]}, "accessModes": spec["accessModes"]}
        volume |= {"storageClassName": storage_class} if storage_class else {}
        metadata = {"name": name}
        objects.append(
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": {**volume, **source}}
        )
        spec["volumeName"] = name
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": f"{name}-claim"}, "spec": spec}
    return [*objects, claim], models.SHARED_FOLDER


# --- text ---------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, lists indented below their key, everything written out."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(value: object) -> str:
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=2**31, allow_unicode=True))


def as_text(converted: Converted, source: str) -> str:
    """The manifests, under a comment with all that was not mapped and all that is different.

    Values that could not have worked (a buffer larger than its pod) are mended as ``check --fix`` would, and named.
    """
    ledger = converted.ledger
    file = File("manifests", "---\n".join(_yaml(each) for each in converted.objects))
    for finding in check([file]).findings:
        if finding.fixable and finding.severity != "note":
            ledger.note(f"mended: {_PLACE.sub('', finding.message)}: {finding.fix}")
    (body,) = mend([file]).fixed or (file,)
    lines = [f"# KServe manifests for {source}, by lmcache-ext convert."]
    if ledger.unmapped:
        lines.append("# Not mapped:")
        lines += [f"#   {entry.path}: {_line(entry.target)}" for entry in ledger.unmapped]
    if ledger.notes:
        lines.append("# Different:")
        lines += [f"#   {_line(note)}" for note in ledger.notes]
    return "\n".join(lines) + "\n" + body.text


def _line(text: str) -> str:
    return " ".join(text.split())
