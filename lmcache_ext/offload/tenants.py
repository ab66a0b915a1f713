"""Whose chunks are in host memory, and how many rows each tenant may have of it.

A chunk's key has the salt of its prompt in it, so every chunk has one owner for as long as it lives. Rows of
tenants with a salt are counted always: a quota that is set in a running server counts what is there already.
Rows without a salt are counted while there are quotas. So an engine with neither does no work here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadKey, ReqContext

from lmcache_ext.config_quotas import OTHERS, UNSALTED, Quota, tenant_of_salt
from lmcache_ext.offload import metrics
from lmcache_ext.offload.recent import Recent

TENANT_PARAM = "lmcache_ext.tenant"
"""Key in a request's ``kv_transfer_params``: hex SHA-256 of its salt; absent without one."""

_TIER = "host"


def label_tenant(request: Any) -> bool:  # noqa: ANN401  vLLM's Request
    """Put the request's tenant where the tiers look for it, whatever a client sent."""
    params = request.kv_transfer_params
    if request.cache_salt:
        request.kv_transfer_params = {**(params or {}), TENANT_PARAM: tenant_of_salt(request.cache_salt)}
    elif params:
        params.pop(TENANT_PARAM, None)
    return True


def tenant_of(req_context: ReqContext) -> str:
    """Whose request it is."""
    params = req_context.kv_transfer_params
    return params.get(TENANT_PARAM, UNSALTED) if params else UNSALTED


class Tenants:
    """The owner of every row, and the limits. One thread.

    `over` are tenants that hold more than they may, since a limit was lowered.
    """

    def __init__(self) -> None:
        self.over: set[str] = set()
        self.lost: Recent | None = None
        """Where somebody wants to know, the keys that quotas have cost lately."""
        self._owners: dict[OffloadKey, str] = {}
        self._held: dict[str, dict[OffloadKey, None]] = {}  # in the order of insertion
        self._quotas: dict[str, Quota] = {}
        self._row_bytes = 1
        self._gone: set[str] = set()
        self._evicted: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    # -- limits ----------------------------------------------------------------------------------

    def set_quotas(self, quotas: Sequence[Quota], row_bytes: int, resident: Iterable[OffloadKey]) -> None:
        """From now on these count; `resident` are the keys of all rows, for those that were not counted so far."""
        before = {quota.name for quota in self._quotas.values()}
        self._quotas = {quota.tenant: quota for quota in quotas}
        self._row_bytes = row_bytes
        names = {quota.name for quota in quotas}
        self._gone = (self._gone | before) - names
        if quotas:
            self.charge(UNSALTED, [key for key in resident if key not in self._owners])
        else:
            self.discharge(list(self._held.get(UNSALTED, ())))
        self.over = {tenant for tenant in self._held if self.excess(tenant) > 0}

    def quota(self, tenant: str) -> Quota | None:
        """What limits it."""
        return self._quotas.get(tenant) or self._quotas.get(OTHERS)

    def limit(self, tenant: str) -> int | None:
        """How many rows it may hold; None where nothing limits it."""
        quota = self.quota(tenant)
        return None if quota is None else quota.host_bytes // self._row_bytes

    def excess(self, tenant: str) -> int:
        """How many rows it holds more than it may."""
        limit = self.limit(tenant)
        return 0 if limit is None else max(0, self.num_held(tenant) - limit)

    # -- rows ------------------------------------------------------------------------------------

    def num_held(self, tenant: str) -> int:
        return len(self._held.get(tenant, ()))

    def held(self, tenant: str) -> Collection[OffloadKey]:
        """The keys of its rows."""
        return self._held.get(tenant, {}).keys()

    def counts(self, tenant: str) -> bool:
        """Whether rows of this tenant are counted at all."""
        return bool(self._quotas) or tenant != UNSALTED

    def charge(self, tenant: str, keys: Sequence[OffloadKey]) -> None:
        """These rows are its own now."""
        if not keys:
            return
        self._owners.update(dict.fromkeys(keys, tenant))
        self._held.setdefault(tenant, {}).update(dict.fromkeys(keys))
        if self.lost is not None:
            self.lost.discard(keys)

    def discharge(self, keys: Iterable[OffloadKey]) -> None:
        """These rows are free again, or whose they are is not asked any more."""
        if not self._owners:
            return
        for key in keys:
            tenant = self._owners.pop(key, None)
            if tenant is None:
                continue
            held = self._held[tenant]
            del held[key]
            if not held:
                del self._held[tenant]

    def clear(self) -> None:
        """No row holds anything."""
        self._owners.clear()
        self._held.clear()
        self.over.clear()

    # -- statistics ------------------------------------------------------------------------------

    def count_evicted(self, tenant: str, keys: Collection[OffloadKey]) -> None:
        """Chunks that left because their owner had too many."""
        self._count(self._evicted, tenant, keys)

    def count_rejected(self, tenant: str, keys: Collection[OffloadKey]) -> None:
        """Chunks that were not taken in because their owner had too many."""
        self._count(self._rejected, tenant, keys)

    def _count(self, counts: Counter[str], tenant: str, keys: Collection[OffloadKey]) -> None:
        if (quota := self.quota(tenant)) is not None:
            counts[quota.name] += len(keys)
        if self.lost is not None:
            self.lost.add(keys)

    def count_into(self, stats: OffloadingConnectorStats) -> None:
        """Add what happened since the last call, and what is held now."""
        for counts, metric in (
            (self._evicted, metrics.TENANT_EVICTED_CHUNKS),
            (self._rejected, metrics.TENANT_REJECTED_CHUNKS),
        ):
            for name, count in counts.items():
                stats.increase_counter(metric, count, (_TIER, name))
            counts.clear()
        for name in self._gone:  # a series cannot be taken back
            self._gauge(stats, name, float("inf"), 0)
        self._gone.clear()
        named = sum(self.num_held(tenant) for tenant in self._quotas)
        for tenant, quota in self._quotas.items():
            rows = len(self._owners) - named if tenant == OTHERS else self.num_held(tenant)
            self._gauge(stats, quota.name, quota.host_bytes, rows * self._row_bytes)

    def _gauge(self, stats: OffloadingConnectorStats, name: str, quota_bytes: float, charged_bytes: int) -> None:
        stats.set_gauge(metrics.TENANT_QUOTA_BYTES, quota_bytes, (_TIER, name))
        stats.set_gauge(metrics.TENANT_CHARGED_BYTES, charged_bytes, (_TIER, name))
