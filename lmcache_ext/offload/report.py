"""What a user reads in the log: that the cache is on, and what a request reused."""

from __future__ import annotations

import time

from vllm.logger import init_logger

from lmcache_ext.config_urls import masked
from lmcache_ext.offload.settings import Settings

logger = init_logger("vllm.lmcache_ext")

_LINES_PER_SECOND = 5


def start_line(settings: Settings, namespace: str | None) -> str:
    """One line that proves the cache is on: tiers, sizes, chunk, namespace."""
    config = settings.config
    chunks = f"{settings.host_bytes // settings.row_bytes} chunks"
    tiers = [f"host memory {_size(settings.host_bytes)} ({chunks}){_as(config.host_kv_dtype)}"]
    if namespace is not None and config.disk_paths:
        capacity = config.live.disk_capacity_bytes
        limit = _size(capacity) if capacity else "unbounded"
        tiers.append(f"disk {','.join(config.disk_paths)} {limit}{_as(config.local_disk_serde)}")
    if namespace is not None and config.peer.enabled:
        tiers.append(f"peers by the controller {config.controller.reply_url}")
    if namespace is not None and config.live.remote_url is not None:
        tiers.append(f"remote {masked('remote_url', config.live.remote_url)}{_as(config.live.remote_serde)}")
    return (
        f"LMCache-compatible KV cache is on: {' -> '.join(tiers)}; chunk {settings.tokens_per_chunk} tokens = "
        f"{_size(settings.row_bytes)}; policy {config.cache_policy}; "
        f"instance {config.instance_id}; namespace {namespace or 'none (host memory only)'}"
    )


def _as(serde: str) -> str:
    return "" if serde in ("naive", "auto") else f" as {serde}"


class HitReport:
    """The per-request line LMCache users look for, at most a few per second."""

    def __init__(self, tokens_per_chunk: int) -> None:
        self._tokens_per_chunk = tokens_per_chunk
        self._second = 0
        self._lines = 0
        self._silent = 0

    def tell(self, req_id: str, total_tokens: int, hit_tokens: int, load_tokens: int) -> None:
        """Log one looked-up request, or count it where there are too many."""
        second = int(time.monotonic())
        if second != self._second:
            if self._silent:
                logger.info("%d more requests were looked up", self._silent)
            self._second, self._lines, self._silent = second, 0, 0
        if self._lines >= _LINES_PER_SECOND:
            self._silent += 1
            return
        self._lines += 1
        logger.info(
            "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d%s",
            req_id,
            total_tokens,
            hit_tokens,
            load_tokens,
            self._why_never(total_tokens),
        )

    def _why_never(self, total_tokens: int) -> str:
        """Of a prompt that no second time will find: why."""
        if total_tokens >= self._tokens_per_chunk:
            return ""
        return f"; a prompt is reused in whole chunks, and this one is shorter than the {self._tokens_per_chunk} of one"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
