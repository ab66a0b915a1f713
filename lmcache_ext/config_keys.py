"""Every key of LMCache 0.5 and of this package: how it is read, where it lives, what stands in for it.

A key with a ``home`` has a place in ``Config``. A key with a ``note`` is accepted and does nothing;
the note says what stands in for it.
"""

from __future__ import annotations

import difflib
import re
from typing import Literal, NamedTuple

from lmcache_ext.config_quotas import quotas
from lmcache_ext.config_stores import INFINISTORE, mooncake_names
from lmcache_ext.config_urls import directories, host, host_and_port, remote_url
from lmcache_ext.config_values import (
    Reader,
    anything,
    blank_text,
    boolean,
    either,
    list_of,
    number,
    one_of,
    optional,
    port,
    ports,
    seconds,
    size_bytes,
    text,
    whole,
)

Use = Literal["honoured", "not needed"]


class Key(NamedTuple):
    """One setting."""

    name: str
    read: Reader
    home: str | None = None
    note: str = ""

    @property
    def use(self) -> Use:
        return "not needed" if self.home is None else "honoured"


def _table(*keys: Key) -> dict[str, Key]:
    return {key.name: key for key in keys}


def _not_needed(note: str, **readers: Reader) -> tuple[Key, ...]:
    return tuple(Key(name, read, None, note) for name, read in readers.items())


CACHE_POLICIES = ("LRU", "ARC", "LFU", "FIFO", "MRU")
SERDES = ("naive", "cachegen", "fp8", "int8", "kivi", "kivi2", "lossless")
BIT_EXACT_SERDES = ("naive", "lossless")
LEGACY_SERDES = ("torch", "safetensor", "fast")  # of older LMCache versions: all of them mean plain bytes
HOST_KV_DTYPES = ("auto", "fp8")
CUDA_PAGE_COPIERS = ("vllm", "kernels")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_HASHES = ("builtin", "sha256", "sha256_cbor", "xxhash", "xxhash_cbor")

_HONOURED = (
    Key("chunk_size", either(one_of("auto"), whole(1, 2**24)), "chunk_size"),
    Key("local_cpu", boolean, "local_cpu"),
    Key("max_local_cpu_size", size_bytes, "live.host_capacity_bytes"),
    Key("cache_policy", one_of(*CACHE_POLICIES), "cache_policy"),
    Key("local_disk", optional(directories), "disk_paths"),
    Key("max_local_disk_size", size_bytes, "live.disk_capacity_bytes"),
    Key("local_disk_serde", one_of(*SERDES, *LEGACY_SERDES), "local_disk_serde"),
    Key("remote_url", optional(remote_url), "live.remote_url"),
    Key("remote_serde", optional(one_of(*SERDES, *LEGACY_SERDES)), "live.remote_serde"),
    Key("audit_actual_remote_url", optional(remote_url), "live.audit_actual_remote_url"),
    Key("save_decode_cache", boolean, "live.save_decode_cache"),
    Key("save_unfull_chunk", boolean, "save_unfull_chunk"),
    Key("enable_async_loading", boolean, "enable_async_loading"),
    Key("blocking_timeout_secs", seconds, "live.blocking_timeout_s"),
    Key("lookup_timeout_ms", whole(1), "live.lookup_timeout_ms"),
    Key("min_retrieve_tokens", whole(0), "live.min_retrieve_tokens"),
    Key("remote_min_uses", whole(1), "live.remote_min_uses"),
    Key("promote_on_hit", boolean, "live.promote_on_hit"),
    Key("freeze", boolean, "live.freeze"),
    Key("bypass", boolean, "live.bypass"),
    Key("lmcache_instance_id", optional(text), "instance_id"),
    Key("log_level", one_of(*LOG_LEVELS), "live.log_level"),
    Key("enable_p2p", boolean, "peer.enabled"),
    Key("p2p_host", optional(host), "peer.host"),
    Key("p2p_init_ports", optional(ports), "peer.init_ports"),
    Key("p2p_lookup_ports", optional(ports), "peer.lookup_ports"),
    Key("transfer_channel", optional(one_of("nixl", "mock_memory", "tcp")), "peer.transfer_channel"),
    Key("enable_controller", boolean, "controller.enabled"),
    Key("controller_pull_url", optional(host_and_port), "controller.pull_url"),
    Key("controller_reply_url", optional(host_and_port), "controller.reply_url"),
    Key("lmcache_worker_ports", optional(ports), "controller.worker_ports"),
    Key("lmcache_worker_ids", optional(list_of(whole(0))), "controller.worker_ids"),
    Key("lmcache_worker_heartbeat_delay_time", number(), "controller.heartbeat_delay_s"),
    Key("lmcache_worker_heartbeat_time", optional(seconds), "controller.heartbeat_s"),
    Key("controller_token_file", optional(text), "controller.token_file"),
)

