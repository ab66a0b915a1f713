"""The tiers behind host memory: opened from the configuration, and changed with it while the engine runs.

Disk comes first, then the host memory of peers, then the remote store. A remote store that appears later takes
the last place; one that goes leaves its place empty, for the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.logger import init_logger

from lmcache_ext.config import Config
from lmcache_ext.errors import ConfigError, StoreError
from lmcache_ext.offload.serdes import loss
from lmcache_ext.offload.tier import StoredTier, TierLimits
from lmcache_ext.serde.base import Serde
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.controller import door
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.guard import Guarded
from lmcache_ext.stores.jobs import JobPool
from lmcache_ext.stores.options import store_options
from lmcache_ext.stores.peer import PeerStore
from lmcache_ext.stores.registry import open_store

logger = init_logger("vllm.lmcache_ext.offload.far")

_PENDING_STORE_FRACTION = 0.5  # of all usable rows may wait to be written to one tier

Opened = tuple[Guarded, Serde]


class FarTiers:
    """The far tiers of one engine.

    Threads:  `prepare` in the thread that watches the configuration, everything else in the scheduler's.
    Order:    what `prepare` returned goes to the `change` of the same pair of configurations.
    Owner:    `make_tier` gives a tier its rows, pool and namespace; the tiers own their stores.
    Failure:  a store that cannot be opened is a ConfigError, and nothing has changed.

    `rows` is registered with every store before its first use. `serde_of` opens a serde by its name and where that
    was written; it raises ConfigError.
    """

    def __init__(
        self,
        config: Config,
        rows: memoryview,
        *,
        serde_of: Callable[[str, str], Serde],
        num_rows: int,
        flush_timeout_s: float,
        make_tier: Callable[[Guarded, Serde, TierLimits], StoredTier],
        pool: JobPool,
        worker: int = 0,
    ) -> None:
        """`worker` is this engine's number among those of its instance."""
        self._rows = rows
        self._serde_of = serde_of
        self._flush_timeout_s = flush_timeout_s
        self._make_tier = make_tier
        self.pool = pool
        """Where the work of all tiers runs."""
        limits = self._limits(config, num_rows)
        self._disk_store: DiskStore | None = None
        self._disk: StoredTier | None = None
        self._remote: StoredTier | None = None
        if (disk := open_disk(config, serde_of)) is not None:
            self._disk_store, serde = disk
            self._disk_store.register(rows)
            self._disk = make_tier(guarded(self._disk_store, config), serde, limits)
        self._peer = None if (peer := open_peer(config, worker)) is None else self._tier_of(peer, config, num_rows)
        if (opened := self._open_remote(config)) is not None:
            self._remote = make_tier(*opened, self._remote_limits(config, num_rows))

    @property
    def tiers(self) -> list[StoredTier]:
        """Nearest first; an empty place counts."""
        return [tier for tier in (self._disk, self._peer, self._remote) if tier is not None]

    def prepare(self, before: Config, after: Config) -> Opened | None:
        """Open the remote store of `after` where it is another one, and give the disk its new limit.

        Raises ConfigError. The disk evicts down to a lower limit at once, which may take long.
        """
        if loss(before) != loss(after):
            raise ConfigError(
                f"{_origin(after, 'remote_serde')}: {after.live.remote_serde}: a remote store with another loss, or "
                "with none where there was one, needs a restart: chunks of this engine are kept apart by their loss"
            )
        opened = self._open_remote(after) if _remote(before) != _remote(after) else None
        capacity_bytes = after.live.disk_capacity_bytes
        if self._disk_store is not None and before.live.disk_capacity_bytes != capacity_bytes:
            try:
                self._disk_store.set_capacity(capacity_bytes)
            except StoreError as error:
                logger.warning("max_local_disk_size: the new limit counts, but eviction down to it failed: %s", error)
        return opened

    def change(self, before: Config, after: Config, opened: Opened | None, num_rows: int) -> StoredTier | None:
        """Bring `after` into effect between two steps; returns a tier that is new, to be put behind the others."""
        new = None
        if _remote(before) != _remote(after):
            new = self._put_remote(opened, self._remote_limits(after, num_rows))
        for tier in self.tiers:
            limits = {self._remote: self._remote_limits, self._peer: self._peer_limits}.get(tier, self._limits)
            tier.limits = limits(after, num_rows)
            tier.store.follow(guarded(tier.store, after))
        return new

    def _put_remote(self, opened: Opened | None, limits: TierLimits) -> StoredTier | None:
        if self._remote is not None:
            self._remote.replace(*(opened or (None, None)))
        elif opened is not None:
            self._remote = self._make_tier(*opened, limits)
            return self._remote
        return None

    def _open_remote(self, config: Config) -> Opened | None:
        if (opened := open_remote(config, self._serde_of)) is None:
            return None
        store, serde = opened
        store.register(self._rows)
        return guarded(store, config), serde

    def _tier_of(self, peer: PeerStore, config: Config, num_rows: int) -> StoredTier:
        return self._make_tier(guarded(peer, config), NaiveSerde(), self._peer_limits(config, num_rows))

    def _peer_limits(self, config: Config, num_rows: int) -> TierLimits:
        return replace(self._limits(config, num_rows), keeps_promoted=False, takes_chunks=False)

    def _limits(self, config: Config, num_rows: int) -> TierLimits:
        return TierLimits(
            lookup_timeout_s=config.live.lookup_timeout_ms / 1000,
            fetch_timeout_s=config.live.blocking_timeout_s,
            flush_timeout_s=self._flush_timeout_s,
            max_pending_stores=max(1, int(num_rows * _PENDING_STORE_FRACTION)),
            keeps_promoted=config.live.promote_on_hit,
        )

    def _remote_limits(self, config: Config, num_rows: int) -> TierLimits:
        return replace(self._limits(config, num_rows), min_uses=config.live.remote_min_uses)


