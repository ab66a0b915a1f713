"""`lmcache-ext convert`: the values of the tutorials as KServe manifests, and not a key lost."""

from pathlib import Path

import pytest
import yaml

from lmcache_ext.cli import main
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests import chart
from lmcache_ext.manifests.check import check
from lmcache_ext.manifests.convert.convert import as_text, convert
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.manifests.text import File

SEEDS = Path(__file__).resolve().parents[1] / "data" / "seeds"
MODEL = {
    "name": "mistral",
    "repository": "r",
    "tag": "t",
    "modelURL": "mistralai/Mistral-7B-Instruct-v0.2",
    "replicaCount": 1,
    "requestCPU": 10,
    "requestMemory": "40Gi",
    "requestGPU": 1,
}
CACHE = {"enabled": True, "cpuOffloadingBufferSize": "20"}


def converted(values, **options):
    """The ledger and the objects by (kind, name), of what `convert` writes; it must pass `check`."""
    text = values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False)
    result = convert(File("values.yaml", text), Options(**options))
    written = as_text(result, "values.yaml")
    findings = check([File("out.yaml", written)]).findings
    assert [one for one in findings if one.severity != "note"] == []
    objects = list(yaml.safe_load_all(written))
    if not any(note.startswith("mended:") for note in result.ledger.notes):
        assert objects == result.objects
    assert_complete(yaml.safe_load(text), result.ledger)
    return result.ledger, {(each["kind"], each["metadata"]["name"]): each for each in objects}


def assert_complete(values, ledger):
    """Every leaf of the values is entered, by itself or with what it is in."""
    for path in leaves(values, ""):
        assert any(parent in ledger.entries for parent in (*(path[:index] for index in dots(path)), path)), path


def dots(path):
    return [index for index, char in enumerate(path) if char in ".["]


def leaves(value, path):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path


def one_model(serving=(), **keys):
    return {"servingEngineSpec": {**dict(serving), "modelSpec": [{**MODEL, **keys}]}}


def engine(objects, name="mistral"):
    return objects["InferenceService", name]["spec"]["predictor"]


def settings(objects, name="lmcache-config"):
    return yaml.safe_load(objects["ConfigMap", name]["data"]["lmcache_config.yaml"])


def flags(predictor):
    return dict(arg.removeprefix("--").partition("=")[::2] for arg in predictor["model"]["args"])


def back(objects, name):
    """The values that manifests were made of, as far as they show."""
    predictor = engine(objects, name)
    model, given, file = predictor["model"], flags(predictor), settings(objects)
    vllm = {
        "enableChunkedPrefill": "no-enable-chunked-prefill" not in given,
        "enablePrefixCaching": "no-enable-prefix-caching" not in given,
        "maxModelLen": int(given["max-model-len"]),
    }
    claim = next(item for key, item in objects.items() if key[0] == "PersistentVolumeClaim")
    return {
        "name": given["model_name"],
        "modelURL": given["model_id"],
        "replicaCount": predictor["minReplicas"],
        "requestCPU": int(model["resources"]["requests"]["cpu"]),
        "requestMemory": model["resources"]["requests"]["memory"],
        "requestGPU": int(model["resources"]["requests"]["nvidia.com/gpu"]),
        "pvcStorage": claim["spec"]["resources"]["requests"]["storage"],
        "vllmConfig": vllm,
        "lmcacheConfig": {"enabled": True, "cpuOffloadingBufferSize": f"{file['max_local_cpu_size']:g}"},
    }


def back_server(objects, release):
    deployment = objects["Deployment", f"{release}-deployment-cache-server"]["spec"]
    (container,) = deployment["template"]["spec"]["containers"]
    (port,) = objects["Service", f"{release}-cache-server-service"]["spec"]["ports"]
    labels = deployment["template"]["metadata"]["labels"]
    return {
        "replicaCount": deployment["replicas"],
        "containerPort": int(container["args"][1]),
        "servicePort": port["port"],
        "serde": settings(objects)["remote_serde"],
        "resources": container["resources"],
        "labels": {key: value for key, value in labels.items() if "/" not in key},
    }


