"""Every key of LMCache 0.5.6, from the file and from the environment: read, typed, and never silent."""

import json

import pytest
import yaml

from lmcache_ext.config import Config, load_config
from lmcache_ext.config_keys import KEYS, RENAMED, nearest
from lmcache_ext.config_urls import SCHEMES
from lmcache_ext.config_values import GIB
from lmcache_ext.stores import lmserver, redis_options

# (key, value as YAML or JSON people write it, the value we must arrive at); lists also come as "1, 2" in variables.
HONOURED = [
    ("chunk_size", 512, 512),
    ("local_cpu", False, False),
    ("max_local_cpu_size", 2.0, 2 * GIB),
    ("local_disk", "file:///mnt/a/,/mnt/b", ("/mnt/a", "/mnt/b")),
    ("max_local_disk_size", 7.5, 7 * GIB + GIB // 2),
    ("remote_url", "lm://localhost:65432", "lm://localhost:65432"),
    ("remote_serde", "cachegen", "cachegen"),
    ("audit_actual_remote_url", "lm://localhost:65432", "lm://localhost:65432"),
    ("save_decode_cache", True, True),
    ("save_unfull_chunk", True, True),
    ("blocking_timeout_secs", 3, 3.0),
    ("lookup_timeout_ms", 3000, 3000),
    ("cache_policy", "MRU", "MRU"),
    ("enable_async_loading", True, True),
    ("min_retrieve_tokens", 64, 64),
    ("lmcache_instance_id", "engine-1", "engine-1"),
    ("enable_p2p", True, True),
    ("p2p_host", "localhost", "localhost"),
    ("p2p_init_ports", [8200, 8201], (8200, 8201)),
    ("p2p_lookup_ports", 8202, (8202,)),
    ("transfer_channel", "nixl", "nixl"),
    ("enable_controller", True, True),
    ("controller_pull_url", "localhost:8300", "localhost:8300"),
    ("controller_reply_url", "tcp://localhost:8400", "tcp://localhost:8400"),
    ("lmcache_worker_ports", "8500, 8501", (8500, 8501)),
    ("lmcache_worker_ids", [0, 1], (0, 1)),
    ("lmcache_worker_heartbeat_delay_time", 5, 5.0),
    ("lmcache_worker_heartbeat_time", 10, 10.0),
]
NOT_NEEDED = [
    ("internal_api_server_enabled", True, True),
    ("internal_api_server_host", "0.0.0.0", "0.0.0.0"),
    ("internal_api_server_port_start", 7000, 7000),
    ("internal_api_server_include_index_list", [0, 1], (0, 1)),
    ("internal_api_server_socket_path_prefix", "/tmp/api", "/tmp/api"),
    ("local_cpu_use_hugepages", True, True),
    ("reserve_local_cpu_size", 1.0, GIB),
    ("local_disk_path_sharding", "by_gpu", "by_gpu"),
    ("use_layerwise", True, True),
    ("pre_caching_hash_algorithm", "sha256_cbor", "sha256_cbor"),
    ("enable_blending", True, True),
    ("blend_recompute_ratios", 0.15, (0.15,)),
    ("blend_thresholds", [0.5], (0.5,)),
    ("blend_check_layers", 1, (1,)),
    ("blend_min_tokens", 256, 256),
    ("blend_special_str", " # # ", " # # "),
    ("retrieve_locations", ["LocalCPUBackend"], ("LocalCPUBackend",)),
    ("store_location", "LocalDiskBackend", "LocalDiskBackend"),
    ("mp_host", "localhost", "localhost"),
    ("mp_port", 5555, 5555),
    ("enable_pd", True, True),
    ("pd_role", "sender", "sender"),
    ("pd_buffer_size", 1073741824, 1073741824.0),
    ("pd_buffer_device", "cuda", "cuda"),
    ("pd_peer_host", "localhost", "localhost"),
    ("pd_peer_init_port", [7300], (7300,)),
    ("pd_peer_alloc_port", [7400], (7400,)),
    ("pd_peer_query_port", [7450], (7450,)),
    ("pd_proxy_host", "localhost", "localhost"),
    ("pd_proxy_port", 7500, 7500),
    ("pd_allocation_timeout_sec", "inf", float("inf")),
    ("pd_shutdown_timeout_sec", 5, 5.0),
    ("pd_condition_poll_interval_sec", 0.005, 0.005),
    ("pd_max_prefill_len", 0, 0),
    ("pd_backend_mode", "async", "async"),
    ("pd_skip_proxy_notification", False, False),
    ("pd_bidirectional", False, False),
    ("nixl_backends", ["UCX"], ("UCX",)),
    ("nixl_buffer_size", 1073741824, 1073741824.0),
    ("nixl_buffer_device", "cpu", "cpu"),
    ("gds_path", "/mnt/gds", "/mnt/gds"),
    ("gds_path_sharding", "by_gpu", "by_gpu"),
    ("gds_buffer_size", 8192, 8192.0),
    ("use_gds", True, True),
    ("gds_backend", "cufile", "cufile"),
    ("maru_path", "maru://localhost:5555", "maru://localhost:5555"),
    ("maru_pool_size", 4.0, 4 * GIB),
    ("external_lookup_client", "mooncakestore://h:50051", "mooncakestore://h:50051"),
    ("py_enable_gc", True, True),
    ("numa_mode", "auto", "auto"),
    ("priority_limit", 3, 3),
    ("runtime_plugin_locations", ["/plugins"], ("/plugins",)),
    ("storage_plugins", ["mine"], ("mine",)),
    ("remote_storage_plugins", ["mine"], ("mine",)),
    ("hit_miss_ratio", 0.5, 0.5),
    ("lookup_server_worker_ids", [0], (0,)),
    ("enable_scheduler_bypass_lookup", False, False),
    ("script_allowed_imports", ["os"], ("os",)),
    ("run_script_api_enabled", False, False),
    ("enable_lazy_memory_allocator", True, True),
    ("lazy_memory_initial_ratio", 0.2, 0.2),
    ("lazy_memory_expand_trigger_ratio", 0.5, 0.5),
    ("lazy_memory_step_ratio", 0.1, 0.1),
    ("lazy_memory_safe_size", 0.0, 0),
    ("enable_chunk_statistics", True, True),
    ("chunk_statistics_auto_start_statistics", True, True),
    ("chunk_statistics_auto_exit_timeout_hours", 1.5, 1.5),
    ("chunk_statistics_auto_exit_target_unique_chunks", 10, 10),
    ("chunk_statistics_strategy", "memory_bloom_filter", "memory_bloom_filter"),
    ("enable_kv_events", True, True),
    ("use_gpu_connector_v3", False, False),
    ("pin_timeout_sec", 300, 300.0),
    ("pin_check_interval_sec", 30, 30.0),
    ("remote_config_url", "http://conf", "http://conf"),
    ("app_id", "app", "app"),
    ("enable_hidden_state_cache", False, False),
    ("max_hidden_state_cpu_size", 2.0, 2 * GIB),
    ("hidden_state_layers", [1, -1], (1, -1)),
    ("hidden_states_retrieve_mode", "prefix_strict", "prefix_strict"),
]
TABLE = [(use, *row) for use, rows in (("honoured", HONOURED), ("not needed", NOT_NEEDED)) for row in rows]
LEGACY = [
    "pipelined_backend",
    "use_experimental",
    "track_usage",
    "lookup_url",
    "distributed_url",
    "error_handling",
    "enable_nixl",
    "nixl_receiver_host",
    "nixl_receiver_port",
    "nixl_peer_port",
    "nixl_enable_gc",
]
OURS = [
    "log_level",
    "local_disk_serde",
    "freeze",
    "bypass",
    "remote_min_uses",
    "promote_on_hit",
    "controller_token_file",
]


def from_file(tmp_path, text, environ=None, connector=None):
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(text)
    return load_config(path=str(path), environ=environ or {}, connector_extra=connector)


def value_of(config: Config, name: str):
    key = KEYS[name]
    if key.home is None:
        return config.not_needed[name]
    value = config
    for part in key.home.split("."):
        value = getattr(value, part)
    return value


def as_variable(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def companions(name: str) -> dict:
    """Keys without which the one under test would have no effect."""
    needs = {"max_local_disk_size": {"local_disk": "/mnt"}, "local_disk": {"max_local_disk_size": 1}}
    needs["enable_controller"] = {"controller_pull_url": "localhost:8300"}
    needs["enable_p2p"] = {"enable_controller": True, **needs["enable_controller"], "p2p_host": "localhost"}
    needs["enable_p2p"]["p2p_init_ports"] = 8200
    return needs.get(name, {})


def assert_placed(config, use, name, expected):
    value = value_of(config, name)
    assert value == expected
    assert type(value) is type(expected)
    assert KEYS[name].use == use
    if use != "honoured":
        assert [note for note in config.notes if name in note.lower() and KEYS[name].note in note]


def test_the_table_is_complete():
    assert {row[1] for row in TABLE} | set(LEGACY) | set(OURS) == set(KEYS)
    assert set(RENAMED.values()) <= set(KEYS)


@pytest.mark.parametrize(("use", "name", "written", "expected"), TABLE, ids=[row[1] for row in TABLE])
def test_key_is_read_from_the_file(tmp_path, use, name, written, expected):
    text = yaml.safe_dump({name: written, **companions(name)}, sort_keys=False)
    config = from_file(tmp_path, text)
    assert_placed(config, use, name, expected)
    assert config.origin(name) == ("file", f"{tmp_path}/lmcache_config.yaml:1")
    assert name in [row[0] for row in config.describe()]


@pytest.mark.parametrize(("use", "name", "written", "expected"), TABLE, ids=[row[1] for row in TABLE])
def test_key_is_read_from_the_environment(use, name, written, expected):
    variables = {name: written, **companions(name)}
    config = load_config(environ={f"LMCACHE_{key.upper()}": as_variable(value) for key, value in variables.items()})
    assert_placed(config, use, name, expected)
    assert config.origin(name) == ("env", f"LMCACHE_{name.upper()}")


@pytest.mark.parametrize(("use", "name", "written", "expected"), TABLE, ids=[row[1] for row in TABLE])
def test_key_is_read_from_the_connector_configuration(use, name, written, expected):
    variables = {name: written, **companions(name)}
    extra = json.loads(json.dumps({f"lmcache.{key}": value for key, value in variables.items()}))
    config = load_config(environ={}, connector_extra=extra)
    assert_placed(config, use, name, expected)
    assert config.origin(name) == ("connector", f'kv_connector_extra_config["lmcache.{name}"]')


@pytest.mark.parametrize("name", [row[1] for row in TABLE if row[1] != "blend_special_str"])
def test_key_refuses_a_value_of_another_kind(tmp_path, name):
    with pytest.raises(Exception, match=rf"^/.*lmcache_config\.yaml:1: {name}: ") as caught:
        from_file(tmp_path, f"{name}: {{a: {{b: 2026-01-01}}}}\n")
    assert type(caught.value).__name__ == "ConfigError"


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_key_is_accepted_with_one_note(tmp_path, name):
    config = from_file(tmp_path, f"{name}: false\n")
    assert [note for note in config.notes if f":1: {name}: not needed: " in note]
    assert len(config.notes) == 1


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_name_is_read_as_the_new_one(tmp_path, old, new):
    written = next(row[2] for row in TABLE if row[1] == new)
    expected = next(row[3] for row in TABLE if row[1] == new)
    config = from_file(tmp_path, yaml.safe_dump({old: written}))
    assert value_of(config, new) == expected
    assert f"{tmp_path}/lmcache_config.yaml:1: {old}: is an old name, read as {new}" in config.notes


def test_new_name_beats_the_old_one_in_one_file(tmp_path):
    config = from_file(tmp_path, "peer_init_ports: 1\np2p_init_ports: 2\n")
    assert config.peer.init_ports == (2,)
    assert [note for note in config.notes if ":1: peer_init_ports: ignored: " in note]


def test_every_note_of_a_key_says_something():
    for key in KEYS.values():
        assert (key.use == "honoured") == (not key.note)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("chunksize", "chunk_size"),
        ("chunk-size", "chunk_size"),
        ("chunkSize", "chunk_size"),
        ("LMCACHE_CHUNK_SIZE", "chunk_size"),
        ("max_local_cpu", "max_local_cpu_size"),
        ("cpuOffloadingBufferSize", "max_local_cpu_size"),
        ("instance_id", "lmcache_instance_id"),
        ("remote-url", "remote_url"),
        ("evction_plicy_xyzzy_quux", None),
    ],
)
def test_nearest_key(written, meant):
    assert nearest(written) == meant


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_accepts_its_own_form(scheme):
    form = SCHEMES[scheme].form.replace("[", "").replace("]", "").replace("/db", "/1")
    config = load_config(environ={"LMCACHE_REMOTE_URL": form})
    assert form in (config.live.remote_url, f"{scheme}://{config.disk_paths[0]}" if config.disk_paths else None)


