"""The LMCache file, the ``LMCACHE_*`` variables and vLLM's connector options: one frozen Config.

Precedence, highest first: ``kv_connector_extra_config["lmcache.<key>"]``, the file
(``LMCACHE_CONFIG_FILE``), ``LMCACHE_<KEY>``, the default. KServe's guide and LMCache's own
documentation promise that the file wins over the environment; LMCache's code (since its
#1572) lets the variable win. We keep the promise and note every variable that is shadowed.
``extra_config`` merges by the same rule, key by key.

The environment is read here and nowhere else in this package. What cannot be honoured is a
``ConfigError`` of one line; what has no effect is one of ``Config.notes``, which the caller logs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, SecretStr

from lmcache_ext.config_keys import KEYS, Key
from lmcache_ext.config_merge import read_sources
from lmcache_ext.config_quotas import Quota
from lmcache_ext.config_settle import DEFAULT_HOST_BYTES, settle
from lmcache_ext.config_sources import Origin, shown
from lmcache_ext.config_urls import masked
from lmcache_ext.config_values import in_gib
from lmcache_ext.errors import ConfigError

__all__ = [
    "Config",
    "Controller",
    "Health",
    "Infinistore",
    "Live",
    "Mooncake",
    "Origin",
    "Peer",
    "Remote",
    "load_config",
    "resolve_chunk_tokens",
]

MIN_AUTO_ROW_BYTES = 1024 * 1024  # below it the cost of an object outweighs its bytes
DEFAULT_INSTANCE_ID = "lmcache_default_instance"

Serde = Literal["naive", "cachegen", "fp8", "int8", "kivi", "kivi2", "lossless"]


class Frozen(Mapping[str, Any]):
    """A mapping that cannot be changed, nor what is in it; it pickles."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = {key: _frozen(value) for key, value in items.items()}

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - as many types as there are options
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(masked("", self._items))


def _frozen(value: object) -> object:
    if isinstance(value, Mapping):
        return Frozen(value)
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _thawed(value: object) -> object:
    return {key: _thawed(item) for key, item in value.items()} if isinstance(value, Mapping) else value


