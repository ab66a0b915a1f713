"""`lmcache-ext convert` on values with every key that the chart's own tutorials use, and what today's chart added.

The files in tests/data/charts are ours: the keys and their shapes are the chart's, the values are nobody's.
"""

import functools
import operator
import random
from pathlib import Path

import pytest
import yaml

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.convert.convert import as_text, convert
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.manifests.text import File
from runtime import args as runtime_args
from tests.unit.test_convert import converted, engine, flags, settings

CHARTS = Path(__file__).resolve().parents[1] / "data" / "charts"
MODEL = "servingEngineSpec.modelSpec[0]"


def of(name):
    """The ledger and the objects by (kind, name); it passes `check`, and every key is in the ledger."""
    return converted((CHARTS / f"{name}.yaml").read_text())


def names(objects, kind):
    return {name for its, name in objects if its == kind}


@pytest.mark.parametrize("name", sorted(path.stem for path in CHARTS.glob("*.yaml")))
def test_the_model_server_takes_every_argument(name, monkeypatch, tmp_path):
    (tmp_path / "tools.jinja").write_text("{{ messages }}")
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)
    monkeypatch.setattr(runtime_args, "takes_over", lambda: True)
    _, objects = of(name)
    for model in names(objects, "InferenceService"):
        arguments = [one.replace("/templates", str(tmp_path)) for one in engine(objects, model)["model"]["args"]]
        found = runtime_args.parse(arguments)
        assert model in found.model_names


# file -> (key, a word of what is said of it) of what has no place in KServe's manifests
NOT_MAPPED = {
    "nodes": [("servingEngineSpec.strategy", "deploymentStrategy"), (f"{MODEL}.repository", "image is the runtime's")],
    "two-models": [("servingEngineSpec.modelSpec[1].vllmConfig.v0", "V0 no longer exists")],
    "cpu-and-disk": [("servingEngineSpec.startupProbe", "/v2/health"), ("routerSpec.labels", "no router")],
    "cache-server": [("routerSpec.sessionKey", "no router"), (f"{MODEL}.initContainer", "without the cache server")],
    "lora": [("loraAdapters", "--lora-modules"), ("loraController", "--lora-modules")],
    "key-and-gateway": [("routerSpec.route", "no router"), ("routerSpec.otel", "no router")],
    "ray": [(f"{MODEL}.raySpec.headNode", "workerSpec")],
    "disaggregated": [(f"{MODEL}.lmcacheConfig.nixlPeerHost", "not split"), ("routerSpec.extraArgs", "no router")],
    "kv-aware": [("routerSpec.sessionKey", "no router"), ("routerSpec.routingLogic", "no router")],
    "keda": [(f"{MODEL}.keda.triggers", "scaleMetric"), ("routerSpec.pdb", "no router")],
}


@pytest.mark.parametrize("name", NOT_MAPPED)
def test_what_has_no_place_is_named_with_its_reason(name):
    ledger, _ = of(name)
    said = {entry.path: entry.target for entry in ledger.unmapped}
    for key, reason in NOT_MAPPED[name]:
        assert reason in said[key]


@pytest.mark.parametrize(
    "logic",
    ["roundrobin", "session", "prefixaware", "kvaware", "disaggregated_prefill", "disaggregated_prefill_orchestrated"],
)
def test_every_way_of_routing_is_named_as_not_carried_over(logic):
    text = (CHARTS / "keda.yaml").read_text().replace("routingLogic: prefixaware", f"routingLogic: {logic}")
    ledger, _ = converted(text)
    assert not ledger.entries["routerSpec.routingLogic"].mapped


