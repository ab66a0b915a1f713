"""What the two halves of a connector tell each other, once a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)


@dataclass
class LMCacheConnectorMetadata(OffloadingConnectorMetadata):
    """Scheduler to workers, each step."""

    failed_loads: set[str] = field(default_factory=set)
    """Requests waiting for a load that will not come: every worker reports it as failed."""
    idle: bool = False
    """Nothing is computed in this step."""

    @override
    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        """`NOTHING_TO_DO` travels as its name: most steps send it, to every worker."""
        return "NOTHING_TO_DO" if self is NOTHING_TO_DO else super().__reduce_ex__(protocol)


NOTHING_TO_DO = LMCacheConnectorMetadata({}, {})
"""Of a step that computes, and in which workers load, store and report nothing new. Nobody changes it."""


@dataclass
class LMCacheWorkerMetadata(OffloadingWorkerMetadata):
    """Workers to scheduler, each step."""

    failed_jobs: set[int] = field(default_factory=set)
    """Completed jobs whose bytes were not copied."""

    @override
    def aggregate(self, other: KVConnectorWorkerMetadata) -> LMCacheWorkerMetadata:
        merged = super().aggregate(other)
        assert isinstance(merged, OffloadingWorkerMetadata)
        failed = self.failed_jobs | getattr(other, "failed_jobs", set())
        return LMCacheWorkerMetadata(merged.completed_jobs, merged.transfer_stats, failed)