_PEER_TIMES = "blocking_timeout_secs bounds what a peer may take, and one that fails is left alone for 5 s"
_OLD_CONTROLLER = "the controller is told by enable_controller, controller_pull_url and controller_reply_url"
_TELLING = "what host memory holds is told in batches of its own size, on the connections of the two URLs"
_PD = "prefill and decode are not split here: use a vLLM connector made for it, such as NixlConnector"
_GDS = "files are read into host memory and copied from there: use local_disk"
_LAZY = "host memory is one mapping that the kernel fills on first use"
_BLEND = "only prefixes are reused: a chunk in another place of a prompt is computed again"
_PLUGIN = "nothing is loaded by name: the tiers are host memory, local_disk and remote_url"
_LOOKUP = "the scheduler looks up by itself and never waits: a slow store is a miss (lookup_timeout_ms)"
_STATISTICS = "lookups and hits are counted at /metrics"
_HIDDEN = "only KV is stored"
_NOT_NEEDED = (
    *_not_needed("vLLM maps the region that all ranks share", local_cpu_use_hugepages=boolean),
    *_not_needed("a size that does not fit the memory limit stops the start", reserve_local_cpu_size=size_bytes),
    *_not_needed("chunks are spread over all directories by their hash", local_disk_path_sharding=text),
    *_not_needed("all layers of a chunk travel as one object, in the background", use_layerwise=boolean),
    *_not_needed(
        "vLLM's own block hash is the key; --prefix-caching-hash-algo chooses it, sha256_cbor needs no PYTHONHASHSEED",
        pre_caching_hash_algorithm=one_of(*_HASHES),
    ),
    *_not_needed(
        _BLEND,
        enable_blending=boolean,
        blend_recompute_ratios=optional(list_of(number())),
        blend_thresholds=optional(list_of(number())),
        blend_check_layers=optional(list_of(whole(0))),
        blend_min_tokens=whole(0),
        blend_special_str=blank_text,
    ),
    *_not_needed(
        "every tier is read and written: leave out the tier that should not be",
        retrieve_locations=optional(list_of(text)),
        store_location=optional(text),
    ),
    *_not_needed(
        "there is no management server: the model server's own port has /metrics and health",
        internal_api_server_enabled=boolean,
        internal_api_server_host=text,
        internal_api_server_port_start=port,
        internal_api_server_include_index_list=optional(list_of(whole(-1))),
        internal_api_server_socket_path_prefix=optional(text),
    ),
    *_not_needed("there is no multiprocess server to talk to", mp_host=optional(text), mp_port=port),
    *_not_needed(
        _PD,
        enable_pd=boolean,
        pd_role=optional(one_of("sender", "receiver", "both")),
        pd_buffer_size=optional(number()),
        pd_buffer_device=optional(text),
        pd_peer_host=optional(text),
        pd_peer_init_port=optional(ports),
        pd_peer_alloc_port=optional(ports),
        pd_peer_query_port=optional(ports),
        pd_proxy_host=optional(text),
        pd_proxy_port=optional(port),
        pd_allocation_timeout_sec=number(),
        pd_shutdown_timeout_sec=number(),
        pd_condition_poll_interval_sec=number(),
        pd_max_prefill_len=whole(0),
        pd_backend_mode=text,
        pd_skip_proxy_notification=boolean,
        pd_bidirectional=boolean,
    ),
    *_not_needed(
        "no NIXL: bytes travel over TCP, between peers too (enable_p2p)",
        nixl_backends=optional(list_of(text)),
        nixl_buffer_size=optional(number()),
        nixl_buffer_device=optional(text),
    ),
    *_not_needed(
        _GDS,
        gds_path=optional(text),
        gds_path_sharding=text,
        gds_buffer_size=optional(number()),
        use_gds=boolean,
        gds_backend=text,
    ),
    *_not_needed(
        "no CXL pool: use max_local_cpu_size and local_disk", maru_path=optional(text), maru_pool_size=size_bytes
    ),
    *_not_needed(_LOOKUP, external_lookup_client=optional(text)),
    *_not_needed(_LOOKUP, lookup_server_worker_ids=optional(list_of(whole(0))), enable_scheduler_bypass_lookup=boolean),
    *_not_needed("garbage collection is left to vLLM", py_enable_gc=boolean),
    *_not_needed("vLLM binds its workers (--numa-bind)", numa_mode=optional(one_of("auto", "manual"))),
    *_not_needed("requests of every priority are cached", priority_limit=optional(whole(-(2**31)))),
    *_not_needed(
        _PLUGIN,
        runtime_plugin_locations=optional(list_of(text)),
        storage_plugins=optional(list_of(text)),
        remote_storage_plugins=optional(list_of(text)),
    ),
    *_not_needed("hits are real here", hit_miss_ratio=optional(number())),
    *_not_needed(
        "no script can be sent to the server",
        script_allowed_imports=optional(list_of(text)),
        run_script_api_enabled=boolean,
    ),
    *_not_needed(
        _LAZY,
        enable_lazy_memory_allocator=boolean,
        lazy_memory_initial_ratio=number(),
        lazy_memory_expand_trigger_ratio=number(),
        lazy_memory_step_ratio=number(),
        lazy_memory_safe_size=size_bytes,
    ),
    *_not_needed(
        _STATISTICS,
        enable_chunk_statistics=boolean,
        chunk_statistics_auto_start_statistics=boolean,
        chunk_statistics_auto_exit_timeout_hours=number(),
        chunk_statistics_auto_exit_target_unique_chunks=optional(whole(0)),
        chunk_statistics_strategy=text,
    ),
    *_not_needed("vLLM publishes the events (--kv-events-config)", enable_kv_events=boolean),
    *_not_needed("the copier is chosen by platform", use_gpu_connector_v3=boolean),
    *_not_needed(
        "rows are released when their job reports, and every job reports",
        pin_timeout_sec=number(),
        pin_check_interval_sec=number(),
    ),
    *_not_needed(
        "configuration is never fetched from a URL (it would send the environment there): mount the ConfigMap",
        remote_config_url=optional(text),
        app_id=optional(text),
    ),
    *_not_needed(
        _HIDDEN,
        enable_hidden_state_cache=boolean,
        max_hidden_state_cpu_size=size_bytes,
        hidden_state_layers=optional(list_of(whole(-(2**31)))),
        hidden_states_retrieve_mode=text,
    ),
    # Keys that LMCache itself no longer knows.
    *_not_needed("storing and loading always run in the background", pipelined_backend=boolean),
    *_not_needed("there is only one engine", use_experimental=boolean),
    *_not_needed("usage is never reported to anybody", track_usage=boolean),
    *_not_needed(_OLD_CONTROLLER, lookup_url=anything, distributed_url=anything),
    *_not_needed("a remote failure is always a miss", error_handling=anything),
    *_not_needed(
        _PD,
        enable_nixl=boolean,
        nixl_receiver_host=anything,
        nixl_receiver_port=anything,
        nixl_peer_port=anything,
        nixl_enable_gc=boolean,
    ),
)

