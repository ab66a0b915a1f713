"""One ``modelSpec[]`` as an InferenceService, with the claims, Secrets and ConfigMaps it needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.convert.ledger import Ledger, Section, Values
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.manifests.convert.resources import model_resources
from lmcache_ext.manifests.convert.settings import FILE, FOLDER, Cache
from lmcache_ext.manifests.quantities import GIB, write_gib

TRANSFER = '--kv-transfer-config={"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
SHARED_FOLDER = "/data/shared-pvc-storage"
PORT = 8080
_GRACE_S = 60  # --shutdown-timeout 30, and 20 to end
_GROUP = 1000  # of the user in the image
_SHM_SLACK_BYTES = GIB
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass
class Model:
    """One InferenceService in the making, and the objects beside it."""

    section: Section
    options: Options
    name: str
    predictor: Values = field(default_factory=dict)
    model: Values = field(default_factory=dict)
    args: list[str] = field(default_factory=list)
    env: list[Values] = field(default_factory=list)
    mounts: list[Values] = field(default_factory=list)
    volumes: list[Values] = field(default_factory=list)
    objects: list[Values] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)

    @property
    def ledger(self) -> Ledger:
        return self.section.ledger

    def add_volume(self, volume: Values, path: str, **mount: Any) -> None:  # noqa: ANN401
        """A volume, mounted."""
        self.volumes.append(volume)
        self.mounts.append({"name": volume["name"], "mountPath": path, **mount})


def new_model(section: Section, options: Options) -> Model:
    """Raises ManifestError for a name that no InferenceService can have."""
    name = str(section.take("name", "InferenceService: metadata.name", default=""))
    if not _NAME.fullmatch(name):
        raise ManifestError(f"{section.path}.name: {name!r} cannot be an InferenceService's: a-z, 0-9 and -, a-z first")
    return Model(section, options, name)


def write_args(model: Model) -> None:
    """The command line, from modelURL and vllmConfig."""
    section = model.section
    url = str(section.take("modelURL", "--model_id", default=""))
    if not url:
        raise ManifestError(f"{section.path}: no modelURL: name the model")
    model.args.append(f"--model_name={model.name}")
    if "://" in url:
        model.model["storageUri"] = url
    else:
        model.args.append(f"--model_id={url}")
    model.args.append(f"--served-model-name={url}")
    revision = section.take("modelRevision", "--model_revision")
    model.args += [f"--model_revision={revision}"] if revision else []
    _write_vllm(model, section.inner("vllmConfig"))
    for key, flag in (("enableLoRA", "--enable-lora"), ("enableTool", "--enable-auto-tool-choice")):
        model.args += [flag] if section.take(key, flag, default=False) else []
    parser = section.take("toolCallParser", "--tool-call-parser")
    model.args += [f"--tool-call-parser={parser}"] if parser else []


def _write_vllm(model: Model, config: Section) -> None:
    switches = {"enableChunkedPrefill": "chunked-prefill", "enablePrefixCaching": "prefix-caching"}
    for key, flag in switches.items():
        value = config.take(key, f"--enable-{flag} or --no-enable-{flag}")
        if value is not None:
            model.args.append(f"--enable-{flag}" if value else f"--no-enable-{flag}")
    if "enablePrefixCaching" not in config:
        model.ledger.note(f"{config.path}: prefix caching is on, as in vLLM; the chart switched it off unasked")
    numbers = {"maxModelLen": "max-model-len", "dtype": "dtype", "tensorParallelSize": "tensor-parallel-size"}
    numbers |= {"pipelineParallelSize": "pipeline-parallel-size", "maxNumSeqs": "max-num-seqs", "maxLoras": "max-loras"}
    numbers |= {"gpuMemoryUtilization": "gpu-memory-utilization", "runner": "runner", "convert": "convert"}
    for key, flag in numbers.items():
        value = config.take(key, f"--{flag}")
        model.args += [f"--{flag}={value}"] if value is not None else []
    model.args += [str(word) for word in config.items("extraArgs", "args, behind the others")]
    for key, modern in (("v1", "1"), ("v0", "0")):
        if str(config.peek(key, modern)) == modern:
            config.take(key, "nothing: vLLM has no other engine any more")
        else:
            config.refuse("vLLM's engine V0 no longer exists", key)
    config.refuse("metrics are of one process here, at /metrics", "prometheusMultiprocDir")
    config.close()


def write_env(model: Model, serving: Section) -> None:
    """The variables, and tokens as references to a Secret."""
    section, options = model.section, model.options
    for owner in (serving, section):
        model.env += [dict(item) for item in owner.mappings("env", "env")]
    token = section.take("hf_token", f"Secret {options.secret}, env HF_TOKEN")
    if token:
        model.env.insert(0, _from_secret(model, "HF_TOKEN", token, f"hf_token_{model.name}"))
    key = serving.take("vllmApiKey", f"Secret {options.secret}, env VLLM_API_KEY")
    if key and (not isinstance(key, dict) or key.get("secretName")):
        model.env.append(_from_secret(model, "VLLM_API_KEY", key, "vllmApiKey"))
    for item in model.env:
        if item.get("name") in _TOKENS and isinstance(item.get("value"), str):
            secret = _from_secret(model, item["name"], item.pop("value"), f"hf_token_{model.name}")
            item["valueFrom"] = secret["valueFrom"]
            model.ledger.note(f"{section.path}.env: {item['name']} went into the Secret {options.secret}")
    sources = []
    if serving.peek("configs"):
        sources.append({"configMapRef": {"name": f"{options.release}-configs"}})
    secret = section.mapping("envFromSecret", "envFrom")
    sources += [{"secretRef": {"name": secret["name"]}}] if secret.get("name") else []
    model.model |= {"envFrom": sources} if sources else {}


def _from_secret(model: Model, name: str, value: Any, key: str) -> Values:  # noqa: ANN401 - text, or a reference
    if isinstance(value, dict):
        ref = {"name": value.get("secretName", ""), "key": value.get("secretKey", "")}
    else:
        model.secrets[key] = str(value)
        ref = {"name": model.options.secret, "key": key}
    return {"name": name, "valueFrom": {"secretKeyRef": ref}}


def write_cache(model: Model, cache: Cache | None, config_map: str) -> None:
    """Switch the cache on, mount its file and what it needs."""
    section = model.section
    shm = section.take("shmSize", "the sizeLimit of /dev/shm")
    if cache is None:
        section.ledger.note(f"{section.path}: no cache (lmcacheConfig.enabled is not true)")
    else:
        model.args.append(TRANSFER)
        model.env.append({"name": "LMCACHE_CONFIG_FILE", "value": f"{FOLDER}/{FILE}"})
        model.add_volume({"name": "lmcache-config", "configMap": {"name": config_map}}, FOLDER, readOnly=True)
        if cache.disk_volume is not None:
            model.add_volume(cache.disk_volume, str(cache.settings["local_disk"]))
    needed = cache.host_bytes + _SHM_SLACK_BYTES if cache is not None else 0
    size = write_gib(needed) if needed and not shm else shm
    if size:
        volume = {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}
        model.add_volume(volume, "/dev/shm")


def write_storage(model: Model, shared: str) -> None:
    """Where the weights are downloaded to: the chart's claim, its emptyDir, or the volume of all."""
    section, options = model.section, model.options
    storage = section.take("pvcStorage", "a PersistentVolumeClaim at /data")
    claim = section.take("pvcExistingClaimName", "the claim at /data")
    extra = {key: section.take(key, "the claim at /data") for key in ("storageClass", "pvcMatchLabels")}
    modes = section.words("pvcAccessMode", "the claim at /data") or ["ReadWriteOnce"]
    metadata = {key: section.take(f"pvc{key.title()}", "the claim at /data") for key in ("labels", "annotations")}
    volume = f"{options.release}-storage"
    if isinstance(storage, dict):
        model.add_volume({"name": volume, **storage}, "/data")
    elif storage:
        name = claim or f"{options.release}-{model.name}-storage-claim"
        model.add_volume({"name": volume, "persistentVolumeClaim": {"claimName": name}}, "/data")
        if not claim:
            model.objects.append(_claim(name, str(storage), modes, extra, metadata))
        if model.predictor["maxReplicas"] > 1 and "ReadWriteMany" not in modes:
            model.ledger.note(f"{section.path}: replicas share a claim of {modes[0]}, as in the chart: one node only")
    if shared:
        claim_name = f"{options.release}-shared-pvc-storage-claim"
        volume = f"{options.release}-shared-pvc-storage"
        model.add_volume({"name": volume, "persistentVolumeClaim": {"claimName": claim_name}}, shared)
    if (storage or shared) and "securityContext" not in model.predictor:
        model.predictor["securityContext"] = {"fsGroup": _GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
        model.ledger.note(f"{section.path}: volumes belong to group {_GROUP}, as the runtime does not run as root")
    home = shared or ("/data" if storage else "")
    if home and not any(item.get("name") == "HF_HOME" for item in model.env):
        model.env.append({"name": "HF_HOME", "value": home})


def _claim(name: str, size: str, modes: list[str], extra: Values, metadata: Values) -> Values:
    spec: Values = {
        "accessModes": modes,
        "resources": {"requests": {"storage": size}},
    }
    spec |= {"storageClassName": extra["storageClass"]} if extra["storageClass"] else {}
    spec |= {"selector": {"matchLabels": extra["pvcMatchLabels"]}} if extra["pvcMatchLabels"] else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, **{key: value for key, value in metadata.items() if value}},
        "spec": spec,
    }