def test_seed_000_comes_back():
    text = (SEEDS / "000_values.yaml").read_text()
    ledger, objects = converted(text)
    values = yaml.safe_load(text)
    (model,) = values["servingEngineSpec"]["modelSpec"]
    token, _, _ = model.pop("hf_token"), model.pop("repository"), model.pop("tag")
    assert model["vllmConfig"].pop("v1") == 1  # the only engine there is
    assert back(objects, "mistral") == model
    assert objects["Secret", "vllm-secrets"]["stringData"] == {"hf_token_mistral": token}
    server = values["cacheserverSpec"]
    assert back_server(objects, "vllm") == {key: server[key] for key in server if key not in ("repository", "tag")}
    assert settings(objects)["remote_url"] == "lm://vllm-cache-server-service:81"
    assert [entry.path for entry in ledger.unmapped] == [
        "servingEngineSpec.modelSpec[0].repository",
        "servingEngineSpec.modelSpec[0].tag",
        "cacheserverSpec.repository",
        "cacheserverSpec.tag",
    ]


def test_seed_002_comes_back():
    text = (SEEDS / "002_values.yaml").read_text()
    ledger, objects = converted(text, release="llmstack")
    (model,) = yaml.safe_load(text)["servingEngineSpec"]["modelSpec"]
    (variable,) = model.pop("env")
    del model["repository"], model["tag"]
    assert back(objects, "mistral") == model
    assert objects["Secret", "llmstack-secrets"]["stringData"] == {"hf_token_mistral": variable["value"]}
    assert "remote_url" not in settings(objects)
    assert not [name for kind, name in objects if kind == "Deployment"]
    assert len(ledger.unmapped) == 2


def test_names_and_ports_that_scripts_know():
    _, objects = converted((SEEDS / "000_values.yaml").read_text())
    router = objects["Service", "vllm-router-service"]["spec"]
    assert [(port["port"], port["targetPort"]) for port in router["ports"]] == [(80, 8080)]
    assert router["selector"]["serving.kserve.io/inferenceservice"] == "mistral"
    assert ("Service", "vllm-mistral-engine-service") in objects
    assert ("PersistentVolumeClaim", "vllm-mistral-storage-claim") in objects
    assert flags(engine(objects))["served-model-name"] == "mistralai/Mistral-7B-Instruct-v0.2"  # what curl asks for


def test_the_cache_is_on_mounted_and_has_room():
    _, objects = converted((SEEDS / "000_values.yaml").read_text())
    predictor = engine(objects)
    model = predictor["model"]
    assert '--kv-transfer-config={"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}' in model["args"]
    assert {"name": "LMCACHE_CONFIG_FILE", "value": "/lmcache/lmcache_config.yaml"} in model["env"]
    (shm,) = [volume for volume in predictor["volumes"] if volume["name"] == "dshm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "21Gi"}
    assert model["resources"]["limits"]["memory"] == "40Gi"
    assert predictor["terminationGracePeriodSeconds"] == 60


def test_an_empty_runtime_class_is_left_out_and_a_name_is_not():
    for written, expected in (("", None), ("nvidia", "nvidia")):
        _, objects = converted(one_model({"runtimeClassName": written}))
        assert engine(objects).get("runtimeClassName") == expected


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ({}, {"max_local_cpu_size": 20}),
        ({"cpuOffloadingBufferSize": 20}, {"max_local_cpu_size": 20}),
        ({"cpuOffloadingBufferSize": "0.5"}, {"max_local_cpu_size": 0.5}),
        ({"cpuOffloadingBufferSize": "4Gi"}, {"max_local_cpu_size": 4}),
        ({"cpuOffloadingBufferSize": 0}, {"local_cpu": False}),
        ({"logLevel": "DEBUG", "instanceId": "a"}, {"log_level": "DEBUG", "lmcache_instance_id": "a"}),
        ({"diskOffloadingBufferSize": "60"}, {"local_disk": "/kv", "max_local_disk_size": 60}),
    ],
)
def test_sizes_by_any_spelling(cache, expected):
    _, objects = converted(one_model(lmcacheConfig={**CACHE, **cache}))
    found = settings(objects)
    assert {key: found.get(key) for key in expected} == expected


def test_a_disk_gets_the_volume_the_chart_forgot():
    _, objects = converted(one_model(lmcacheConfig={**CACHE, "diskOffloadingBufferSize": "60"}))
    (volume,) = [volume for volume in engine(objects)["volumes"] if volume["name"] == "kv"]
    assert volume["emptyDir"] == {"sizeLimit": "66Gi"}
    shared = {"sharedPvcStorage": {"enabled": True, "size": "100Gi", "accessModes": ["ReadWriteMany"]}}
    values = one_model(lmcacheConfig={**CACHE, "diskOffloadingBufferSize": "60"}) | shared
    _, objects = converted(values)
    assert settings(objects)["local_disk"] == "/data/shared-pvc-storage/lmcache"
    assert ("PersistentVolumeClaim", "vllm-shared-pvc-storage-claim") in objects