def test_mistyped_options_of_stores_are_errors(tmp_path):
    with pytest.raises(Exception, match=r":2: extra_config.valkey_database: 'x' is not a whole number"):
        from_file(tmp_path, "extra_config:\n  valkey_database: x\n")


def test_options_of_stores_have_a_typed_place(tmp_path):
    options = {
        "valkey_username": "u",
        "valkey_password": "p",
        "valkey_database": 3,
        "valkey_mode": "cluster",
        "tls_enable": "yes",
        "valkey_enable_ttl": True,
        "valkey_ttl_sec": 60,
        "valkey_num_workers": 4,
        "request_timeout": 2,
        "connection_timeout": 1,
        "remote_stall_timeout_ms": 400,
        "remote_min_bytes_per_s": 1000000,
        "ping_interval": 3,
        "get_blocking_failed_threshold": 5,
        "waiting_time_for_recovery": 9,
        "disk_io_threads": 2,
        "host_kv_dtype": "fp8",
        "cuda_page_copier": "kernels",
        "cachegen_key_bins": "64, 48",
        "cachegen_value_bins": 12,
    }
    config = from_file(tmp_path, yaml.safe_dump({"extra_config": options}))
    remote = config.live.remote
    assert remote.password is not None
    assert remote.password.get_secret_value() == "p"
    assert (remote.username, remote.database, remote.mode, remote.tls) == ("u", 3, "cluster", True)
    assert (remote.ttl_enabled, remote.ttl_s, remote.num_connections) == (True, 60.0, 4)
    assert (remote.request_timeout_s, remote.connect_timeout_s) == (2.0, 1.0)
    assert (remote.stall_timeout_ms, remote.min_bytes_per_s) == (400, 1000000)
    assert tuple(config.live.health.model_dump().values()) == (3.0, 5, 9.0)
    assert config.disk_io_threads == 2
    assert (config.host_kv_dtype, config.cuda_page_copier) == ("fp8", "kernels")
    assert (config.cachegen_key_bins, config.cachegen_value_bins) == ((64.0, 48.0), (12.0,))
    assert dict(config.live.extra_config) == options
    assert config.notes == ()


def test_options_without_effect_are_noted(tmp_path):
    config = from_file(tmp_path, "extra_config:\n  save_chunk_meta: false\n  nixl_path: /x\n  valkey_pasword: p\n")
    first, second, third = config.notes
    assert ":2: extra_config.save_chunk_meta: not needed: an object carries its own frame" in first
    assert ":3: extra_config.nixl_path: not needed" in second
    assert ":4: extra_config.valkey_pasword: unknown option, without effect; did you mean valkey_password?" in third


def test_options_that_the_stores_read_are_not_called_without_effect(tmp_path):
    names = (*redis_options._FIELDS, *lmserver._TEXTS, "lm_num_connections")
    written = dict.fromkeys(names, 1) | {"mode": "cluster", "tls": True, "username": "u", "password": "p"}
    notes = from_file(tmp_path, yaml.safe_dump({"extra_config": written})).notes
    assert [note for note in notes if "without effect" in note] == []
