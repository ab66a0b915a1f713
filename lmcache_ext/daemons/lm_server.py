"""The cache server as an object: its connections, its clock, its numbers."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import Counter
from typing import Any

from lmcache_ext.daemons.lm_cache import Cache
from lmcache_ext.daemons.lm_connection import SCRATCH_BYTES, Connection, Limits
from lmcache_ext.daemons.lm_dialects import OldDialect
from lmcache_ext.daemons.lm_http import prometheus
from lmcache_ext.stores.tokens import Token

logger = logging.getLogger("lmcache_ext.daemons.lmserver")

SWEEP_S = 0.5
POLL_S = 0.02


class Server:
    """Everything the connections share.

    Threads:  the event loop's.
    Order:    none between connections.
    Owner:    of the cache and the connections; `stop` closes both.
    Failure:  a connection that is overdue or one too many is aborted, and counted by cause.
    """

    def __init__(self, cache: Cache, limits: Limits, *, max_connections: int, token_file: str | None = None) -> None:
        self.cache = cache
        self.limits = limits
        self.counters: Counter[str] = Counter()
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self.is_stopping = False
        self._max_connections = max_connections
        self.token = Token(token_file)
        self.token.check()
        self._connections: set[Connection] = set()
        self._listeners: list[asyncio.Server] = []
        self._sweeper: asyncio.Task[None] | None = None
        self._started_at = time.monotonic()

    async def listen(self, sock: Any, tls: ssl.SSLContext | None) -> None:  # noqa: ANN401
        """Serve a bound socket."""
        loop = asyncio.get_running_loop()
        timeout_s = min(self.limits.read_timeout_s, 60.0) if tls is not None else None
        server = await loop.create_server(
            lambda: Connection(self, OldDialect), sock=sock, ssl=tls, ssl_handshake_timeout=timeout_s, backlog=1024
        )
        self._listeners.append(server)
        if self._sweeper is None:
            self._sweeper = loop.create_task(self._sweep())

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, let requests under way end within `grace_s`, close everything."""
        self.is_stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.finish()
        deadline = time.monotonic() + grace_s
        while self._connections and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.cache.close()

    # -- what connections ask

    def admits(self, connection: Connection) -> bool:
        if self.is_stopping or len(self._connections) >= self._max_connections:
            self.counters["connections_refused"] += 1
            return False
        self._connections.add(connection)
        self.counters["connections"] += 1
        return True

    def dropped(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def stats(self) -> dict[str, Any]:
        """What STATS answers."""
        memory, disk = self.cache.memory, self.cache.disk
        return {
            "used_bytes": memory.stored_bytes,
            "charged_bytes": memory.charged_bytes,
            "capacity_bytes": memory.capacity_bytes,
            "num_objects": len(memory),
            "num_connections": len(self._connections),
            "uptime_s": round(time.monotonic() - self._started_at, 3),
            "has_data_dir": disk is not None,
            "policy": memory.policy_name,
            **{name: self.counters[name] for name in sorted(self.counters)},
        }

    # -- what people ask

    def healthz(self) -> tuple[int, str]:
        """503 once the server stops, so that a Service sends it nobody new."""
        return (503, "stopping\n") if self.is_stopping else (200, "ok\n")

    def metrics(self) -> tuple[int, str]:
        """All numbers in Prometheus' text format."""
        memory = self.cache.memory
        counts, disk = self.counters, self.cache.counters
        outcomes = [
            name for name in counts if name.startswith(("put.", "get.")) or name in ("exists", "delete", "list")
        ]
        requests = {_labels(*name.partition(".")[::2]): float(counts[name]) for name in sorted(outcomes)}
        gauges = {
            "used_bytes": ("memory of stored objects", memory.stored_bytes),
            "charged_bytes": ("memory of stored, arriving and leaving objects", memory.charged_bytes),
            "capacity_bytes": ("the limit of charged_bytes", memory.capacity_bytes),
            "objects": ("objects in memory", len(memory)),
            "connections": ("open connections", len(self._connections)),
            "uptime_seconds": ("since the start", time.monotonic() - self._started_at),
        }
        totals = {
            "received_bytes": ("read from clients", counts["received_bytes"]),
            "sent_bytes": ("bodies and heads of objects sent", counts["sent_bytes"]),
            "evicted_objects": ("made room for others", memory.counters.num_evicted),
            "evicted_bytes": ("made room for others", memory.counters.evicted_bytes),
            "refused_objects": ("no room could be made", memory.counters.num_refused),
            "accepted_connections": ("since the start", counts["connections"]),
            "refused_connections": ("over --max-connections", counts["connections_refused"]),
            "malformed_requests": ("connection closed", counts["malformed"]),
            "truncated_requests": ("connection lost inside a body", counts["truncated"]),
            "unauthorized_requests": ("no token, or a wrong one", counts["unauthorized"]),
            "timeouts": ("connection aborted by a time limit", counts["timeouts"]),
            **{name: ("operations of the data directory", disk[name]) for name in sorted(disk)},
        }
        families: dict[str, tuple[str, str, dict[str, float]]] = {
            "lmcache_server_requests_total": ("counter", "Requests by operation and outcome", requests),
            **{f"lmcache_server_{name}": ("gauge", text, {"": float(n)}) for name, (text, n) in gauges.items()},
            **{f"lmcache_server_{name}_total": ("counter", text, {"": float(n)}) for name, (text, n) in totals.items()},
        }
        return 200, prometheus(families)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            for connection in list(self._connections):
                overdue = connection.check(now)
                if overdue is not None:
                    logger.info("%s: closed: %s", connection.peer, overdue)
                    self.counters["idle_closed" if overdue == "idle" else "timeouts"] += 1
                    connection.abort()


def _labels(operation: str, outcome: str) -> str:
    return f'{{operation="{operation}",outcome="{outcome or "ok"}"}}'