def test_settings_among_the_variables_move_into_the_file():
    """As the tutorial for Google's cloud writes its local SSD."""
    env = [{"name": "LMCACHE_LOCAL_DISK", "value": "file:///ssd/"}, {"name": "A", "value": "b"}]
    extra = {
        "extraVolumes": [{"name": "ssd", "emptyDir": {"sizeLimit": "700Gi"}}],
        "extraVolumeMounts": [{"name": "ssd", "mountPath": "/ssd"}],
    }
    _, objects = converted(one_model(lmcacheConfig={**CACHE, "diskOffloadingBufferSize": "600"}, env=env, **extra))
    assert settings(objects)["local_disk"] == "file:///ssd/"
    assert [item["name"] for item in engine(objects)["model"]["env"]] == ["A", "LMCACHE_CONFIG_FILE"]


def test_a_token_by_reference_stays_one():
    _, objects = converted(one_model(hf_token={"secretName": "mine", "secretKey": "token"}))
    env = engine(objects)["model"]["env"]
    assert env[0] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "token"}}}
    assert not [name for kind, name in objects if kind == "Secret"]


def test_the_api_key_goes_into_the_secret():
    _, objects = converted(one_model({"vllmApiKey": "abc"}))
    assert objects["Secret", "vllm-secrets"]["stringData"] == {"vllmApiKey": "abc"}
    assert engine(objects)["model"]["env"][0]["name"] == "VLLM_API_KEY"


def test_the_cache_server_of_the_newer_chart():
    server = {
        "enabled": True,
        "image": {"repository": "r", "tag": "t"},
        "servicePort": 81,
        "livenessProbe": {"periodSeconds": 7},
    }
    ledger, objects = converted(one_model(lmcacheConfig=CACHE) | {"cacheserverSpec": server})
    (container,) = objects["Deployment", "vllm-deployment-cache-server"]["spec"]["template"]["spec"]["containers"]
    assert container["livenessProbe"] == {"httpGet": {"path": "/healthz", "port": 9090}, "periodSeconds": 7}
    assert container["resources"]["limits"]["memory"] == "8Gi"
    assert any("no memory limit" in note for note in ledger.notes)
    assert ledger.entries["cacheserverSpec.image"].mapped is False


def test_a_cache_server_that_is_off_is_off():
    ledger, objects = converted(
        one_model(lmcacheConfig=CACHE) | {"cacheserverSpec": {"enabled": False, "servicePort": 81}}
    )
    assert not [name for kind, name in objects if kind == "Deployment"]
    assert "remote_url" not in settings(objects)
    assert ledger.entries["cacheserverSpec.servicePort"].target == "no cache server is wanted"


def test_several_cache_servers_share_the_keys():
    """Behind one Service they would miss by turns: each is named."""
    server = {"replicaCount": 2, "containerPort": 8080, "servicePort": 81}
    ledger, objects = converted(one_model(lmcacheConfig=CACHE) | {"cacheserverSpec": server}, release="r")
    assert objects["StatefulSet", "r-deployment-cache-server"]["spec"]["serviceName"] == "r-cache-server-service"
    assert objects["Service", "r-cache-server-service"]["spec"]["clusterIP"] == "None"
    assert settings(objects)["remote_url"] == (
        "lm://r-deployment-cache-server-0.r-cache-server-service:8080,"
        "r-deployment-cache-server-1.r-cache-server-service:8080"
    )
    assert any("2 servers" in note for note in ledger.notes)


def test_several_models_have_a_file_and_a_service_each():
    models = [{**MODEL, "name": "a", "lmcacheConfig": CACHE}, {**MODEL, "name": "b", "lmcacheConfig": CACHE}]
    ledger, objects = converted({"servingEngineSpec": {"modelSpec": models}})
    assert {name for kind, name in objects if kind == "ConfigMap"} == {"lmcache-config-a", "lmcache-config-b"}
    assert {name for kind, name in objects if kind == "Service"} == {"vllm-a-engine-service", "vllm-b-engine-service"}
    assert any("vllm-router-service" in note for note in ledger.notes)


def test_a_model_without_a_cache_has_none():
    ledger, objects = converted(one_model())
    assert not [key for key in objects if key[0] == "ConfigMap"]
    assert not any("kv-transfer" in arg for arg in engine(objects)["model"]["args"])
    assert any("no cache" in note for note in ledger.notes)


def test_a_model_without_a_gpu_runs_on_the_runtime_for_cpus():
    _, objects = converted(one_model(requestGPU=0, lmcacheConfig=CACHE))
    assert engine(objects)["model"]["runtime"] == "lmcache-vllm-cpu"
    _, objects = converted(one_model(requestGPU=0), runtime="mine")
    assert engine(objects)["model"]["runtime"] == "mine"