def write_templates(model: Model) -> None:
    """A chat template from a ConfigMap, or from the claim the chart expects."""
    section, release = model.section, model.options.release
    template = section.take("chatTemplate", "--chat-template")
    content = section.take("chatTemplateConfigMap", "a ConfigMap at /templates")
    if not template:
        return
    path = str(template) if str(template).startswith("/") else f"/templates/{template}"
    model.args.append(f"--chat-template={path}")
    name = f"{release}-{model.name}-chat-templates"
    if content:
        model.objects.append(config_map(name, {str(template): str(content)}))
        model.add_volume({"name": "templates", "configMap": {"name": name}}, "/templates")
    else:
        source = {"persistentVolumeClaim": {"claimName": "vllm-templates-pvc"}}
        model.add_volume({"name": "templates", **source}, "/templates")


def config_map(name: str, data: dict[str, str]) -> Values:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def _metadata(model: Model, serving: Section) -> Values:
    section = model.section
    annotations = {
        "serving.kserve.io/deploymentMode": "RawDeployment",
        "serving.kserve.io/enable-prometheus-scraping": "true",
        **section.mapping("annotations", "metadata.annotations"),
        **section.mapping("podAnnotations", "metadata.annotations, which KServe gives its pods"),
    }
    labels = {
        **serving.mapping("labels", "metadata.labels"),
        **section.mapping("labels", "metadata.labels"),
        **section.mapping("podLabels", "metadata.labels, which KServe gives its pods"),
    }
    metadata: Values = {"name": model.name, "annotations": {key: str(value) for key, value in annotations.items()}}
    return metadata | ({"labels": {key: str(value) for key, value in labels.items()}} if labels else {})


def inference_service(model: Model, serving: Section) -> Values:
    """All of it put together."""
    section = model.section
    old = f"{model.options.release}-{model.name}-deployment-vllm"
    model.ledger.note(f"{section.path}: the Deployment is {model.name}-predictor; the chart's was {old}")
    resources, on_gpu = model_resources(section)
    user = {key: section.mappings(f"extra{key}", key) for key in ("Volumes", "VolumeMounts")}
    model.model = {
        "modelFormat": {"name": "huggingface"},
        "runtime": model.options.runtime_for(on_gpu=on_gpu),
        **model.model,
        "args": model.args,
        "env": model.env,
        "resources": resources,
        "volumeMounts": [*model.mounts, *user["VolumeMounts"]],
    }
    security = serving.mapping("containerSecurityContext", "predictor.model.securityContext")
    model.model |= {"securityContext": security} if security else {}
    volumes = [*model.volumes, *user["Volumes"]]
    predictor = {**model.predictor, "terminationGracePeriodSeconds": _GRACE_S, "model": model.model, "volumes": volumes}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": _metadata(model, serving),
        "spec": {"predictor": predictor},
    }
