"""`lmcache-ext tune` from files: what it concludes from a server's metrics, and what it would write."""

import json
import math
import time

import pytest
import yaml

from lmcache_ext.cli import main
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.check import check
from lmcache_ext.manifests.text import File
from lmcache_ext.manifests.tune.facts import model_bytes_per_token, read_facts
from lmcache_ext.manifests.tune.metrics import Metrics
from lmcache_ext.manifests.tune.plan import Wishes
from lmcache_ext.manifests.tune.run import patches, tune
from tests.answering import saying
from tests.traps import EMPTY_DIR, ENGINE, RUNTIME
from tests.tuning import RECORDED, metrics

GIB = 2**30
NOW_S = 2e9
HOUR_S = 3600.0
# 2,000,000 new tokens of 128 KiB in 10 hours: 24.4 GiB an hour
BUSY = read_facts(metrics(started_s=NOW_S - 10 * HOUR_S), now_s=NOW_S)
IDLE = read_facts(metrics(started_s=NOW_S - 60, prompts=3), now_s=NOW_S)
KEPT = Wishes()


def proposed(facts, text=ENGINE, wishes=KEPT, config_map="lmcache-config"):
    return tune([File("x.yaml", text)], config_map, "", facts, wishes)


def changes(tuned):
    return {change.what: change.new for change in tuned.plan.changes}


def test_facts_of_a_real_server():
    facts = read_facts(RECORDED.read_text(), now_s=1795571642.67 + 60)
    assert facts.prompts == 14
    assert facts.kv_bytes_per_token == 8192  # the tiny model: 4 layers, 2 heads of 64, float32, K and V
    assert facts.block_tokens == 128
    assert (facts.requested_tokens, facts.hit_tokens) == (25080, 8192)
    assert facts.capacity_bytes == {"disk": 2**31}
    assert facts.uptime_s == pytest.approx(60, abs=1)


def test_counters_of_several_engines_are_added_and_their_histograms_merged():
    text = (
        'a_total{engine="0"} 1\na_total{engine="1"} 2\nb_bucket{engine="0",le="10"} 1\n'
        'b_bucket{engine="0",le="+Inf"} 1\n'
        'b_bucket{engine="1",le="10"} 0\nb_bucket{engine="1",le="+Inf"} 9\n# c 5\nnonsense\nd NaN\n'
    )
    found = Metrics(text)
    assert found.total("a") == 3
    assert found.total("a", engine="1") == 2
    assert found.total("c") is None
    assert math.isnan(found.total("d"))
    assert found.quantile("b", 0.1) == 10
    assert found.quantile("b", 0.5) == 10  # above the last bound: at least that
    assert found.quantile("c", 0.5) is None


def test_host_memory_keeps_what_was_computed_within_the_retention():
    tuned = proposed(BUSY)
    assert changes(tuned)["max_local_cpu_size"] == "25 GiB"
    assert "55.56 new tokens/s are 6.944 MiB/s" in tuned.plan.changes[0].why
    assert changes(proposed(BUSY, wishes=Wishes(retention_s=600)))["max_local_cpu_size"] == "5 GiB"
    capped = proposed(BUSY, wishes=Wishes(max_host_bytes=16 * GIB))
    assert changes(capped)["max_local_cpu_size"] == "16 GiB"
    assert any("more than --max-host" in remark for remark in capped.plan.remarks)


def test_memory_and_shm_follow():
    tuned = proposed(BUSY)
    # 24Gi held 2 GiB of cache and 22 of all else
    assert changes(tuned)["memory"] == "47Gi"
    assert changes(tuned)["/dev/shm"] == "26Gi"
    after = tuned.after["x.yaml"]
    assert "    max_local_cpu_size: 25\n" in after
    assert "    # tuned in May\n    chunk_size: 256  # tokens\n" in after
    service = list(yaml.safe_load_all(after))[1]["spec"]["predictor"]
    assert service["model"]["resources"]["requests"]["memory"] == "47Gi"
    assert service["model"]["resources"]["limits"] == {"memory": "47Gi", "nvidia.com/gpu": "1"}
    assert service["volumes"][1]["emptyDir"]["sizeLimit"] == "26Gi"
    assert [one for one in check([File("x.yaml", after)]).findings if one.severity != "note"] == []


def test_a_second_look_finds_nothing_to_change():
    first = proposed(BUSY)
    second = proposed(BUSY, first.after["x.yaml"])
    assert second.plan.changes == []
    assert list(second.diff()) == []