FrozenMapping = Annotated[Mapping[str, Any], AfterValidator(Frozen), PlainSerializer(_thawed)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, masked(name or "", value) if isinstance(value, str) else value


class Remote(_Part):
    """How to reach ``remote_url``; what the URL itself says wins."""

    username: str | None = None
    password: SecretStr | None = None
    database: int | None = None
    mode: Literal["standalone", "cluster"] = "standalone"
    tls: bool = False
    ttl_enabled: bool = False
    ttl_s: float | None = None
    num_connections: int = 8
    request_timeout_s: float | None = None  # None: Live.blocking_timeout_s
    connect_timeout_s: float | None = None
    stall_timeout_ms: int | None = None  # of a get; None, and below: the store's own
    min_bytes_per_s: int | None = None
    sentinel_service: str = "redismaster"  # REDIS_SERVICE_NAME, LMCache's name and default
    sentinel_timeout_s: float = 1.0  # REDIS_TIMEOUT


class Mooncake(_Part):
    """How to reach ``mooncakestore://``; None is for the store to choose. What the URL says wins."""

    config_path: str | None = None  # MOONCAKE_CONFIG_PATH: a JSON file, for what is None here
    local_hostname: str | None = None
    metadata_server: str | None = None
    master_server_address: str | None = None
    protocol: str | None = None
    device_name: str | None = None
    global_segment_bytes: int | None = None
    local_buffer_bytes: int | None = None
    transfer_timeout_s: float | None = None
    prefer_local_alloc: bool | None = None
    num_replicas: int | None = None
    ssd_offload_path: str | None = None
    enable_ssd_offload: bool | None = None
    tenant_id: str | None = None
    enable_client_http_server: bool | None = None
    client_http_port: int | None = None


class Infinistore(_Part):
    """How to reach ``infinistore://``; the device is in the URL."""

    link_type: Literal["Ethernet", "IB"] = "Ethernet"
    ib_port: int = 1


class Health(_Part):
    """When a failing store is left alone, and for how long."""

    ping_interval_s: float = 30.0
    failures_before_open: int = 10
    recovery_s: float = 300.0


class Live(_Part):
    """What a running server may change (`lmcache_ext.reload`); a new file that differs elsewhere needs a restart."""

    host_capacity_bytes: int = (
        DEFAULT_HOST_BYTES  # of the whole engine: all ranks share one region (LMCache: of each rank)
    )
    disk_capacity_bytes: int | None = None  # of all disk_paths together; None without any
    remote_url: str | None = None
    remote_serde: Serde = "naive"
    remote: Remote = Remote()
    mooncake: Mooncake = Mooncake()
    infinistore: Infinistore = Infinistore()
    audit_actual_remote_url: str | None = None
    health: Health = Health()
    blocking_timeout_s: float = 10.0
    lookup_timeout_ms: int = 300  # LMCache: 3000
    min_retrieve_tokens: int = 0
    remote_min_uses: int = 1
    promote_on_hit: bool = True
    save_decode_cache: bool = False
    quotas: tuple[Quota, ...] = ()  # by tenant; none: nobody is limited
    freeze: bool = False  # look up and load, store nothing new
    bypass: bool = False  # neither look up nor store
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    extra_config: FrozenMapping = Frozen({})  # as written, options with a typed home included


class Peer(_Part):
    """How other engines read this one's host memory; where `enabled`, host, init_ports and a controller are there."""

    enabled: bool = False
    host: str | None = None
    init_ports: tuple[int, ...] = ()
    lookup_ports: tuple[int, ...] = ()
    transfer_channel: str | None = None


class Controller(_Part):
    """Where this engine tells what its host memory holds. Both URLs are there where `enabled`."""

    enabled: bool = False
    pull_url: str | None = None
    reply_url: str | None = None
    worker_ports: tuple[int, ...] = ()
    worker_ids: tuple[int, ...] = ()
    heartbeat_delay_s: float = 10.0
    heartbeat_s: float | None = None  # None, or more than the controller wants: as it says
    token_file: str | None = None


class Config(_Part):
    """Everything this package was told, typed, with the origin of every setting."""

    chunk_size: int | Literal["auto"] = 256  # tokens; resolve_chunk_tokens makes it vLLM's
    local_cpu: bool = True
    host_kv_dtype: Literal["auto", "fp8"] = "auto"  # of rows in host memory; auto: as the KV cache has it
    cuda_page_copier: Literal["vllm", "kernels"] = "vllm"  # who copies pages on NVIDIA's GPUs; fp8 needs the kernels
    cache_policy: Literal["LRU", "ARC", "LFU", "FIFO", "MRU"] = "LRU"
    disk_paths: tuple[str, ...] = ()
    disk_io_threads: int = 4
    cachegen_key_bins: tuple[float, ...] = (128.0, 48.0, 32.0)  # by layer, the last for all that follow
    cachegen_value_bins: tuple[float, ...] = (64.0, 16.0, 10.0)  # see serde/cachegen.py
    local_disk_serde: Serde = "naive"
    save_unfull_chunk: bool = False  # LMCache 0.3 and older: true
    enable_async_loading: bool = True
    instance_id: str = DEFAULT_INSTANCE_ID
    path: str | None = None  # the LMCache file
    live: Live = Live()
    peer: Peer = Peer()
    controller: Controller = Controller()
    not_needed: FrozenMapping = Frozen({})  # keys of LMCache without effect here
    origins: Annotated[Mapping[str, Origin], AfterValidator(Frozen), PlainSerializer(_thawed)] = Frozen({})
    notes: tuple[str, ...] = ()

    def origin(self, key: str) -> Origin:
        """Where the value of an LMCache key came from."""
        return self.origins.get(key, Origin("default", "default"))

    def describe(self) -> list[tuple[str, str, str]]:
        """(key, value, origin) of every honoured key and of every other key that was written; secrets masked."""
        rows = []
        for key in KEYS.values():
            if key.use == "honoured" or key.name in self.origins:
                rows.append((key.name, self._shown(key), self.origin(key.name).text))
        for name, value in self.live.extra_config.items():
            key_name = f"extra_config.{name}"
            words = in_words(key_name, self.live.quotas) if name == "quotas" else shown(key_name, value)
            rows.append((key_name, words, self.origin(key_name).text))
        return rows

    def _shown(self, key: Key) -> str:
        if key.home is None:
            return shown(key.name, self.not_needed[key.name])
        return in_words(key.name, self.at(key.home))

    def at(self, home: str) -> object:
        """The value in a place such as "live.log_level"."""
        value: object = self
        for name in home.split("."):
            value = getattr(value, name)
        return value


def in_words(key: str, value: object) -> str:
    """A value as a person reads it, secrets masked."""
    if isinstance(value, int) and key in ("max_local_cpu_size", "max_local_disk_size"):
        return in_gib(value)
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ",".join(str(masked(key, item)) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(masked(key, value))


def load_config(
    *,
    path: str | None = None,
    content: str | None = None,
    environ: Mapping[str, str] | None = None,
    connector_extra: Mapping[str, Any] | None = None,
) -> Config:
    """Read every source; see the module's docstring for which wins.

    ``path`` None means the file that ``LMCACHE_CONFIG_FILE`` names, or none. ``content`` is read in place of the
    file (a ConfigMap that is not mounted yet), and ``path`` is then only its name. Raises ``ConfigError``.
    """
    environ = os.environ if environ is None else environ
    path = path or environ.get("LMCACHE_CONFIG_FILE") or None
    draft = read_sources(path, content, environ, connector_extra or {})
    settle(draft, environ)
    return Config(
        **_nested({**draft.values, "live.extra_config": draft.extra}),
        path=path,
        not_needed=draft.not_needed,
        origins={key: setting.origin for key, setting in draft.settings.items()},
        notes=draft.notes(),
    )


def _nested(values: Mapping[str, object]) -> dict[str, Any]:
    """``{"live.remote.tls": x}`` as ``{"live": {"remote": {"tls": x}}}``."""
    result: dict[str, Any] = {}
    for home, value in values.items():
        *parts, name = home.split(".")
        place = result
        for part in parts:
            place = place.setdefault(part, {})
        place[name] = value
    return result


def resolve_chunk_tokens(config: Config, *, block_tokens: int, bytes_per_block: int) -> int:
    """Tokens per chunk, a multiple of vLLM's block.

    ``auto`` takes the fewest blocks whose row (``bytes_per_block`` each, of all ranks and
    layers) is at least 1 MiB. A number that is not a multiple is a ``ConfigError``.
    """
    size = config.chunk_size
    if size == "auto":
        return block_tokens * max(1, -(-MIN_AUTO_ROW_BYTES // bytes_per_block))
    if size % block_tokens == 0:
        return size
    below = size - size % block_tokens
    choice = f"{below} or {below + block_tokens}" if below else str(block_tokens)
    raise ConfigError(
        f"{config.origin('chunk_size').text}: chunk_size: {size} is not a multiple of vLLM's block of "
        f"{block_tokens} tokens: write {choice}, or auto"
    )