KEYS: dict[str, Key] = _table(*_HONOURED, *_NOT_NEEDED)

# Old name -> today's; LMCache keeps twelve such aliases and drops ten of them.
RENAMED = {
    "peer_init_ports": "p2p_init_ports",
    "peer_lookup_ports": "p2p_lookup_ports",
    "blend_recompute_ratio": "blend_recompute_ratios",
    "controller_url": "controller_pull_url",
    "lmcache_worker_port": "lmcache_worker_ports",
    "plugin_locations": "runtime_plugin_locations",
    "external_backends": "storage_plugins",
    "enable_xpyd": "enable_pd",
    "nixl_role": "pd_role",
    "nixl_peer_host": "pd_peer_host",
    "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port",
    "weka_path": "gds_path",
    "cufile_buffer_size": "gds_buffer_size",
    "max_local_cache_size": "max_local_cpu_size",
}

# Not settings, but written as if they were: what to write instead.
MISTAKEN = {
    "cpuOffloadingBufferSize": "max_local_cpu_size",
    "diskOffloadingBufferSize": "max_local_disk_size",
    "remoteUrl": "remote_url",
    "remoteSerde": "remote_serde",
    "logLevel": "log_level",
    "instance_id": "lmcache_instance_id",
}

# LMCACHE_* variables that are no settings of the engine.
OTHER_VARIABLES = re.compile(
    r"LMCACHE_(CONFIG_FILE|EXT_[A-Z0-9_]+|USAGE_TRACK_(URL|INTERVAL)|FORCE_SKIP_SAVE|RESP_(HOST|PORT|USERNAME|PASSWORD)"
    r"|DEVICE_BACKEND|MP_TRANSFER_MODE|MQ_TIMEOUT|(COORDINATOR|EC|RUNTIME_PLUGIN)_[A-Z0-9_]+)"
)


