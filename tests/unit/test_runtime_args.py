"""The whole command line, through kserve's and vLLM's own parsers. No engine is started."""

from __future__ import annotations

import json
import os

import pytest

from runtime import args as runtime_args
from runtime.args import UsageError, parse, set_engine_environment
from tests.certificates import Authority

JSON_CONFIG = '{"kv_connector":"LMCacheConnectorV1", "kv_role":"kv_both"}'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text("{}")
    return str(path)


@pytest.fixture(autouse=True)
def _no_cache_settings(monkeypatch):
    for name in ("LMCACHE_CONFIG_FILE", "LMCACHE_EXT_ENABLE", "KSERVE_OPENAI_ROUTE_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime_args, "takes_over", lambda: True)


def test_the_kserve_guides_arguments():
    settings = parse(
        [
            "--model_name=llama3",
            "--model_id=meta-llama/Llama-3.2-1B-Instruct",
            "--max-model-len=10000",
            f"--kv-transfer-config='{JSON_CONFIG}'",
            "--enable-chunked-prefill",
        ]
    )
    assert settings.model_names == ("llama3",)
    assert settings.engine.model == settings.model == "meta-llama/Llama-3.2-1B-Instruct"
    assert settings.engine.served_model_name == ["llama3"]
    assert settings.engine.max_model_len == 10000
    assert settings.engine.enable_chunked_prefill is True
    assert settings.our_cache
    config = settings.engine.kv_transfer_config
    assert (config.kv_connector, config.kv_connector_module_path) == ("LMCacheConnectorV1", "lmcache_ext.connector")
    assert config.kv_load_failure_policy == "recompute"


def test_host_memory_that_is_not_there_ends_the_start(monkeypatch):
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "900000")
    with pytest.raises(UsageError, match=r"max_local_cpu_size of .* exceeds .* LMCACHE|LMCACHE_MAX_LOCAL_CPU_SIZE"):
        parse(["--model_id=org/model", "--kv-transfer-config", JSON_CONFIG])


def test_the_defaults(model):
    settings = parse([f"--model_dir={model}"])
    assert settings.http_port == 8080
    assert settings.model_name == "model"
    assert settings.openai_prefix == "/openai"
    assert not settings.our_cache
    assert not settings.tokenize_endpoint
    assert settings.engine.prefix_caching_hash_algo == "sha256_cbor"
    assert settings.engine.enable_prompt_tokens_details is True
    assert settings.shutdown_timeout_s == 30
    assert settings.notes == ()


def test_the_user_overrides_our_defaults(model, monkeypatch):
    monkeypatch.delenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", raising=False)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    words = ["--shutdown_timeout", "7", "--no-enable-prompt-tokens-details", "--prefix-caching-hash-algo=sha256"]
    settings = parse(["--model_dir", model, *words])
    assert settings.shutdown_timeout_s == 7
    assert settings.engine.enable_prompt_tokens_details is False
    assert settings.engine.prefix_caching_hash_algo == "sha256"
    set_engine_environment(settings)
    assert os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] == "7"
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"


@pytest.mark.parametrize(
    "words",
    [
        ["--max-model-len", "4096"],
        ["--max_model_len", "4096"],
        ["--max_model_len=4096"],
        ["--max_length=4096"],
        ["--max-model-len=1", "--max_model_len=4096"],  # the runtime's, then the InferenceService's
        ["--max-model-len 4096"],
    ],
)
def test_spellings_of_a_vllm_flag(model, words):
    assert parse(["--model_dir", model, *words]).engine.max_model_len == 4096


@pytest.mark.parametrize("words", [["--http_port", "9000"], ["--http-port=9000"], ["--port", "9000"]])
def test_spellings_of_the_port(model, words):
    assert parse(["--model_dir", model, *words]).http_port == 9000


