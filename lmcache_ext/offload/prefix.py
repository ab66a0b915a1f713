"""A whole prompt looked up at once, instead of chunk by chunk.

vLLM's scheduler asks its manager for one chunk after another, and each way there takes microseconds. Where a group
needs a prefix (full attention) all of its chunks are known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.base import OffloadKey, ReqContext

from lmcache_ext.offload.manager import BoundedTieringManager

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
        GroupOffloadConfig,
        OffloadingConnectorScheduler,
    )
    from vllm.v1.request import Request


class PrefixLookup:
    """Stands in for the `_maximal_prefix_lookup` of one scheduler, and runs in its thread."""

    def __init__(self, scheduler: OffloadingConnectorScheduler) -> None:
        assert isinstance(scheduler.manager, BoundedTieringManager)
        self._manager = scheduler.manager
        self._events = scheduler._events_tracker

    def __call__(
        self,
        keys: Iterable[OffloadKey],
        req_context: ReqContext,
        req: Request,
        group_config: GroupOffloadConfig,
        start_chunk_idx: int,
    ) -> int | None:
        """How many chunks from the first on can be loaded; None while that is not known."""
        wanted = list(keys)
        found = self._manager.lookup_prefix(wanted, req_context)
        if found and self._events.self_describing_enabled:
            for index, key in enumerate(wanted[:found], start_chunk_idx):
                self._events.record_lookup(req, group_config, index, key)
        return found
