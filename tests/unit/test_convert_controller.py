"""The controller of a chart's router, as `convert` writes it: engines are told where it is, and it is there."""

from pathlib import Path

import pytest
import yaml

from lmcache_ext.config import load_config
from lmcache_ext.daemons import controller_args
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.caches import caches
from lmcache_ext.manifests.check import check, read_files
from lmcache_ext.manifests.convert.convert import as_text, convert
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.manifests.text import File
from tests.unit.test_convert import CACHE, MODEL, converted, engine, one_model, settings

CHART = Path(__file__).resolve().parents[1] / "data" / "charts" / "kv-aware.yaml"
SERVICE = "vllm-lmcache-controller-service"
CONTROLLER = ("Deployment", "vllm-deployment-lmcache-controller")
LMCACHE = "servingEngineSpec.modelSpec[0].lmcacheConfig"


def container(objects):
    (one,) = objects[CONTROLLER]["spec"]["template"]["spec"]["containers"]
    return one


def listening(objects):
    """Port of the Service -> port of the container, by name or number."""
    ports = {one["name"]: one["containerPort"] for one in container(objects)["ports"]}
    return {
        one["port"]: ports.get(one["targetPort"], one["targetPort"])
        for one in objects["Service", SERVICE]["spec"]["ports"]
    }


def telling(router=(), **keys):
    """Values of one model with `keys` in its lmcacheConfig."""
    values = one_model(lmcacheConfig={**CACHE, "enableController": True, **keys})
    return {**values, "routerSpec": dict(router)}


def test_every_key_of_the_charts_own_example_is_carried_over():
    ledger, _ = converted(CHART.read_text())
    unmapped = {entry.path for entry in ledger.unmapped}
    assert not any(path.startswith(LMCACHE) for path in unmapped)
    assert not any("lmcacheController" in path for path in unmapped)


def test_an_engine_takes_the_file_and_knows_its_controller_and_its_own_address(tmp_path):
    _, objects = converted(CHART.read_text())
    (variable,) = [one for one in engine(objects, "telling")["model"]["env"] if one["name"] == "LMCACHE_P2P_HOST"]
    assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    file = tmp_path / "lmcache_config.yaml"
    file.write_text(objects["ConfigMap", "lmcache-config"]["data"]["lmcache_config.yaml"])
    pods = ({"HOSTNAME": f"telling-{index}", "LMCACHE_P2P_HOST": f"10.1.0.{index}"} for index in (1, 2))
    first, second = (load_config(path=str(file), environ=one) for one in pods)
    assert (first.instance_id, second.instance_id) == ("telling-1", "telling-2")
    assert (first.peer.enabled, first.peer.host, first.peer.init_ports) == (True, "10.1.0.1", (30081,))
    assert first.controller.enabled
    assert first.controller.pull_url == f"{SERVICE}:9000"
    assert first.controller.reply_url == f"{SERVICE}:9001"
    assert first.controller.worker_ports == (8001,)
    assert first.controller.heartbeat_s == 10.0