def test_flags_both_sides_have_go_to_kserve(model, tmp_path):
    certificate, key = Authority(tmp_path, "ca").issue("server")
    words = ["--grpc_port=8081", f"--ssl_certfile={certificate}", f"--ssl_keyfile={key}"]
    settings = parse(["--model_dir", model, *words])
    assert (settings.kserve.ssl_certfile, settings.kserve.ssl_keyfile) == (certificate, key)
    assert settings.engine.ssl_certfile is None


def test_a_certificate_that_cannot_be_used_ends_the_start(model, tmp_path):
    certificate, key = Authority(tmp_path, "ca").issue("server")
    _, other_key = Authority(tmp_path, "another").issue("another-server")
    for words, said in (
        ([f"--ssl_certfile={tmp_path}/none.pem", f"--ssl_keyfile={key}"], "none.pem .*: No such file"),
        ([f"--ssl_certfile={certificate}", f"--ssl_keyfile={other_key}"], "(?i)mismatch"),
        ([f"--ssl_certfile={model}/config.json"], "certificate and its key in PEM"),
        ([f"--ssl-keyfile={key}"], "needs --ssl_certfile"),
    ):
        with pytest.raises(UsageError, match=said):
            parse(["--model_dir", model, *words])


@pytest.mark.parametrize(
    ("word", "eager"), [("--enforce-eager", True), ("--enforce_eager=true", True), ("--enforce-eager=False", False)]
)
def test_switches_take_true_and_false(model, word, eager):
    assert parse(["--model_dir", model, word]).engine.enforce_eager is eager


def test_dotted_json_of_vllm(model):
    settings = parse(["--model_dir", model, "--hf-overrides.rope_theta", "500000.0"])
    assert settings.engine.hf_overrides == {"rope_theta": 500000.0}


def test_vllm_serve_style():
    settings = parse(["serve", "org/model", "--port", "8000", "-tp", "2"])
    assert (settings.model, settings.http_port, settings.engine.tensor_parallel_size) == ("org/model", 8000, 2)
    assert settings.model_names == ("model", "org/model")


def test_vllms_config_file_loses_to_the_command_line(model, tmp_path):
    path = tmp_path / "vllm.yaml"
    content = {"max-model-len": 10, "dtype": "float16", "enforce-eager": True, "served-model-name": ["a", "b"]}
    path.write_text(json.dumps({**content, "kv-transfer-config": json.loads(JSON_CONFIG)}))
    settings = parse(["--model_dir", model, "--config", str(path), "--max_model_len", "20"])
    assert (settings.engine.max_model_len, settings.engine.dtype) == (20, "float16")
    assert settings.engine.enforce_eager is True
    assert settings.model_names == ("a", "b", "model")
    assert settings.our_cache


def test_names_and_aliases(model):
    settings = parse(["--model_dir", model, "--model_name=m", "--served-model-name", "x", "m", "y"])
    assert settings.model_names == ("m", "x", "y")


def test_model_id_wins_over_the_mount_and_takes_a_revision(model):
    settings = parse(["--model_dir", model, "--model_id=org/name", "--model_revision=abc"])
    assert (settings.engine.model, settings.engine.revision) == ("org/name", "abc")


def test_huggingfaceservers_own_flags_are_noted(model):
    settings = parse(["--model_dir", model, "--backend=vllm", "--disable_lower_case", "--task=text_generation"])
    assert settings.notes == ("--disable_lower_case: ignored, it has no effect with vLLM",)


def test_flags_of_vllms_own_server_are_noted(model):
    settings = parse(["--model_dir", model, "--root_path=/x", "--api-server-count", "1"])
    assert settings.notes == (
        "--api-server-count: ignored, it has no effect in this server",
        "--root-path: ignored, it has no effect in this server",
    )