def test_a_small_difference_is_left_alone():
    text = (
        ENGINE.replace("max_local_cpu_size: 2.0", "max_local_cpu_size: 22")
        .replace("3Gi", "23Gi")
        .replace("24Gi", "40Gi")
    )
    assert changes(proposed(BUSY, text)) == {}


def traffic(**kind):
    return read_facts(metrics(started_s=NOW_S - 10 * HOUR_S, **kind), now_s=NOW_S)


@pytest.mark.parametrize(
    ("now", "kind", "better"),
    [
        (256, {"bytes_per_token": 8192}, None),  # 2 MiB
        (256, {"bytes_per_token": 1024, "lengths": (8000, 9000, 10000)}, "1024"),  # 1 MiB
        (256, {"bytes_per_token": 1024}, "496"),  # not more than half of the short prompts
        (1024, {}, "240"),  # a quarter of the prompts filled none: they have 1000 tokens
        (2048, {"lengths": (8000, 9000, 10000)}, None),  # large, and the prompts are too
        (512, {"bytes_per_token": 8192, "lengths": (300, 400, 500), "block": 128}, "128"),
    ],
)
def test_chunks_of_a_size_that_prompts_fill_and_stores_like(now, kind, better):
    tuned = proposed(traffic(**kind), ENGINE.replace("chunk_size: 256 ", f"chunk_size: {now} "))
    assert changes(tuned).get("chunk_size") == better
    assert any("restart" in remark for remark in tuned.plan.remarks) == (better is not None)
    assert f"    chunk_size: {better or now}  # tokens\n" in tuned.after["x.yaml"]


def test_the_disk_keeps_a_day():
    tuned = proposed(BUSY, EMPTY_DIR)
    assert changes(tuned)["max_local_disk_size"] == "586 GiB"
    assert any("volume of local_disk" in remark for remark in tuned.plan.remarks)


def test_without_traffic_only_what_cannot_work_is_changed():
    tuned = proposed(IDLE)
    assert changes(tuned) == {}
    assert any("too few to size a cache by" in remark for remark in tuned.plan.remarks)
    broken = ENGINE.replace("sizeLimit: 3Gi", "sizeLimit: 1Gi")
    assert changes(proposed(IDLE, broken)) == {"/dev/shm": "3Gi"}