def test_the_controller_listens_where_the_service_leads():
    _, objects = converted(CHART.read_text())
    arguments = controller_args.parse(container(objects)["args"], "lmcache_controller")
    assert arguments.host == "0.0.0.0"
    assert arguments.monitor_ports == {"pull": 9000, "reply": 9001, "heartbeat": 9002}
    assert listening(objects) == {arguments.port: arguments.port, 9000: 9000, 9001: 9001, 9002: 9002}
    labels = objects[CONTROLLER]["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= objects["Service", SERVICE]["spec"]["selector"].items()
    for probe in ("readinessProbe", "livenessProbe"):
        assert container(objects)[probe]["httpGet"] == {"path": "/health", "port": arguments.port}


def test_the_controller_runs_as_nobody_special():
    _, objects = converted(CHART.read_text())
    assert objects[CONTROLLER]["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container(objects)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container(objects)["securityContext"]["readOnlyRootFilesystem"] is True


def test_only_engines_tell_the_controller_and_only_peers_read_memory():
    _, objects = converted(CHART.read_text())
    told, asked = objects["NetworkPolicy", SERVICE]["spec"]["ingress"]
    assert {one["port"] for one in told["ports"]} == {9000, 9001, 9002}
    assert "from" in told
    assert "from" not in asked
    policy = objects["NetworkPolicy", "vllm-lmcache-peers"]["spec"]
    peers, everybody = policy["ingress"]
    assert peers == {"from": [{"podSelector": policy["podSelector"]}], "ports": [{"port": 30081}]}
    assert everybody == {"ports": [{"port": 8080}]}


@pytest.mark.parametrize("written", [30081, "30081,30082", ["30081", 30082]])
def test_ports_are_read_as_people_write_them(written):
    _, objects = converted(telling(workerPorts=written, p2pInitPorts=written))
    found = settings(objects)
    assert found["p2p_init_ports"] == found["lmcache_worker_ports"] == [30081, 30082][: len(found["p2p_init_ports"])]


def test_without_ports_of_peers_there_are_no_peers():
    ledger, objects = converted(telling(p2pHost="localhost"))
    assert "enable_p2p" not in settings(objects)
    assert "p2pInitPorts" in ledger.entries[f"{LMCACHE}.p2pHost"].target
    assert ("NetworkPolicy", "vllm-lmcache-peers") not in objects


@pytest.mark.parametrize("off", [{"enableController": False}, {}])
def test_without_enable_controller_there_is_none_and_its_keys_are_named(off):
    keys = {"controllerPort": 9000, "p2pInitPorts": "30081", "workerPorts": "8001"}
    values = one_model(lmcacheConfig={**CACHE, **keys, **off})
    ledger, objects = converted({**values, "routerSpec": {"lmcacheControllerPort": 9000}})
    assert CONTROLLER not in objects
    assert all("enableController" in ledger.entries[f"{LMCACHE}.{key}"].target for key in keys)
    assert "enableController" in ledger.entries["routerSpec.lmcacheControllerPort"].target
    assert not settings(objects).keys() & {"enable_controller", "controller_pull_url", "p2p_init_ports"}


def test_one_engine_has_its_name_and_several_have_those_of_their_pods():
    ledger, objects = converted(telling(instanceId="first"))
    assert settings(objects)["lmcache_instance_id"] == "first"
    values = telling(instanceId="first")
    values["servingEngineSpec"]["modelSpec"][0]["replicaCount"] = 2
    ledger, objects = converted(values)
    assert "lmcache_instance_id" not in settings(objects)
    assert "its pod's" in ledger.entries[f"{LMCACHE}.instanceId"].target


def test_models_reach_one_controller_at_the_ports_they_name():
    models = [
        {**MODEL, "name": name, "lmcacheConfig": {**CACHE, "enableController": True, "controllerPort": port}}
        for name, port in (("a", 9000), ("b", 9100))
    ]
    _, objects = converted({"servingEngineSpec": {"modelSpec": models}, "routerSpec": {"lmcacheControllerPort": 9000}})
    assert settings(objects, "lmcache-config-b")["controller_pull_url"] == f"{SERVICE}:9100"
    assert listening(objects).items() >= {9000: 9000, 9100: 9000, 9001: 9001}.items()


@pytest.mark.parametrize("port", [9090, "9090"])
def test_a_port_that_engines_use_is_not_that_of_http(port):
    _, objects = converted(telling(controllerPort=port, controllerReplyPort=port))
    arguments = controller_args.parse(container(objects)["args"], "lmcache_controller")
    assert arguments.monitor_ports == {"pull": 9090}
    assert arguments.port == 9091


@pytest.mark.parametrize("key", ["controllerPort", "controllerReplyPort", "workerPorts", "p2pInitPorts"])
@pytest.mark.parametrize("value", ["70000", "x"])
def test_what_is_no_port_is_refused_by_name(key, value):
    with pytest.raises(ManifestError, match=key):
        converted(telling(**{key: value}))


def test_variables_that_name_the_router_find_the_controller():
    env = {
        "LMCACHE_ENABLE_CONTROLLER": "True",
        "LMCACHE_CONTROLLER_PULL_URL": "vllm-router-service:9000",
        "LMCACHE_CONTROLLER_REPLY_URL": "vllm-router-service.default.svc:9001",
        "LMCACHE_ENABLE_P2P": "True",
        "LMCACHE_P2P_INIT_PORTS": "8200,8201",
    }
    values = one_model(lmcacheConfig=CACHE, env=[{"name": name, "value": value} for name, value in env.items()])
    _, objects = converted(values)
    assert settings(objects)["controller_pull_url"] == f"{SERVICE}:9000"
    assert settings(objects)["controller_reply_url"] == f"{SERVICE}:9001"
    assert listening(objects).items() >= {9000: 9000, 9001: 9001}.items()
    peers, _ = objects["NetworkPolicy", "vllm-lmcache-peers"]["spec"]["ingress"]
    assert peers["ports"] == [{"port": 8200}, {"port": 8201}]


def test_one_address_is_enough():
    env = [
        {"name": "LMCACHE_ENABLE_CONTROLLER", "value": "True"},
        {"name": "LMCACHE_CONTROLLER_PULL_URL", "value": "vllm-router-service:9000"},
    ]
    _, objects = converted(one_model(lmcacheConfig=CACHE, env=env))
    arguments = controller_args.parse(container(objects)["args"], "lmcache_controller")
    assert arguments.monitor_ports == {"pull": 9000}


def test_a_controller_elsewhere_is_left_there():
    env = [{"name": "LMCACHE_CONTROLLER_PULL_URL", "value": "elsewhere:9000"}]
    values = one_model(lmcacheConfig={**CACHE, "enableController": True, "p2pInitPorts": 8200}, env=env)
    _, objects = converted(values)
    assert settings(objects)["controller_pull_url"] == "elsewhere:9000"
    assert "controller_reply_url" not in settings(objects)
    assert ("NetworkPolicy", "vllm-lmcache-peers") in objects
    assert CONTROLLER not in objects


def test_what_the_router_says_of_its_controller_is_carried_over():
    extra = [{"name": "lmcache-9001", "port": 9001, "targetPort": 9001, "protocol": "TCP"}]
    router = {"lmcacheConfig": {"logLevel": "WARNING"}, "extraPorts": extra, "lmcacheControllerPort": ""}
    router["lmcacheConfig"]["else"] = 1
    ledger, objects = converted(telling(router))
    assert ledger.entries["routerSpec.extraPorts"].mapped
    assert not ledger.entries["routerSpec.lmcacheConfig.else"].mapped
    arguments = controller_args.parse(container(objects)["args"], "lmcache_controller")
    assert arguments.log_level == "warning"
    assert arguments.monitor_ports["pull"] == 9000


def test_check_sees_how_much_a_peer_keeps():
    """The rules of memory need all settings, and a peer's address is known to its pod alone."""
    (file,), _ = read_files([str(CHART)])
    checked = check([File("out.yaml", as_text(convert(file, Options()), file.name))])
    (cache,) = caches(checked.bundle)
    assert cache.is_known
    assert cache.host_bytes == 30 * 2**30


def test_check_knows_that_a_pod_tells_its_own_address():
    text = (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n  lmcache_config.yaml: |\n    enable_p2p: true\n"
        "    enable_controller: true\n    controller_pull_url: a:1\n    p2p_init_ports: 8200\n"
    )
    (finding,) = check([File("m.yaml", text)]).findings
    assert finding.severity == "note"
    assert "LMCACHE_P2P_HOST, on Kubernetes from status.podIP" in finding.fix
    env = [{"name": "LMCACHE_P2P_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}
    pod["spec"] = {"containers": [{"name": "e", "image": "i:1", "command": ["vllm"], "env": env}]}
    both = File("m.yaml", f"{text}---\n{yaml.safe_dump(pod)}")
    assert [one for one in check([both]).findings if "p2p_host" in one.message + one.fix] == []
