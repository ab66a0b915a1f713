"""What the store behind a URL is told of the configuration, by the store's own names."""

from __future__ import annotations

from typing import Any

from lmcache_ext.config import Config
from lmcache_ext.config_urls import plugin_schemes, split_url
from lmcache_ext.stores.redis_options import remote_options

_LM_OPTIONS = ("token", "token_file", "tls_ca", "tls_cert", "tls_key")  # of extra_config, for lm://


def store_options(url: str, config: Config) -> dict[str, Any]:
    """The options for `open_store(url)`; a store of another party gets what is written as ``<scheme>.<option>``."""
    scheme, live = split_url(url).scheme, config.live
    deadlines = {"request_timeout_s": live.blocking_timeout_s, "lookup_timeout_s": live.lookup_timeout_ms / 1000}
    if scheme in ("file", "fs"):
        return {"name": "remote"}  # a second directory, told from local_disk in metrics
    if scheme == "mooncakestore":
        return deadlines | _pace(config) | live.mooncake.model_dump(exclude_none=True)
    if scheme == "infinistore":
        return deadlines | live.infinistore.model_dump()
    if scheme == "audit":
        actual = live.audit_actual_remote_url
        return {"actual_url": actual, "actual_options": store_options(actual, config) if actual else {}}
    if scheme in ("mock", "blackhole"):
        return deadlines
    if scheme in plugin_schemes():
        written = live.extra_config.items()
        return deadlines | {name.partition(".")[2]: value for name, value in written if name.startswith(scheme + ".")}
    return deadlines | _resp_and_lm(config)


def _resp_and_lm(config: Config) -> dict[str, Any]:
    extra = config.live.extra_config
    options = _pace(config) | remote_options(config.live.remote.model_dump(), extra)
    if not options.get("tls"):
        options.pop("tls", None)  # not said is not refused: certificates may ask for it
    return options | {name: value for name, value in extra.items() if name in _LM_OPTIONS or name.startswith("lm_")}


def _pace(config: Config) -> dict[str, float]:
    """How long a backend may stop in the middle of a fetch, where that was written."""
    stall_ms = config.live.remote.stall_timeout_ms
    return {} if stall_ms is None else {"stall_timeout_s": stall_ms / 1000}