# --- extra_config -----------------------------------------------------------------------------

_EXTRA_HONOURED = (
    Key("username", optional(text), "live.remote.username"),
    Key("password", optional(text), "live.remote.password"),
    Key("valkey_username", optional(text), "live.remote.username"),
    Key("valkey_password", optional(text), "live.remote.password"),
    Key("valkey_database", optional(whole(0, 2**16)), "live.remote.database"),
    Key("valkey_mode", one_of("standalone", "cluster"), "live.remote.mode"),
    Key("tls_enable", boolean, "live.remote.tls"),
    Key("valkey_enable_ttl", boolean, "live.remote.ttl_enabled"),
    Key("valkey_ttl_sec", optional(seconds), "live.remote.ttl_s"),
    Key("resp_num_threads", whole(1, 256), "live.remote.num_connections"),
    Key("valkey_num_workers", whole(1, 256), "live.remote.num_connections"),
    Key("request_timeout", seconds, "live.remote.request_timeout_s"),
    Key("connection_timeout", seconds, "live.remote.connect_timeout_s"),
    Key("remote_stall_timeout_ms", whole(1), "live.remote.stall_timeout_ms"),
    Key("remote_min_bytes_per_s", whole(1), "live.remote.min_bytes_per_s"),
    Key("ping_interval", seconds, "live.health.ping_interval_s"),
    Key("get_blocking_failed_threshold", whole(1), "live.health.failures_before_open"),
    Key("waiting_time_for_recovery", seconds, "live.health.recovery_s"),
    Key("quotas", optional(quotas), "live.quotas"),
    Key("disk_io_threads", whole(1, 256), "disk_io_threads"),
    Key("host_kv_dtype", one_of(*HOST_KV_DTYPES), "host_kv_dtype"),
    Key("cuda_page_copier", one_of(*CUDA_PAGE_COPIERS), "cuda_page_copier"),
    Key("cachegen_key_bins", list_of(number(1, 4096)), "cachegen_key_bins"),
    Key("cachegen_value_bins", list_of(number(1, 4096)), "cachegen_value_bins"),
)
_EXTRA_NOT_NEEDED = (
    *_not_needed("blocking_timeout_secs bounds every answer", ping_timeout=seconds),
    *_not_needed("files go through the page cache, which the next reader shares", use_odirect=boolean),
    *_not_needed("an object carries its own frame", save_chunk_meta=boolean),
    *_not_needed("one object holds the pages of all ranks", save_only_first_rank=boolean),
    *_not_needed("one region is shared by all ranks", first_rank_max_local_cpu_size=size_bytes),
    *_not_needed("one object holds the pages of all ranks", remote_enable_mla_worker_id_as0=boolean),
    *_not_needed("a store that fails or is slow is always a miss", fallback_policy=one_of("recompute", "local_cpu")),
    *_not_needed(_LOOKUP, lookup_backoff_time=number(), use_exists_sync=boolean, force_store_wait=boolean),
    *_not_needed("there are no sockets between scheduler and workers", lmcache_rpc_port=anything),
    *_not_needed("give the URL as remote_url", redis_url=optional(text), fs_base_path=optional(text)),
    *_not_needed(
        _PEER_TIMES,
        p2p_socket_recv_timeout_ms=number(),
        p2p_socket_send_timeout_ms=number(),
        p2p_max_retry_count=whole(0),
    ),
    *_not_needed("vLLM reports cached tokens in usage", enable_cache_usage_details_in_response=boolean),
    *_not_needed(_TELLING, kv_msg_batch_size=whole(0), kv_msg_batch_timeout=number(), heartbeat_url=optional(text)),
    *_not_needed("vLLM names its own region", shm_name=optional(text)),
)
_EXTRA_OF_STORES = (
    *(Key(name, option.read, f"live.mooncake.{option.field}") for name, option in mooncake_names().items()),
    *(Key(name, option.read, f"live.infinistore.{option.field}") for name, option in INFINISTORE.items()),
)
EXTRA: dict[str, Key] = _table(*_EXTRA_HONOURED, *_EXTRA_OF_STORES, *_EXTRA_NOT_NEEDED)
# Of Redis, Valkey and lm://, which read them by these names (stores/redis_options.py, stores/lmserver.py).
EXTRA_OF_STORES = re.compile(
    r"lm_.+|token|token_file|tls|tls_(ca|cert|key)|ssl_.+|name|mode|database|ttl_(s|touch)|num_connections|part_bytes|min_bytes_per_s"
    r"|sentinel_(service|username|password)|(request|connect|lookup|sentinel|stall)_timeout_s"
)
# Families of options of LMCache that nothing reads here.
EXTRA_FAMILIES = re.compile(
    r"(local_cpu\.|histogram_bucket_|fs_connector_|s3_|aws_|azure_|hf3fs_|sagemaker_hyperpod_|nixl_"
    r"|worker_socket_|full_sync_|dax\.|rust_raw_block\.|maru_|storage_plugin\.|remote_storage_plugin\."
    r"|internal_api_server_|chunk_statistics_).+"
    r"|enable_nixl_storage|disable_tls|gpu_to_numa_mapping"
)