def open_disk(config: Config, serde_of: Callable[[str, str], Serde]) -> tuple[DiskStore, Serde] | None:
    """The store of ``local_disk`` and how chunks are written to it; None without one. Raises ConfigError."""
    if not config.disk_paths:
        return None
    serde = serde_of(config.local_disk_serde, _origin(config, "local_disk_serde"))
    return DiskStore(config.disk_paths, config.live.disk_capacity_bytes), serde


def open_peer(config: Config, worker: int) -> PeerStore | None:
    """The host memory of other engines; None where peers are not asked."""
    if not config.peer.enabled or config.controller.reply_url is None:
        return None
    return PeerStore(
        door(config.controller.reply_url, config.controller.token_file),
        instance=config.instance_id,
        worker=of_rank(config.controller.worker_ids, worker, worker),
        lookup_timeout_s=config.live.lookup_timeout_ms / 1000,
        timeout_s=config.live.blocking_timeout_s,
    )


def of_rank(numbers: Sequence[int], rank: int, default: int) -> int:
    """What a list of the configuration has for this engine."""
    return numbers[rank] if rank < len(numbers) else default


def open_remote(config: Config, serde_of: Callable[[str, str], Serde]) -> tuple[Store, Serde] | None:
    """The store behind ``remote_url`` and how chunks are written to it; None without one. Raises ConfigError."""
    url = config.live.remote_url
    if url is None:
        return None
    serde = serde_of(config.live.remote_serde, _origin(config, "remote_serde"))
    return open_store(url, options=store_options(url, config)), serde


def _remote(config: Config) -> tuple[object, ...] | None:
    """All that a remote store is opened with; where it differs, the store is another one."""
    url = config.live.remote_url
    return None if url is None else (url, store_options(url, config), config.live.remote_serde)


def _origin(config: Config, key: str) -> str:
    return f"{config.origin(key).text}: {key}"


def num_threads(config: Config) -> int:
    """As asked for, or one per core up to eight."""
    if config.origin("extra_config.disk_io_threads").kind != "default":
        return config.disk_io_threads
    return min(8, os.cpu_count() or 1)


def guarded(store: Store, config: Config) -> Guarded:
    """The breaker around a store; LMCache's health settings replace its own where they were written."""
    health = config.live.health
    written = {
        "failures_to_open": ("get_blocking_failed_threshold", health.failures_before_open),
        "probe_interval_s": ("ping_interval", health.ping_interval_s),
        "max_probe_interval_s": ("waiting_time_for_recovery", health.recovery_s),
    }
    options: dict[str, Any] = {
        name: value for name, (key, value) in written.items() if config.origin(f"extra_config.{key}").kind != "default"
    }
    lookup_deadline_s = config.live.lookup_timeout_ms / 1000
    return Guarded(store, deadline_s=config.live.blocking_timeout_s, lookup_deadline_s=lookup_deadline_s, **options)