def test_nodes_and_another_makers_gpus():
    _, objects = of("nodes")
    found = engine(objects, "tiny")
    assert found["model"]["resources"]["limits"]["amd.com/gpu"] == "1"
    (term,) = found["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "pool", "operator": "In", "values": ["gpus"]}]
    assert found["tolerations"] == [
        {"key": "accelerator", "operator": "Equal", "value": "mi300", "effect": "NoSchedule"}
    ]
    assert found["minReplicas"] == 2
    assert found["model"]["args"][-2:] == ["--gpu-memory-utilization", "0.35"]


def test_models_have_their_own_claim_token_and_service():
    _, objects = of("two-models")
    claim = objects["PersistentVolumeClaim", "vllm-small-storage-claim"]["spec"]
    assert claim["selector"] == {"matchLabels": {"model": "small-weights"}}
    tokens = {
        model: engine(objects, model)["model"]["env"][0]["valueFrom"]["secretKeyRef"] for model in ("small", "large")
    }
    assert tokens == {
        "small": {"name": "vllm-secrets", "key": "hf_token_small"},
        "large": {"name": "hub", "key": "token"},
    }
    assert names(objects, "Service") == {"vllm-small-engine-service", "vllm-large-engine-service"}
    assert flags(engine(objects, "large"))["tensor-parallel-size"] == "2"


def test_kv_in_memory_and_on_a_disk():
    _, objects = of("cpu-and-disk")
    assert (
        settings(objects).items()
        >= {
            "max_local_cpu_size": 40.0,
            "local_disk": "file:///kv-on-disk/",
            "max_local_disk_size": 200.0,
        }.items()
    )
    assert objects["Service", "vllm-router-service"]["spec"]["type"] == "LoadBalancer"


def test_engines_find_the_cache_server_under_the_charts_name():
    _, objects = of("cache-server")
    assert settings(objects)["remote_url"] == "lm://vllm-cache-server-service:81"
    assert objects["Service", "vllm-cache-server-service"]["spec"]["ports"][0]["port"] == 81
    (container,) = objects["Deployment", "vllm-deployment-cache-server"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "9G"}
    assert "initContainers" not in engine(objects, "sharing")  # nobody has to wait for a cache


def test_keys_of_today_are_those_of_before():
    """`image:` as a mapping, and replicas by KEDA."""
    _, objects = of("keda")
    found = engine(objects, "elastic")
    assert (found["minReplicas"], found["maxReplicas"]) == (1, 4)
    assert settings(objects)["remote_url"] == "lm://vllm-cache-server-service:80"


def test_api_key_is_a_secret():
    _, objects = of("key-and-gateway")
    assert "sk-of-nobody" in objects["Secret", "vllm-secrets"]["stringData"].values()
    assert "sk-of-nobody" not in str(engine(objects, "guarded"))


def test_adapters_and_tools_are_flags_of_vllm():
    _, lora = of("lora")
    assert flags(engine(lora, "base")).keys() >= {"enable-lora", "max-loras"}
    _, tools = of("tools")
    assert (
        flags(engine(tools, "caller")).items()
        >= {
            "tool-call-parser": "llama3_json",
            "chat-template": "/templates/tools.jinja",
        }.items()
    )


def test_stages_of_a_pipeline():
    _, objects = of("ray")
    assert flags(engine(objects, "long"))["pipeline-parallel-size"] == "2"


ODD = (None, [], {}, "", "x y", 7, -1, 1.5, True, ["a"], {"a": 1}, [None], [{}], "{{ .Values.x }}", "a\nb")


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_odd_values_are_carried_over_or_refused_in_one_line(odd):
    chance = random.Random(repr(odd))
    for path in chance.sample(sorted(CHARTS.glob("*.yaml")), 6):
        values = yaml.safe_load(path.read_text())
        place = chance.choice(list(places(values)))
        owner = functools.reduce(operator.getitem, place[:-1], values)
        owner[place[-1]] = odd
        assert "\n" not in refusal(File(path.name, yaml.safe_dump(values)))


def refusal(file: File) -> str:
    """Why a file is not converted; empty where it is."""
    try:
        as_text(convert(file, Options()), file.name)
    except ManifestError as error:
        return str(error)
    return ""


def places(value, path=()):
    """The ways to everything that is in a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("key", ["secret", 1234])
def test_an_api_key_may_look_like_a_number(key):
    text = f"servingEngineSpec:\n  vllmApiKey: {key}\n  modelSpec:\n  - {{name: a, modelURL: m}}\n"
    (secret,) = [one for one in convert(File("x.yaml", text), Options()).objects if one["kind"] == "Secret"]
    assert secret["stringData"] == {"vllmApiKey": str(key)}