# Of kv_connector_extra_config, without or beside the "lmcache." prefix.
CONNECTOR_NOT_NEEDED = {
    "discard_partial_chunks": "save_unfull_chunk says what happens to the last chunk",
    "skip_last_n_tokens": "vLLM computes the last token itself",
    "lmcache_rpc_port": "there are no sockets between scheduler and workers",
    "use_native": "this package is the connector",
    "use_layerwise": "all layers of a chunk travel as one object, in the background",
    "lmcache.max_tokens_per_load": "loading runs in the background and is not capped",
}
CONNECTOR_FAMILIES = re.compile(r"lmcache\.mp\..+")


def nearest(written: str, names: dict[str, Key] | None = None) -> str | None:
    """The known key that ``written`` most likely meant."""
    if names is None and written in MISTAKEN:
        return MISTAKEN[written]
    known = [*KEYS, *RENAMED, "local_device", "extra_config"] if names is None else [*names]
    snake = re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", written).replace("-", "_").replace(" ", "_").lower()
    for candidate in (snake, snake.removeprefix("lmcache_"), "lmcache_" + snake):
        if candidate in known:
            return RENAMED.get(candidate, candidate)
    near = difflib.get_close_matches(snake.removeprefix("lmcache_"), known, n=1, cutoff=0.6)
    return RENAMED.get(near[0], near[0]) if near else None