def test_a_runtime_s_volume_is_replaced_by_its_name():
    runtime = RUNTIME.replace(
        "      resources:\n",
        "      volumeMounts:\n        - {name: mem, mountPath: /dev/shm}\n      resources:\n",
    )
    runtime += "  volumes:\n    - name: mem\n      emptyDir: {medium: Memory, sizeLimit: 8Gi}\n"
    service = ENGINE.replace("        - name: dshm\n          mountPath: /dev/shm\n", "")
    service = service[: service.index("      - name: dshm")].replace(
        "    model:\n", "    model:\n      runtime: lmcache-vllm\n"
    )
    tuned = proposed(BUSY, f"{service}---\n{runtime}")
    predictor = list(yaml.safe_load_all(tuned.after["x.yaml"]))[1]["spec"]["predictor"]
    assert predictor["volumes"][1] == {"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "26Gi"}}


def test_a_config_map_alone_is_tuned_alone():
    tuned = proposed(BUSY, ENGINE[: ENGINE.index("---")])
    assert set(changes(tuned)) == {"max_local_cpu_size"}
    assert any("no InferenceService reads" in remark for remark in tuned.plan.remarks)


def test_a_cache_without_host_memory_stays_without():
    tuned = proposed(BUSY, ENGINE.replace("max_local_cpu_size: 2.0", "local_cpu: false"))
    assert changes(tuned) == {}


@pytest.mark.parametrize(
    ("text", "name", "problem"),
    [
        (ENGINE, "other", "no ConfigMap other"),
        (ENGINE, "a/b/c", "write namespace/name"),
        (
            ENGINE.replace("    chunk_size: 256  # tokens\n    max_local_cpu_size: 2.0\n", "    - 1\n"),
            "lmcache-config",
            "one LMCache file",
        ),
        (
            f"{ENGINE}---\n{ENGINE[ENGINE.index('---') + 4 :].replace('llama3', 'other')}",
            "lmcache-config",
            "llama3, other mount",
        ),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_line(text, name, problem):
    with pytest.raises(ManifestError, match=problem):
        proposed(BUSY, text, config_map=name)


def test_bytes_per_token_of_a_model(tmp_path):
    config = tmp_path / "config.json"
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    config.write_text(json.dumps({**llama, "torch_dtype": "bfloat16"}))
    assert model_bytes_per_token(config) == 131072  # Llama 3.1 8B
    assert model_bytes_per_token(config, "fp8") == 65536
    deepseek = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config.write_text(json.dumps({**deepseek, "hidden_size": 7168}))
    assert model_bytes_per_token(config) == 61 * 576 * 2
    config.write_text("{}")
    with pytest.raises(ManifestError, match="num_hidden_layers"):
        model_bytes_per_token(config)


def test_patches_hold_what_was_changed_and_nothing_else():
    """An object in each file, as the cluster's are."""
    config_map, service = ENGINE.split("---\n")
    tuned = tune([File("c", config_map), File("s", service)], "lmcache-config", "", BUSY, Wishes())
    first, second = patches(tuned)
    assert first["kind"] == "ConfigMap"
    assert first["data"]["lmcache_config.yaml"].endswith("max_local_cpu_size: 25\n")
    predictor = second["spec"]["predictor"]
    assert predictor["model"] == {
        "resources": {"limits": {"memory": "47Gi"}, "requests": {"memory": "47Gi"}},
        "volumeMounts": [{"name": "dshm", "mountPath": "/dev/shm"}],
    }
    assert [volume["name"] for volume in predictor["volumes"]] == ["lmcache-config", "dshm"]
    assert set(second) == {"apiVersion", "kind", "metadata", "spec"}


def test_dry_run_shows_facts_reasons_and_a_diff(tmp_path, capsys):
    manifest, seen = tmp_path / "x.yaml", tmp_path / "metrics.txt"
    manifest.write_text(ENGINE)
    seen.write_text(metrics(started_s=time.time() - 10 * HOUR_S))
    assert main(["tune", "--dry-run", "--configmap", "lmcache-config", "--metrics", str(seen), str(manifest)]) == 0
    out = capsys.readouterr().out
    assert "prompt tokens: 25% up to 1000, 50% up to 4000, 90% up to 10000\n" in out
    assert "KV: 128 KiB per token\n" in out
    assert "max_local_cpu_size: 2 GiB -> 25 GiB: " in out
    assert "-    max_local_cpu_size: 2.0\n+    max_local_cpu_size: 25\n" in out
    assert manifest.read_text() == ENGINE


def test_passwords_near_a_change_are_not_shown(tmp_path, capsys):
    manifest = tmp_path / "x.yaml"
    secrets = '    remote_url: "redis://me:hunter2@redis:6379"\n    extra_config: {}\n'
    text = ENGINE.replace("sizeLimit: 3Gi", "sizeLimit: 1Gi").replace("    max_local_cpu_size: 2.0\n", secrets)
    manifest.write_text(text.replace("    # tuned in May\n", "    max_local_cpu_size: 2  # by me@home\n"))
    seen = tmp_path / "metrics.txt"
    seen.write_text(metrics(started_s=time.time() - 10 * HOUR_S))
    assert main(["tune", "--dry-run", "--configmap", "lmcache-config", "--metrics", str(seen), str(manifest)]) == 0
    out = capsys.readouterr().out
    assert "hunter2" not in out
    assert '     remote_url: "redis://me:***@redis:6379"\n' in out
    assert "+    max_local_cpu_size: 25  # by me@home\n" in out


def test_dry_run_without_metrics_looks_at_what_cannot_work(tmp_path, capsys):
    manifest = tmp_path / "x.yaml"
    manifest.write_text(ENGINE.replace("sizeLimit: 3Gi", "sizeLimit: 1Gi"))
    assert main(["tune", "--dry-run", "--configmap", "lmcache-config", str(manifest)]) == 0
    assert "/dev/shm: 1Gi -> 3Gi" in capsys.readouterr().out


def test_metrics_of_a_server_that_speaks_something_else_are_one_line(tmp_path, capsys):
    manifest = tmp_path / "x.yaml"
    manifest.write_text(ENGINE)
    with saying(b"220 mail.example.com ESMTP\r\n") as url:
        assert main(["tune", "--dry-run", "--configmap", "lmcache-config", "--metrics", url, str(manifest)]) == 2
    assert capsys.readouterr().err.startswith(f"{url}: cannot be read (")


@pytest.mark.parametrize(
    "argv",
    [
        ["--dry-run", "--configmap", "a"],
        ["--dry-run", "--apply", "--configmap", "a", "x.yaml"],
        ["--configmap", "a", "x.yaml"],
        ["--dry-run", "--configmap", "a", "none.yaml"],
        ["--dry-run", "--configmap", "a", "--metrics", "none.txt", "x.yaml"],
        ["--dry-run", "--configmap", "a", "--metrics", "ftp://h/metrics", "x.yaml"],
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(ENGINE)
    assert main(["tune", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1