def test_every_gpu_of_the_pod_is_used_unless_told_otherwise(model, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    monkeypatch.setattr(type(current_platform), "device_count", lambda *_: 4, raising=False)
    assert parse(["--model_dir", model]).engine.tensor_parallel_size == 4
    assert parse(["--model_dir", model, "-tp", "2"]).engine.tensor_parallel_size == 2
    assert parse(["--model_dir", model, "--pipeline_parallel_size=4"]).engine.tensor_parallel_size == 1


def test_an_embedding_task_is_vllms_pooling(model):
    settings = parse(["--model_dir", model, "--task=text_embedding"])
    assert (settings.engine.runner, settings.engine.convert) == ("pooling", "embed")


def test_an_installed_lmcache_keeps_its_name(model, monkeypatch):
    monkeypatch.setattr(runtime_args, "takes_over", lambda: False)
    settings = parse(["--model_dir", model, "--kv-transfer-config", JSON_CONFIG])
    assert not settings.our_cache
    assert settings.engine.kv_transfer_config.kv_connector_module_path is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_modl_len=1"], "unknown flag --max-modl-len; did you mean --max-model-len?"),
        (["--model_nam=x"], "did you mean --model-name?"),
        (["--workers=2"], "--workers=2"),
        (["--enable_grpc=true"], "--enable_grpc=true"),
        (["--enable_grpc=perhaps"], "not a boolean"),
        (["--backend=huggingface"], "--backend=huggingface"),
        (["--task=fill_mask"], "--task=fill_mask"),
        (["--http_port=eighty"], "--http_port"),
        (["--uds=/tmp/x"], "--uds"),
        (["--max_model_len=long"], "--max-model-len"),
        (["--kv-transfer-config", "{"], "not JSON"),
        (["--kv-transfer-config", '{"kv_connector":"NixlConnector"}'], "kv_role"),
        (["--kv-transfer-config", '{"kv_conector":"X","kv_role":"kv_both"}'], "kv_conector"),
        (["--enforce-eager=perhaps"], "--enforce-eager takes no value"),
        (["--config"], "--config needs a file"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
        (["--enforce-eager", "word"], "'word'"),
    ],
)
def test_refused(model, words, message):
    with pytest.raises(UsageError) as caught:
        parse(["--model_dir", model, *words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_model_directory():
    with pytest.raises(UsageError, match="/nowhere does not exist; set storageUri"):
        parse(["--model_dir=/nowhere"])


def test_a_directory_without_a_model_points_below(tmp_path):
    (tmp_path / "inner").mkdir()
    with pytest.raises(UsageError, match="no config"):
        parse([f"--model_dir={tmp_path}"])
    (tmp_path / "inner" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"did you mean --model_dir=.*inner"):
        parse([f"--model_dir={tmp_path}"])


def test_a_storage_url_is_not_a_directory():
    with pytest.raises(UsageError, match="storageUri"):
        parse(["--model_dir=s3://bucket/model"])


def test_a_bad_cache_file_stops_before_anything_heavy(model, tmp_path, monkeypatch):
    path = tmp_path / "lmcache.yaml"
    path.write_text("chunk_sise: 256\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(path))
    with pytest.raises(UsageError, match="chunk_size"):
        parse(["--model_dir", model, "--kv-transfer-config", JSON_CONFIG])
    assert parse(["--model_dir", model]).cache_source is None


def test_cache_settings_on_the_command_line_are_checked_too(model):
    config = {**json.loads(JSON_CONFIG), "kv_connector_extra_config": {"lmcache.chunk_sise": 256}}
    with pytest.raises(UsageError, match="chunk_size"):
        parse(["--model_dir", model, "--kv-transfer-config", json.dumps(config)])


def test_the_caches_endpoints_are_open_to_all_on_request_only(model):
    assert not parse([f"--model_dir={model}"]).lmcache_endpoints
    assert parse([f"--model_dir={model}", "--enable-lmcache-endpoints"]).lmcache_endpoints


@pytest.mark.parametrize("flags", [[], ["--enable_lmcache_endpoints"]])
def test_requests_may_ask_the_cache_for_an_explanation_on_request_only(model, flags):
    settings = parse([f"--model_dir={model}", "--kv-transfer-config", JSON_CONFIG, *flags])
    extra = settings.engine.kv_transfer_config.kv_connector_extra_config
    assert extra.get("lmcache_ext.explain_enabled", False) is bool(flags)


def test_help_needs_no_model(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    assert "--model_id" in capsys.readouterr().out
