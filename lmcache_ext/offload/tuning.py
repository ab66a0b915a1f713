"""A new live part of the configuration reaches the engine, between two of its steps.

The watching thread only hands over. What is cheap is set here, in the thread that schedules; so a step sees the old
configuration or the new one, never both. An engine without requests takes no steps: it applies a change when the
next request comes, before that is looked up. Workers have nothing to change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger

from lmcache_ext.config import Config
from lmcache_ext.config_values import in_gib
from lmcache_ext.errors import ConfigError
from lmcache_ext.offload import metrics
from lmcache_ext.offload.far import Opened
from lmcache_ext.offload.host import HostTier
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.reload import ConfigWatcher, Reload, Status

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

logger = init_logger("vllm.lmcache_ext.offload.tuning")


class Tuning:
    """The live part as the scheduler's connector knows it: `live` is what counts now.

    Threads:  all methods in the connector's thread. Owner: of the watching thread, until `close`.
    Failure:  `load` raising ConfigError is the watcher's to refuse; what `tick` raises is a bug.
    """

    def __init__(self, config: Config, load: Callable[[], Config], scheduler: OffloadingConnectorScheduler) -> None:
        self.live = config.live
        self._scheduler = scheduler
        self._told = Status(config, generation=0)
        self._watcher = ConfigWatcher(config, load, prepare=self._prepare).open()
        self._status = self._watcher.status
        self._set_modes()

    def tick(self) -> bool:
        """Apply what is new; between steps only. Whether there was anything."""
        if not self._watcher.has_news(self._status):
            return False
        status = self._watcher.status
        while (found := self._watcher.take()) is not None:
            self._apply(found)
        self._status = status
        return True

    def count_into(self, stats: OffloadingConnectorStats) -> None:
        """Add what happened since the last call to a step's statistics."""
        for outcome, count in self._watcher.take_counts().items():
            stats.increase_counter(metrics.CONFIG_RELOADS, count, (outcome,))
        now, told = self._status, self._told
        if (now.generation, now.digest) != (told.generation, told.digest):
            self._told = now
            stats.set_gauge(metrics.CONFIG_GENERATION, now.generation)
            stats.set_gauge(metrics.CONFIG_DIGEST, int(now.digest or "0", 16))
            host = self._manager.host
            stats.set_gauge(metrics.TIER_CAPACITY_BYTES, host.limit * host.row_bytes, ("host",))

    def close(self) -> None:
        """Stop watching, and close what was opened for a change that comes too late; may be called twice."""
        self._watcher.close()
        while (found := self._watcher.take()) is not None:
            if found.prepared is not None:
                found.prepared[0].close()

    @property
    def _manager(self) -> BoundedTieringManager:
        assert isinstance(self._scheduler.manager, BoundedTieringManager)
        return self._scheduler.manager

    def _prepare(self, before: Config, after: Config) -> Opened | None:
        """In the watching thread."""
        manager = self._manager
        _num_rows(after, manager.host)
        return manager.far.prepare(before, after) if manager.far is not None else None

    def _apply(self, found: Reload) -> None:
        before, self.live = self.live, found.after.live
        manager = self._manager
        self._set_modes()
        if self.live.host_capacity_bytes != before.host_capacity_bytes:
            manager.set_num_rows(_num_rows(found.after, manager.host))
            _warn_of_too_much(found.after, manager.host)
        manager.change_far(found.before, found.after, found.prepared)
        logger.info("%s", found)
        for note in found.after.notes:
            if note not in found.before.notes:
                logger.info("%s", note)

    def _set_modes(self) -> None:
        scheduler, manager = self._scheduler, self._manager
        manager.frozen = self.live.freeze or self.live.bypass
        manager.host.set_quotas(self.live.quotas)
        prompt_only = not self.live.save_decode_cache
        if scheduler.config.offload_prompt_only != prompt_only:
            scheduler.config = scheduler.config._replace(offload_prompt_only=prompt_only)


def _num_rows(config: Config, host: HostTier) -> int:
    """How many rows the configured capacity allows, at most those that are reserved; ConfigError where it is none."""
    capacity_bytes, row_bytes = config.live.host_capacity_bytes, host.row_bytes
    if not capacity_bytes and not config.local_cpu:
        return host.num_reserved
    if capacity_bytes < row_bytes:
        raise ConfigError(
            f"{config.origin('max_local_cpu_size').text}: max_local_cpu_size: {in_gib(capacity_bytes)} holds no chunk, "
            f"which takes {row_bytes} bytes: write at least that"
        )
    return min(capacity_bytes // row_bytes, host.num_reserved)


def _warn_of_too_much(config: Config, host: HostTier) -> None:
    capacity_bytes, reserved_bytes = config.live.host_capacity_bytes, host.num_reserved * host.row_bytes
    if capacity_bytes >= reserved_bytes + host.row_bytes:
        logger.warning(
            "max_local_cpu_size: %s from %s: %s were reserved at the start, and all of that is used; restart for more",
            in_gib(capacity_bytes),
            config.origin("max_local_cpu_size").text,
            in_gib(reserved_bytes),
        )
