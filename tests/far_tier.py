"""A remote tier for tests, whole: StoredTier, breaker, store, a proxy that can be told to fail, and a real server."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

from lmcache_ext.offload.tier import StoredTier, TierLimits
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.guard import Guarded
from lmcache_ext.stores.jobs import JobPool
from lmcache_ext.stores.registry import open_store
from tests import servers
from tests.faulty_proxy import Fault, Proxy
from tests.servers import until
from tests.stopwatch import Stopwatch

NAMESPACE = bytes(range(16))
NUM_ROWS, ROW_BYTES = 16, 64 * 1024
LOOKUP_S, FETCH_S = 0.15, 0.2
SLACK_S = 0.25  # a busy machine
FAILURES = 2
SMALL = 512  # questions and answers of lookups are smaller, rows are larger
KEYS = itertools.count(1)
STEP = ScheduleEndContext(new_req_ids=(), preempted_req_ids=())


@dataclass
class Backend:
    """Servers, a proxy before each, and the URL through the proxies."""

    url: str
    proxies: Sequence[Proxy]
    nodes: Sequence[servers.Server]

    def behave(self, fault: Fault | None = None) -> None:
        for proxy in self.proxies:
            proxy.behave(fault or Fault("none"))


def plain(kind: str, directory: Path, stack: ExitStack) -> Backend:
    server = stack.enter_context(servers.server(kind, directory))
    proxy = behind_proxy(server, stack)
    return Backend(f"{kind}://{proxy.address}", [proxy], [server])


def sentinel(directory: Path, stack: ExitStack) -> Backend:
    """The sentinel watches the proxy and so names it."""
    server = stack.enter_context(servers.server("redis", directory))
    proxy = behind_proxy(server, stack)
    (watch,) = stack.enter_context(servers.sentinels("redis", directory, proxy))
    return Backend(f"redis-sentinel://{watch.address}", [proxy], [server])


def cluster(directory: Path, stack: ExitStack) -> Backend:
    """Two nodes that tell everybody the ports of their proxies."""
    nodes = stack.enter_context(servers.cluster("redis", directory, 2))
    proxies = [behind_proxy(node, stack) for node in nodes]
    for node, proxy in zip(nodes, proxies, strict=True):
        servers.command(node.port, "CONFIG", "SET", "cluster-announce-bus-port", node.port + 10000)
        servers.command(node.port, "CONFIG", "SET", "cluster-announce-port", proxy.port)
    for node in nodes:
        ports = [str(proxy.port).encode() for proxy in proxies]
        until(lambda n=node, p=ports: all(x in servers.command(n.port, "CLUSTER", "SLOTS") for x in p), "announced")
    return Backend(f"redis-cluster://{proxies[0].address}", proxies, nodes)


def lm(directory: Path, stack: ExitStack, *options: str) -> Backend:
    port = servers.free_port()
    command = ["-m", "lmcache_ext.daemons.lmserver", "127.0.0.1", str(port), *options]
    server = servers.Server(sys.executable, directory, *command, port=port)
    stack.callback(server.kill)
    server.start()
    proxy = behind_proxy(server, stack)
    return Backend(f"lm://{proxy.address}", [proxy], [server])


def behind_proxy(server: servers.Server, stack: ExitStack) -> Proxy:
    proxy = Proxy(server.port)
    stack.callback(proxy.close)
    return proxy


STARTERS: dict[str, Callable[[Path, ExitStack], Backend]] = {
    "redis": lambda directory, stack: plain("redis", directory, stack),
    "valkey": lambda directory, stack: plain("valkey", directory, stack),
    "redis-sentinel": sentinel,
    "redis-cluster": cluster,
    "lm": lm,
}


class Bench:
    """A tier with everything below it, down to the proxy."""

    def __init__(self, backend: Backend, **options: object) -> None:
        timeouts = {"request_timeout_s": FETCH_S, "lookup_timeout_s": LOOKUP_S}
        self.backend = backend
        self.store = open_store(backend.url, options={**timeouts, **options})
        self.guarded = Guarded(
            self.store,
            deadline_s=FETCH_S,
            lookup_deadline_s=LOOKUP_S + SLACK_S,
            failures_to_open=FAILURES,
            probe_interval_s=0.05,
            max_probe_interval_s=0.2,
        )
        self.rows = np.zeros((NUM_ROWS, ROW_BYTES), dtype=np.int8)
        self.pool = JobPool(2, max_queued=64)
        limits = TierLimits(
            lookup_timeout_s=LOOKUP_S, fetch_timeout_s=FETCH_S, flush_timeout_s=10, max_pending_stores=8
        )
        self.tier = StoredTier(
            None,  # type: ignore[arg-type] - the framework's spec; only its statistics would need it
            memoryview(self.rows),
            store=self.guarded,
            serde=NaiveSerde(),
            namespace=NAMESPACE,
            pool=self.pool,
            limits=limits,
        )
        self._ids = itertools.count(1)
        self._requests = itertools.count(1)
        self._counts: dict[str, Counter[str]] = {}

    def store_chunk(self, key: OffloadKey, row: int = 0) -> JobResult:
        """Write the content that belongs to the key from a row. The step is not held up."""
        self.rows[row] = content(key)
        return self._job(key, row, load=False)

    def load_chunk(self, key: OffloadKey, row: int = 1) -> bool:
        """Fetch into a row; whether it is there. Asserts that it is right then."""
        self.rows[row] = 0
        watch = Stopwatch()
        result = self._job(key, row, load=True)
        assert watch.took_s() < FETCH_S + SLACK_S
        if result.success:
            assert (self.rows[row] == content(key)).all(), "a wrong row was handed out as good"
        return result.success

    def look(self, key: OffloadKey) -> LookupResult:
        """What a new request is told, asking in every step; it is told in time."""
        context = ReqContext(f"request {next(self._requests)}", None)
        watch = Stopwatch()
        while (found := self.tier.lookup(key, context)) is LookupResult.RETRY:
            self.tier.on_schedule_end(STEP)
            time.sleep(0.001)
        assert watch.took_s() < LOOKUP_S + SLACK_S
        self.tier.on_request_finished(context)
        return found

    def counted(self, name: str) -> Counter[str]:
        """Cause -> count so far."""
        stats = self.tier.get_stats()
        assert stats is not None
        for metric, values in stats._values.items():
            for labels, count in values.items():
                self._counts.setdefault(metric, Counter())[labels[-1]] += count
        return self._counts.get(name, Counter())

    def close(self) -> None:
        self.tier.shutdown()
        self.pool.close(1.0)

    def _job(self, key: OffloadKey, row: int, *, load: bool) -> JobResult:
        rows = np.array([row], dtype=np.int32)
        job = TransferJob(next(self._ids), [key], rows, is_promotion=load, req_context=ReqContext("job", None))
        watch = Stopwatch()
        (self.tier.submit_load if load else self.tier.submit_store)(job)
        assert watch.took_s() < 0.1, "the step was held up"
        assert self.pool.drain(10)
        (result,) = self.tier.get_finished_jobs()
        assert result.job_id == job.job_id
        return result


@contextmanager
def bench_on(backend: Backend, **options: object) -> Iterator[Bench]:
    bench = Bench(backend, **options)
    try:
        yield bench
    finally:
        backend.behave()
        bench.close()


def new_key() -> OffloadKey:
    return OffloadKey(next(KEYS).to_bytes(32, "big") + bytes(4))


def content(key: OffloadKey) -> np.ndarray:
    seed = xxhash.xxh3_64_intdigest(bytes(key))
    return np.random.default_rng(seed).integers(-128, 128, ROW_BYTES, dtype=np.int8)


def works(bench: Bench) -> bool:
    """Whether a new chunk is stored, found and fetched."""
    key = new_key()
    stored = bench.store_chunk(key).success
    return stored and bench.look(key) is LookupResult.HIT and bench.load_chunk(key)
