"""`lmcache-ext tune` against an API server: what it asks, what it shows, and what it applies."""

import sys
import time
from pathlib import Path

import pytest
import yaml

from lmcache_ext.cli import main
from tests.kube_api import APPLY, TOKEN, KubeApi
from tests.traps import ENGINE, RUNTIME
from tests.tuning import metrics

pytest.importorskip("kubernetes")

RBAC = Path(__file__).resolve().parents[2] / "deploy" / "components" / "tune-rbac" / "rbac.yaml"
CONFIG_MAP = "/api/v1/namespaces/models/configmaps/lmcache-config"
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/models/inferenceservices"
PROXY = "/api/v1/namespaces/models/services/qwen-predictor:80/proxy/metrics"


def objects():
    """The ConfigMap, the InferenceService and its runtime, in a namespace."""
    text = ENGINE.replace("llama3", "qwen").replace("    model:\n", "    model:\n      runtime: lmcache-vllm\n")
    for manifest in yaml.safe_load_all(text):
        manifest["metadata"]["namespace"] = "models"
        yield {"ConfigMap": "configmaps", "InferenceService": "inferenceservices"}[manifest["kind"]], manifest
    yield "clusterservingruntimes", {**yaml.safe_load(RUNTIME), "kind": "ClusterServingRuntime"}


def granted():
    return [
        rule
        for manifest in yaml.safe_load_all(RBAC.read_text())
        if manifest["kind"] in ("Role", "ClusterRole")
        for rule in manifest["rules"]
    ]


@pytest.fixture
def api():
    with KubeApi(granted(), metrics(started_s=time.time() - 36000)) as server:
        for resource, manifest in objects():
            server.add(resource, manifest)
        yield server


@pytest.fixture
def tune(api, tmp_path):
    def run(*argv, token=TOKEN):
        (tmp_path / "kubeconfig").write_text(api.kubeconfig(token))
        configured = ["--kubeconfig", str(tmp_path / "kubeconfig"), "--configmap", "models/lmcache-config"]
        return main(["tune", *configured, *argv])

    return run


def test_it_only_reads_unless_told_to_apply(api, tune, capsys):
    assert tune() == 0
    assert [(each.method, each.path) for each in api.requests] == [
        ("GET", CONFIG_MAP),
        ("GET", SERVICES),
        ("GET", "/apis/serving.kserve.io/v1alpha1/namespaces/models/servingruntimes/lmcache-vllm"),
        ("GET", "/apis/serving.kserve.io/v1alpha1/clusterservingruntimes/lmcache-vllm"),
        ("GET", PROXY),
    ]
    out = capsys.readouterr().out
    assert "prompts: 400\n" in out
    assert "max_local_cpu_size: 2 GiB -> 25 GiB" in out
    assert "--- ConfigMap/lmcache-config (now)\n" in out
    assert "-    max_local_cpu_size: 2.0\n+    max_local_cpu_size: 25\n" in out
    assert out.endswith("nothing was changed: --apply writes it\n")


def test_apply_is_server_side_with_a_field_manager(api, tune, capsys):
    assert tune("--apply") == 0
    sent = api.of("PATCH")
    assert [(each.path, each.query.get("dryRun")) for each in sent] == [
        (CONFIG_MAP, "All"),
        (f"{SERVICES}/qwen", "All"),
        (CONFIG_MAP, None),
        (f"{SERVICES}/qwen", None),
    ]
    assert {each.content_type for each in sent} == {APPLY}
    assert {each.query["fieldManager"] for each in sent} == {"lmcache-ext-tune"}
    assert {each.query["force"].lower() for each in sent} == {"false"}
    assert sent[2].body == {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "lmcache-config", "namespace": "models"},
        "data": {"lmcache_config.yaml": "# tuned in May\nchunk_size: 256  # tokens\nmax_local_cpu_size: 25\n"},
    }
    predictor = sent[3].body["spec"]["predictor"]
    assert predictor["model"]["resources"] == {"limits": {"memory": "47Gi"}, "requests": {"memory": "47Gi"}}
    assert predictor["volumes"][1] == {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "26Gi"}}
    assert set(predictor) == {"model", "volumes"}
    live = api.objects["inferenceservices", "qwen"]["spec"]["predictor"]
    assert live["model"]["args"][0] == "--model_name=qwen"  # what it does not own it leaves alone
    assert "ConfigMap lmcache-config: applied\nInferenceService qwen: applied\n" in capsys.readouterr().out