def test_a_part_of_a_gpu_takes_back_the_whole_one_of_the_runtime():
    _, objects = converted(one_model(requestGPU=1, requestGPUType="nvidia.com/mig-4g.71gb"))
    limits = engine(objects)["model"]["resources"]["limits"]
    assert limits == {"memory": "40Gi", "nvidia.com/mig-4g.71gb": "1", "nvidia.com/gpu": "0"}


def test_values_that_could_not_have_worked_are_mended_and_named():
    volume = {
        "extraVolumes": [{"name": "ssd", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "ssd", "mountPath": "/kv"}],
    }
    env = [{"name": "LMCACHE_LOCAL_DISK", "value": "/kv"}]
    cache = {**CACHE, "diskOffloadingBufferSize": "60"}
    ledger, objects = converted(one_model(requestMemory="16Gi", shmSize="8Gi", lmcacheConfig=cache, env=env, **volume))
    predictor = engine(objects)
    assert predictor["model"]["resources"]["limits"]["memory"] == "24Gi"
    sizes = {item["name"]: item["emptyDir"]["sizeLimit"] for item in predictor["volumes"] if "emptyDir" in item}
    assert sizes == {"dshm": "21Gi", "ssd": "66Gi"}
    mended = [note for note in ledger.notes if note.startswith("mended:")]
    assert any("a memory limit of 16Gi does not hold max_local_cpu_size of 20 GiB" in note for note in mended)
    assert len(mended) == 4  # the request, the limit, /dev/shm, the disk


def test_keys_of_prefill_and_decode_are_named_with_the_reason():
    cache = {**CACHE, "enablePD": True, "enableNixl": True, "nixlRole": "sender", "kvRole": "kv_producer"}
    ledger, objects = converted(one_model(lmcacheConfig=cache))
    refused = {entry.path.rpartition(".")[2] for entry in ledger.unmapped}
    assert refused >= {"enablePD", "enableNixl", "nixlRole", "kvRole"}
    assert '"kv_role":"kv_both"' in engine(objects)["model"]["args"][-1]


def test_a_key_the_chart_does_not_know_is_named_with_its_line():
    text = yaml.safe_dump(one_model(lmcacheConfig=CACHE), sort_keys=False) + "surprise: 1\n"
    ledger, _ = converted(text)
    (entry,) = [entry for entry in ledger.unmapped if entry.path == "surprise"]
    assert entry.place.line == text.count("\n")
    assert entry.target == "the chart knows no such key"


def test_every_key_the_chart_knows_is_mapped_or_has_a_reason_of_its_own():
    model = (
        dict.fromkeys(chart.MODEL, "")
        | MODEL
        | {"enabled": True, "keda": {"enabled": True, "triggers": []}, "raySpec": {"headNode": {}}}
    )
    model |= {"vllmConfig": {}, "lmcacheConfig": dict.fromkeys(chart.LMCACHE) | CACHE, "resources": {}, "env": []}
    model["vllmConfig"] = dict.fromkeys(chart.VLLM, 1) | {"extraArgs": [], "maxModelLen": 4096}
    for key in ("annotations", "podAnnotations", "labels", "podLabels", "envFromSecret"):
        model[key] = {}
    for key in ("requestGPUMem", "requestGPUMemPercentage", "requestGPUCores", "limitGPUMem", "limitGPUMemPercentage"):
        model[key] = 1
    model |= {"limitGPUCores": 1, "limitCPU": 1, "limitMemory": "48Gi", "tolerations": [], "requestGPUType": None}
    serving = dict.fromkeys(chart.SERVING) | {"enableEngine": True, "modelSpec": [model]}
    server = dict.fromkeys(chart.CACHE_SERVER) | {"enabled": True}
    values = dict.fromkeys(chart.SECTIONS) | {"servingEngineSpec": serving, "cacheserverSpec": server}
    ledger, _ = converted(values)
    assert [entry.path for entry in ledger.unmapped if "no such key" in entry.target] == []


