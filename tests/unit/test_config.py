"""What the sources amount to: which wins, what old files mean, what is kept secret, what never changes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmcache_ext.config import Config, Live, load_config, resolve_chunk_tokens
from lmcache_ext.config_urls import mask_url, masked
from lmcache_ext.config_values import GIB
from lmcache_ext.errors import ConfigError

SEEDS = Path(__file__).parent.parent / "data" / "seeds"


@pytest.fixture
def load(tmp_path):
    """Load ``text`` as the file; ``load.path`` is what messages call it."""

    def load_text(text, environ=None, connector=None):
        Path(load_text.path).write_text(text)
        return load_config(path=load_text.path, environ=environ or {}, connector_extra=connector)

    load_text.path = str(tmp_path / "lmcache_config.yaml")
    return load_text


# --- seeds -----------------------------------------------------------------------------------


def test_seed_001_shared_disk():
    path = str(SEEDS / "001_lmcache_config.yaml")
    config = load_config(path=path, environ={})
    assert (config.chunk_size, config.disk_paths, config.local_cpu) == (256, ("/mnt/data",), True)
    assert config.live.disk_capacity_bytes == 10 * GIB
    assert config.notes == (
        f"{path}:2: local_device: is an old key, read as local_disk: /mnt/data",
        f"{path}:3: pipelined_backend: not needed: storing and loading always run in the background",
        f"{path}:2: local_device: no max_local_disk_size is given: limited to 10 GiB (LMCache would store nothing)",
    )


def test_seed_002_offload_to_host_memory_by_environment():
    config = load_config(
        environ={
            "LMCACHE_USE_EXPERIMENTAL": "True",
            "LMCACHE_LOCAL_CPU": "True",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "20",
            "LMCACHE_LOG_LEVEL": "DEBUG",
            "VLLM_RPC_TIMEOUT": "1000000",
        }
    )
    assert (config.local_cpu, config.live.host_capacity_bytes, config.live.log_level) == (True, 20 * GIB, "DEBUG")
    assert config.notes == (
        "LMCACHE_USE_EXPERIMENTAL: use_experimental: not needed: there is only one engine",
        "LMCACHE_MAX_LOCAL_CPU_SIZE: max_local_cpu_size: 20 GiB for the whole engine (LMCache: for each rank)",
    )


def test_seed_000_cache_server_by_environment():
    config = load_config(
        environ={
            "LMCACHE_REMOTE_URL": "lm://vllm-cache-server-service:80",
            "LMCACHE_REMOTE_SERDE": "naive",
            "LMCACHE_SERVER_SERVICE_PORT": "80",
        }
    )
    assert (config.live.remote_url, config.live.remote_serde) == ("lm://vllm-cache-server-service:80", "naive")
    assert config.notes == ()


def test_seed_003_centralized():
    config = load_config(path=str(SEEDS / "003_lmcache_config.yaml"), environ={})
    assert (config.live.remote_url, config.live.remote_serde) == ("lm://localhost:65432", "cachegen")
    assert config.notes == ()


@pytest.mark.parametrize("number", [1, 2])
def test_seed_003_peer_to_peer(number):
    config = load_config(path=str(SEEDS / f"003_p2p_example{number}.yaml"), environ={"PYTHONHASHSEED": "123"})
    second = 2 * (number - 1)
    assert config.live.host_capacity_bytes == 5 * GIB
    assert config.peer.model_dump() == {
        "enabled": True,
        "host": "localhost",
        "init_ports": (8200 + second,),
        "lookup_ports": (8201 + second,),
        "transfer_channel": "nixl",
    }
    assert config.controller.enabled
    assert (config.controller.pull_url, config.controller.reply_url) == ("localhost:8300", "localhost:8400")
    assert config.controller.worker_ports == (8499 + number,)
    assert config.instance_id == f"lmcache_instance_{number}"
    assert config.live.extra_config == {"lookup_backoff_time": 0.001}
    notes = [note.partition("p2p_example")[2] for note in config.notes]
    assert f"{number}.yaml:11: transfer_channel: nixl: TCP stands in, from host memory to host memory" in notes


def test_seed_004_document_within_the_configmap(load):
    manifest = yaml.safe_load((SEEDS / "004_configmap.yaml").read_text())
    config = load(manifest["data"]["lmcache_config.yaml"], {"LMCACHE_USE_EXPERIMENTAL": "True"})
    assert (config.local_cpu, config.chunk_size, config.live.host_capacity_bytes) == (True, 256, 2 * GIB)
    assert config.live.remote_url == "redis://redis.default.svc.cluster.local:6379"
    assert config.live.remote_serde == "naive"


def test_seed_004_the_configmap_itself_is_refused():
    path = str(SEEDS / "004_configmap.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config(path=path, environ={})
    assert str(caught.value) == (
        f"{path}:2: kind: 'ConfigMap' is a Kubernetes manifest, not the LMCache file in it: save what stands under "
        "data.lmcache_config.yaml (line 6) as the file, or kubectl apply the manifest and mount it"
    )


def test_seed_004_lm_server():
    config = load_config(path=str(SEEDS / "004_lm_server.yaml"), environ={})
    assert config.live.remote_url == "lm://lmcache-server.default.svc.cluster.local:8080"


# --- precedence --------------------------------------------------------------------------------


def test_without_any_source_the_defaults_of_lmcache():
    config = load_config(environ={})
    assert config == Config(origins=config.origins)
    assert (config.chunk_size, config.live) == (256, Live(host_capacity_bytes=5 * GIB))
    assert config.origin("chunk_size") == ("default", "default")


def test_connector_beats_file_beats_environment(load):
    environ = {"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_CACHE_POLICY": "FIFO", "LMCACHE_MIN_RETRIEVE_TOKENS": "9"}
    config = load("chunk_size: 128\ncache_policy: lfu\n", environ, {"lmcache.chunk_size": 512})
    assert (config.chunk_size, config.cache_policy, config.live.min_retrieve_tokens) == (512, "LFU", 9)
    assert [config.origin(key).kind for key in ("chunk_size", "cache_policy", "min_retrieve_tokens", "local_cpu")] == [
        "connector",
        "file",
        "env",
        "default",
    ]
    assert config.notes == (
        f"LMCACHE_CHUNK_SIZE: chunk_size: '64' is shadowed by {load.path}:1 (chunk_size: 128); "
        "LMCache itself would take the variable",
        f"LMCACHE_CACHE_POLICY: cache_policy: 'FIFO' is shadowed by {load.path}:2 (cache_policy: 'lfu'); "
        "LMCache itself would take the variable",
        f"{load.path}:1: chunk_size: 128 is shadowed by "
        'kv_connector_extra_config["lmcache.chunk_size"] (chunk_size: 512)',
    )


def test_extra_config_merges_key_by_key(load):
    config = load(
        "extra_config:\n  valkey_database: 1\n  request_timeout: 2\n",
        {"LMCACHE_EXTRA_CONFIG": '{"valkey_database": 7, "resp_num_threads": 3}'},
        {"lmcache.extra_config": {"request_timeout": 5}},
    )
    assert config.live.extra_config == {"valkey_database": 1, "resp_num_threads": 3, "request_timeout": 5}
    assert config.origin("extra_config.valkey_database").text == f"{load.path}:2"
    assert config.origin("extra_config.resp_num_threads").text == "LMCACHE_EXTRA_CONFIG"
    assert len(config.notes) == 2
    assert all("is shadowed by" in note for note in config.notes)


def test_old_and_new_names_meet_across_sources(load):
    config = load("local_disk: /new\nmax_local_disk_size: 1\n", {"LMCACHE_LOCAL_DEVICE": "file:///old"})
    assert config.disk_paths == ("/new",)
    assert any("is shadowed by" in note for note in config.notes)


def test_the_environment_names_the_file(load):
    load("chunk_size: 32")
    assert load_config(environ={"LMCACHE_CONFIG_FILE": load.path}).chunk_size == 32


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "48")
    assert load_config().chunk_size == 48


# --- environment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("LMCACHE_CHUNKSIZE", "LMCACHE_CHUNK_SIZE"),
        ("LMCACHE_REMOTE_URI", "LMCACHE_REMOTE_URL"),
        ("LMCACHE_INSTANCE_ID", "LMCACHE_LMCACHE_INSTANCE_ID"),
        ("LM_CACHE_CHUNKSIZE", "LMCACHE_CHUNK_SIZE"),
    ],
)
def test_a_mistyped_variable_is_noted(name, suggestion):
    assert load_config(environ={name: "1"}).notes == (f"{name}: is not a setting; did you mean {suggestion}?",)


def test_an_unrelated_variable_is_noted():
    assert load_config(environ={"LMCACHE_XYZZY_QUUX": "1"}).notes == (
        "LMCACHE_XYZZY_QUUX: is not a setting; it has no effect",
    )


def test_keys_with_one_message_share_a_line(load):
    config = load("extra_config:\n" + "".join(f"  azure_{i}: 1\n" for i in range(22)))
    assert len(config.notes) == 1
    assert config.notes[0].startswith(f"{load.path}:2: extra_config.azure_0, extra_config.azure_1, ")
    assert " and 2 more: not needed: " in config.notes[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LMCACHE_SERVER_SERVICE_HOST", "10.0.0.1"),
        ("LMCACHE_SERVER_SERVICE_PORT", "8080"),
        ("LMCACHE_SERVER_SERVICE_PORT_HTTP", "8080"),
        ("LMCACHE_SERVER_PORT", "tcp://10.0.0.1:8080"),
        ("LMCACHE_SERVER_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("LMCACHE_SERVER_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("LMCACHE_PORT", "tcp://10.0.0.1:8080"),
        ("LMCACHE_MP_PORT", "tcp://10.0.0.1:8080"),  # a Service named lmcache-mp, and a key of LMCache
        ("LMCACHE_EXT_ENABLE", "1"),
        ("LMCACHE_CONFIG_FILE", ""),
        ("LMCACHE_USAGE_TRACK_URL", "http://x"),
        ("LMCACHE_", "x"),
        ("DO_NOT_TRACK", "1"),
    ],
)
def test_variables_that_are_no_settings_are_left_alone(name, value):
    assert load_config(environ={name: value}).notes == ()


def test_an_empty_variable_is_not_set():
    config = load_config(environ={"LMCACHE_CHUNK_SIZE": "  "})
    assert config.chunk_size == 256
    assert config.notes == ("LMCACHE_CHUNK_SIZE: is empty, which counts as not set",)


def test_the_old_prefix_is_read_and_noted():
    config = load_config(environ={"LM_CACHE_CHUNK_SIZE": "16"})
    assert config.chunk_size == 16
    assert config.notes == ("LM_CACHE_CHUNK_SIZE: LM_CACHE_ is an old prefix, write LMCACHE_CHUNK_SIZE",)
    assert load_config(environ={"LM_CACHE_CHUNK_SIZE": "16", "LMCACHE_CHUNK_SIZE": "32"}).chunk_size == 32


def test_a_bad_variable_is_an_error_naming_it():
    with pytest.raises(ConfigError, match=r"^LMCACHE_CHUNK_SIZE: chunk_size: '256.5' is not a whole number: write "):
        load_config(environ={"LMCACHE_CHUNK_SIZE": "256.5"})


def test_a_bad_variable_that_the_file_shadows_does_no_harm(load):
    assert load("chunk_size: 16", {"LMCACHE_CHUNK_SIZE": "many"}).chunk_size == 16


def test_the_pod_is_the_instance():
    assert load_config(environ={"HOSTNAME": "llama-0"}).instance_id == "llama-0"
    assert load_config(environ={"HOSTNAME": "x", "POD_NAME": "llama-1"}).instance_id == "llama-1"
    assert load_config(environ={"HOSTNAME": "x", "LMCACHE_LMCACHE_INSTANCE_ID": "me"}).instance_id == "me"


def test_variables_of_sentinel_and_resp():
    environ = {"REDIS_SERVICE_NAME": "mymaster", "REDIS_TIMEOUT": "2", "LMCACHE_RESP_PASSWORD": "s"}
    sentinel = load_config(environ=environ | {"LMCACHE_REMOTE_URL": "redis-sentinel://a:1,b:2"}).live.remote
    assert (sentinel.sentinel_service, sentinel.sentinel_timeout_s, sentinel.password) == ("mymaster", 2.0, None)
    resp = load_config(environ=environ | {"LMCACHE_REMOTE_URL": "resp://a:1"}).live.remote
    assert resp.password is not None
    assert resp.sentinel_service == "redismaster"
    with pytest.raises(ConfigError, match=r"^environment: REDIS_TIMEOUT: 'soon' is not a number: write "):
        load_config(environ={"LMCACHE_REMOTE_URL": "redis-sentinel://a:1", "REDIS_TIMEOUT": "soon"})


# --- connector ---------------------------------------------------------------------------------


def test_connector_options_without_effect_are_noted():
    extra = {
        "use_native": True,
        "lmcache.mp.port": 5,
        "chunk_size": 7,
        "spec_name": "x",
        "lmcache.max_tokens_per_load": 1,
    }
    config = load_config(environ={}, connector_extra=extra)
    assert config.chunk_size == 256
    assert config.notes == (
        'kv_connector_extra_config["use_native"]: not needed: this package is the connector',
        'kv_connector_extra_config["lmcache.mp.port"]: not needed: there is no multiprocess server to talk to',
        'kv_connector_extra_config["chunk_size"]: has no effect; did you mean lmcache.chunk_size?',
        'kv_connector_extra_config["lmcache.max_tokens_per_load"]: not needed: '
        "loading runs in the background and is not capped",
    )


def test_an_unknown_connector_option_is_an_error():
    with pytest.raises(
        ConfigError, match=r'^kv_.*\["lmcache.chunksize"\]: chunksize .here 1. .*: did you mean chunk_size\?$'
    ):
        load_config(environ={}, connector_extra={"lmcache.chunksize": 1})


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "paths"),
    [
        ("/mnt/kv", ("/mnt/kv",)),
        ("file:///mnt/kv", ("/mnt/kv",)),
        ("file://localhost/mnt/kv", ("/mnt/kv",)),
        ("fs:///mnt/kv/", ("/mnt/kv",)),
        ("fs://host:1/mnt/kv", ("/mnt/kv",)),
        ("/a, file:///b ,/a", ("/a", "/b")),
        ("[/a, /b]", ("/a", "/b")),
        ("'/a'", ("/a",)),
    ],
)
def test_directories(load, written, paths):
    assert load(f"max_local_disk_size: 1\nlocal_disk: {written}\n").disk_paths == paths


def test_remote_directory_is_the_disk_store(load):
    config = load("remote_url: fs://host:0/mnt/a,/mnt/b\n")
    assert (config.live.remote_url, config.disk_paths) == (None, ("/mnt/a", "/mnt/b"))
    assert config.live.disk_capacity_bytes == 10 * GIB
    both = load("remote_url: fs:///nfs\nlocal_disk: /ssd\nmax_local_disk_size: 1\n")
    assert (both.live.remote_url, both.disk_paths) == ("fs:///nfs", ("/ssd",))


def test_a_limit_without_a_disk_is_noted(load):
    config = load("max_local_disk_size: 5\n")
    assert config.live.disk_capacity_bytes is None
    assert config.notes == (f"{load.path}:1: max_local_disk_size: without effect: no local_disk names a directory",)
    assert load("max_local_disk_size: 0.0\n").notes == ()


def test_local_device_of_old_files(load):
    on_cpu = load("local_device: cpu\nmax_local_cache_size: 20\n")
    assert (on_cpu.local_cpu, on_cpu.live.host_capacity_bytes) == (True, 20 * GIB)
    on_disk = load("local_device: file:///d\nmax_local_cache_size: 20\n")
    assert (on_disk.disk_paths, on_disk.live.disk_capacity_bytes) == (("/d",), 20 * GIB)
    on_gpu = load("local_device: cuda:0\n")
    assert on_gpu.local_cpu is True
    assert "vLLM's own prefix cache" in on_gpu.notes[0]


def test_old_serdes_are_plain_bytes(load):
    config = load("remote_serde: safetensor\n")
    assert config.live.remote_serde == "naive"
    assert config.notes == (f"{load.path}:1: remote_serde: safetensor is an old name for plain bytes, read as naive",)


@pytest.mark.parametrize("serde", ["remote_serde: cachegen", "remote_url: lm://h:1\nremote_serde: lossless"])
def test_rows_of_eight_bits_go_to_tiers_bit_for_bit(load, serde):
    assert load(f"{serde}\nextra_config: {{host_kv_dtype: FP8}}\n").host_kv_dtype == "fp8"


def test_keys_of_which_one_value_is_honoured(load):
    config = load("enable_async_loading: false\nsave_unfull_chunk: yes\n")
    assert config.enable_async_loading is True
    assert config.save_unfull_chunk is True
    assert ["always asynchronous" in config.notes[0], "block of vLLM" in config.notes[1]] == [True, True]


def test_null_is_the_default_of_keys_that_have_none(load):
    assert load("remote_url:\nlocal_disk: null\nextra_config: ~\nlmcache_instance_id: None\n").notes == ()


@pytest.mark.parametrize(
    ("chunk", "block", "row", "tokens"),
    [
        (256, 16, 1, 256),
        (256, 256, 1, 256),
        ("auto", 16, 2**20, 16),
        ("auto", 16, 2**19 + 1, 32),
        ("auto", 16, 1000, 16784),
    ],
)
def test_chunks_are_whole_blocks(chunk, block, row, tokens):
    assert resolve_chunk_tokens(Config(chunk_size=chunk), block_tokens=block, bytes_per_block=row) == tokens


@pytest.mark.parametrize(
    ("chunk", "block", "way_out"), [(100, 16, "96 or 112"), (8, 16, "16"), (257, 128, "256 or 384")]
)
def test_chunks_that_are_not_whole_blocks(load, chunk, block, way_out):
    with pytest.raises(ConfigError) as caught:
        resolve_chunk_tokens(load(f"chunk_size: {chunk}"), block_tokens=block, bytes_per_block=1)
    assert str(caught.value) == (
        f"{load.path}:1: chunk_size: {chunk} is not a multiple of vLLM's block of {block} tokens: "
        f"write {way_out}, or auto"
    )


# --- secrets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:pw@h:6379", "redis://:***@h:6379"),
        ("redis://u:pw@h:6379", "redis://u:***@h:6379"),
        ("redis://u:p@w/x@h:6379", "redis://u:***@h:6379"),
        ("u:pw@h", "u:***@h"),
        ("pw@h", ":***@h"),
        ("s3://b?access_key=AK&region=x", "s3://b?access_key=***&region=x"),
        ("redis://h?password=pw", "redis://h?password=***"),
    ],
)
def test_passwords_in_urls_are_masked(url, shown):
    assert mask_url(url) == shown


def test_secrets_reach_no_row_note_or_repr(load):
    config = load(
        "remote_url: redis://u:hunter2@h:6379\n"
        "extra_config:\n  valkey_password: hunter2\n  s3_options: {secret_key: hunter2}\n",
        {"LMCACHE_REMOTE_URL": "redis://:hunter2@g", "LMCACHE_EXTRA_CONFIG": '{"valkey_password": "hunter2"}'},
    )
    assert config.live.remote_url == "redis://u:hunter2@h:6379"
    for text in (repr(config), str(config), repr(config.describe()), repr(config.notes)):
        assert "hunter2" not in text
    assert ("remote_url", "redis://u:***@h:6379", f"{load.path}:1") in config.describe()


@pytest.mark.parametrize(
    "text",
    [
        "remote_url: redis://u:hunter2@h:port\n",
        "remote_url: redis://u:hunter/2@h:1\n",
        "remote_url: ['redis://u:hunter2@h:1']\n",
        "remote_url: reddis://u:hunter2@h\n",
        "remote_urls: redis://u:hunter2@h\n",
        "redis_password: hunter2\n",
        'extra_config: \'{"password": "hunter2"\'\n',
        "extra_config: ['hunter2']\nextra_config: 1",
        "extra_config:\n  password: [hunter2]\n",
        'remote_url: "redis://u:hunter2@h\n',
    ],
)
def test_secrets_reach_no_error(load, text):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert "hunter" not in str(caught.value)


def test_numbers_of_tokens_are_no_secrets():
    assert masked("min_retrieve_tokens", 5) == 5


# --- the object --------------------------------------------------------------------------------


def test_nothing_in_a_config_can_be_changed(load):
    config = load("extra_config: {a: {b: [1, 2]}}")
    for change in (
        lambda: setattr(config, "chunk_size", 1),
        lambda: setattr(config.live, "log_level", "DEBUG"),
        lambda: config.live.extra_config.__setitem__("a", 1),
        lambda: config.live.extra_config["a"].__setitem__("b", 1),
        lambda: config.live.extra_config["a"]["b"].append(3),
    ):
        with pytest.raises((ValueError, AttributeError)):
            change()


def test_a_config_survives_copying(load):
    config = load("chunk_size: 16\nextra_config: {a: {b: [1]}}")
    assert copy.deepcopy(config) == config
    assert config.model_dump()["live"]["extra_config"] == {"a": {"b": (1,)}}


def test_live_changes_are_found_by_their_place(load):
    before, after = load("chunk_size: 256\nmin_retrieve_tokens: 1"), load("chunk_size: 256\nmin_retrieve_tokens: 2")
    assert before.live != after.live
    assert before.model_copy(update={"live": after.live, "origins": after.origins}) == after


def test_importing_loads_neither_torch_nor_vllm():
    code = "import sys, lmcache_ext.config, lmcache_ext.cli; print({'torch', 'vllm', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