def test_what_was_applied_needs_no_second_time(api, tune, capsys):
    assert tune("--apply") == 0
    before = len(api.of("PATCH"))
    assert tune("--apply") == 0
    assert len(api.of("PATCH")) == before
    assert capsys.readouterr().out.endswith("nothing to change\n")


def test_a_field_of_somebody_else_is_left_to_them(api, tune, capsys):
    for resource, manifest in objects():
        api.add(resource, manifest, owner="kubectl-client-side-apply" if resource == "inferenceservices" else "")
    assert tune("--apply") == 2
    error = capsys.readouterr().err
    assert error.startswith("InferenceService models/qwen: 409: Apply failed with ")
    assert '.spec.predictor.volumes conflict with "kubectl-client-side-apply"' in error
    assert "--force-conflicts takes them over" in error
    assert error.count("\n") == 1
    assert {each.query.get("dryRun") for each in api.of("PATCH")} == {"All"}  # the ConfigMap was not changed either
    assert "2.0" in api.objects["configmaps", "lmcache-config"]["data"]["lmcache_config.yaml"]


def test_conflicts_are_taken_over_when_told_to(api, tune):
    for resource, manifest in objects():
        api.add(resource, manifest, owner="kubectl-client-side-apply")
    assert tune("--apply", "--force-conflicts", "--field-manager", "ops") == 0
    assert {each.query["force"].lower() for each in api.of("PATCH")} == {"true"}
    assert api.owners["configmaps", "lmcache-config"][("data", "lmcache_config.yaml")] == "ops"


@pytest.mark.parametrize("missing", range(len(granted())))
def test_the_role_grants_no_more_than_is_used(api, tune, missing):
    """Without any one of its rules something is refused, or a runtime is not seen."""
    api.rules = [rule for index, rule in enumerate(granted()) if index != missing]
    code = tune("--apply")
    denied = [each for each in granted() if each not in api.rules]
    if denied[0]["resources"] in (["servingruntimes"], ["clusterservingruntimes"]):
        assert code == 0  # without the runtime it still knows what the InferenceService says
        assert any("runtimes" in each.path for each in api.requests)
    else:
        assert code == 2


def test_a_runtime_of_the_namespace_comes_first(api, tune):
    api.add("servingruntimes", yaml.safe_load(RUNTIME))
    assert tune() == 0
    assert not [each for each in api.requests if "clusterservingruntimes" in each.path]


def test_metrics_can_come_from_a_url_or_another_service(api, tune, capsys, tmp_path):
    seen = tmp_path / "metrics.txt"
    seen.write_text(metrics(started_s=time.time() - 36000, prompts=200))
    assert tune("--metrics", str(seen)) == 0
    assert "prompts: 200\n" in capsys.readouterr().out
    assert not [each for each in api.requests if "proxy" in each.path]
    api.rules = None
    assert tune("--service", "router:8080") == 0
    assert api.requests[-1].path == "/api/v1/namespaces/models/services/router:8080/proxy/metrics"


def test_more_than_one_inferenceservice_must_be_named(api, tune, capsys):
    _, service = list(objects())[1]
    api.add("inferenceservices", {**service, "metadata": {"name": "other", "namespace": "models"}})
    assert tune() == 2
    assert "--inferenceservice" in capsys.readouterr().err
    assert tune("--inferenceservice", "qwen") == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("token", "ConfigMap models/lmcache-config: 401: Unauthorized\n"),
        ("gone", 'ConfigMap models/lmcache-config: 404: configmaps "lmcache-config" not found\n'),
        ("closed", "ConfigMap models/lmcache-config: the API server cannot be reached ("),
        ("kubeconfig", "no cluster: "),
    ],
)
def test_what_goes_wrong_is_one_line(api, tune, capsys, change, problem, monkeypatch, tmp_path):
    if change == "gone":
        del api.objects["configmaps", "lmcache-config"]
    if change == "closed":
        monkeypatch.setattr(KubeApi, "url", "http://127.0.0.1:9")
    if change == "kubeconfig":
        code = main(["tune", "--configmap", "a", "--kubeconfig", str(tmp_path / "none")])
    else:
        code = tune(token="wrong" if change == "token" else TOKEN)
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(problem)
    assert error.count("\n") == 1


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmcache_ext.manifests.tune.cluster", None)
    assert main(["tune", "--configmap", "a"]) == 2
    assert "pip install 'kserve-lmcache-runtime[kubernetes]'" in capsys.readouterr().err