def test_tolerations_node_terms_and_init_containers_are_carried_over():
    keys = {
        "tolerations": [{"key": "b"}],
        "nodeSelectorTerms": [{"matchExpressions": []}],
        "initContainer": {"name": "i", "image": "busybox:1", "args": ["ls"], "mountPvcStorage": True, "env": []},
        "pvcStorage": "50Gi",
        "chatTemplate": "t.jinja",
        "chatTemplateConfigMap": "{{ messages }}\n",
    }
    _, objects = converted(one_model({"tolerations": [{"key": "a"}]}, **keys))
    predictor = engine(objects)
    assert predictor["tolerations"] == [{"key": "a"}, {"key": "b"}]
    required = predictor["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"] == [{"matchExpressions": []}]
    (container,) = predictor["initContainers"]
    assert container["volumeMounts"] == [{"name": "vllm-storage", "mountPath": "/data"}]
    assert flags(predictor)["chat-template"] == "/templates/t.jinja"
    assert objects["ConfigMap", "vllm-mistral-chat-templates"]["data"] == {"t.jinja": "{{ messages }}\n"}


def test_waiting_for_the_cache_server_is_not_carried_over():
    wait = {"name": "wait", "image": "i", "args": ["probe $(RELEASE_NAME)-cache-server-service"]}
    ledger, objects = converted(one_model(initContainer=wait))
    assert "initContainers" not in engine(objects)
    assert "starts without the cache server" in ledger.entries["servingEngineSpec.modelSpec[0].initContainer"].target


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("chunk_size: 256\n", "not one document of Helm values"),
        ("servingEngineSpec:\n  modelSpec:\n  - name: Big_Model\n", "cannot be an InferenceService's"),
        ("servingEngineSpec:\n  modelSpec:\n  - name: a\n", "no modelURL"),
        (
            "servingEngineSpec:\n  modelSpec:\n  - name: a\n    modelURL: m\n"
            "    lmcacheConfig: {enabled: true, cpuOffloadingBufferSize: lots}\n",
            "is not a size",
        ),
        (
            "cacheserverSpec:\n  servicePort: [81]\n",
            r"x.yaml:2:3: cacheserverSpec.servicePort: a single value is expected",
        ),
        ("cacheserverSpec:\n  replicaCount: two\n", "cacheserverSpec.replicaCount: a whole number is expected"),
        (
            "cacheserverSpec:\n  resources: {limits: 10G}\n",
            "resources: requests and limits, each a mapping, is expected",
        ),
        ("servingEngineSpec:\n  tolerations: [a]\n  modelSpec:\n  - {name: a, modelURL: m}\n", "a list of mappings"),
    ],
)
def test_what_cannot_be_carried_over_is_one_line(text, problem):
    with pytest.raises(ManifestError, match=problem):
        convert(File("x.yaml", text), Options())


def test_the_program_prints_manifests_and_names_the_rest(capsys, tmp_path):
    values = SEEDS / "000_values.yaml"
    assert main(["convert", str(values), "--explain", "-n", "serving"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"# KServe manifests for {values}, by lmcache-ext convert.\n# Not mapped:\n")
    assert "#   cacheserverSpec.tag: the image of this package has the server\n" in captured.out
    assert {each["metadata"]["namespace"] for each in yaml.safe_load_all(captured.out)} == {"serving"}
    assert f"{values}:5:5: servingEngineSpec.modelSpec[0].repository not mapped: " in captured.err
    assert f"{values}:10:5: servingEngineSpec.modelSpec[0].requestMemory -> resources.requests.memory\n" in captured.err
    assert "output:" not in captured.err
    bad = tmp_path / "x.yaml"
    bad.write_text("a: 1\n")
    assert main(["convert", str(bad)]) == 2
    assert main(["convert", str(tmp_path / "none")]) == 2


def test_the_program_says_what_will_not_work_of_what_it_made(capsys, tmp_path):
    values = tmp_path / "values.yaml"
    values.write_text((SEEDS / "000_values.yaml").read_text().replace('requestMemory: "40Gi"', "requestMemory: plenty"))
    assert main(["convert", str(values)]) == 1
    captured = capsys.readouterr()
    line = next(number for number, line in enumerate(captured.out.splitlines(), start=1) if "memory: plenty" in line)
    assert f"output:{line}:" in captured.err
    assert "plenty is not a quantity of Kubernetes [quantity]" in captured.err


@pytest.mark.parametrize(
    ("written", "modes"),
    [("ReadWriteMany", ["ReadWriteMany"]), ("[ReadWriteMany]", ["ReadWriteMany"]), ("''", ["ReadWriteOnce"])],
)
def test_access_modes_of_a_claim_with_or_without_the_list(written, modes):
    text = (
        f"servingEngineSpec:\n  modelSpec:\n  - {{name: a, modelURL: m, pvcStorage: 5Gi, pvcAccessMode: {written}}}\n"
    )
    made = convert(File("x.yaml", text), Options()).objects
    (claim,) = [one for one in made if one["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == modes
