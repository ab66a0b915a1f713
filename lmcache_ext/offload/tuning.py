"""A new live part of the configuration reaches the engine, between two of its steps.

The watching thread only hands over. What is cheap is set here, in the thread that schedules (or, in a
worker, that executes); so a step sees the old configuration or the new one, never both. An engine without
requests takes no steps: it applies a change when the next request comes, before that is looked up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger

from lmcache_ext.config import Config
from lmcache_ext.offload import metrics
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.reload import ConfigWatcher, Reload, Status

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler

logger = init_logger("vllm.lmcache_ext.offload.tuning")


def set_log_level(config: Config) -> None:
    """Of everything under ``vllm.lmcache_ext``; that of vLLM's own loggers where none is written."""
    written = config.origin("log_level").kind != "default"
    logging.getLogger("vllm.lmcache_ext").setLevel(config.live.log_level if written else logging.NOTSET)


class Tuning:
    """The live part as one connector knows it: `live` is what counts now.

    Threads:  all methods in the connector's thread. Owner: of the watching thread, until `close`.
    Failure:  `load` raising ConfigError is the watcher's to refuse; what `tick` raises is a bug.

    `scheduler` is None in a worker, which has nothing to change but how much it logs.
    """

    def __init__(
        self, config: Config, load: Callable[[], Config], *, scheduler: OffloadingConnectorScheduler | None
    ) -> None:
        self.live = config.live
        self._scheduler = scheduler
        self._told = Status(config, generation=0)
        self._watcher = ConfigWatcher(config, load, quiet=scheduler is None).open()
        self._status = self._watcher.status
        self._set_modes()

    def tick(self) -> None:
        """Apply what is new; between steps only."""
        status = self._watcher.status
        while (found := self._watcher.take()) is not None:
            self._apply(found)
        self._status = status

    def count_into(self, stats: OffloadingConnectorStats) -> None:
        """Add what happened since the last call to a step's statistics."""
        for outcome, count in self._watcher.take_counts().items():
            stats.increase_counter(metrics.CONFIG_RELOADS, count, (outcome,))
        now, told = self._status, self._told
        if (now.generation, now.digest) != (told.generation, told.digest):
            self._told = now
            stats.set_gauge(metrics.CONFIG_GENERATION, now.generation)
            stats.set_gauge(metrics.CONFIG_DIGEST, int(now.digest or "0", 16))

    def close(self) -> None:
        """Stop watching; may be called twice."""
        self._watcher.close()

    def _apply(self, found: Reload) -> None:
        before, self.live = self.live, found.after.live
        if self.live.log_level != before.log_level:
            set_log_level(found.after)
        if self._scheduler is None:
            return
        self._set_modes()
        logger.info("%s", found)
        for note in found.after.notes:
            if note not in found.before.notes:
                logger.info("%s", note)

    def _set_modes(self) -> None:
        scheduler = self._scheduler
        if scheduler is None:
            return
        assert isinstance(scheduler.manager, BoundedTieringManager)
        scheduler.manager.frozen = self.live.freeze or self.live.bypass
        prompt_only = not self.live.save_decode_cache
        if scheduler.config.offload_prompt_only != prompt_only:
            scheduler.config = scheduler.config._replace(offload_prompt_only=prompt_only)
