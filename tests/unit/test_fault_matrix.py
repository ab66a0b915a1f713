"""Every fault x every remote store x lookup, fetch and store, through a real tier, breaker, store and server.

Whatever happens: no row ever holds anything wrong, every job is reported, nobody waits longer than a deadline, the
breaker opens with one log line and then answers in microseconds, causes are counted, and when the fault is over it
ends by itself. Redis and the lm server run with the fast tests; the rest of the matrix is marked `e2e`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.base import TransferJob

from lmcache_ext import frame
from lmcache_ext.offload import metrics
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.guard import READ, WRITE
from lmcache_ext.stores.pace import STALL_TIMEOUT_S
from tests import servers
from tests.far_tier import (
    FAILURES,
    LOOKUP_S,
    NAMESPACE,
    NUM_ROWS,
    SLACK_S,
    SMALL,
    STARTERS,
    STEP,
    Backend,
    Bench,
    bench_on,
    content,
    lm,
    new_key,
    works,
)
from tests.faulty_proxy import Fault
from tests.servers import until
from tests.stopwatch import Stopwatch

FAST = ("redis", "lm")
ALL = [name if name in FAST else pytest.param(name, marks=pytest.mark.e2e) for name in STARTERS]


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Backend]]:
    """Started when first needed."""
    with ExitStack() as stack:

        class Started(dict[str, Backend]):
            def __missing__(self, name: str) -> Backend:
                self[name] = STARTERS[name](tmp_path_factory.mktemp(name), stack)
                return self[name]

        yield Started()


@pytest.fixture
def bench(backends: dict[str, Backend], name: str) -> Iterator[Bench]:
    with bench_on(backends[name]) as bench:
        yield bench


def look_phase(bench: Bench, key: OffloadKey) -> None:
    bench.look(key)


def fetch_phase(bench: Bench, key: OffloadKey) -> None:
    if bench.look(key) is LookupResult.HIT:
        bench.load_chunk(key)


def store_phase(bench: Bench, key: OffloadKey) -> None:
    assert not bench.store_chunk(new_key()).success


PHASES = {"lookup": (look_phase, 0), "fetch": (fetch_phase, SMALL), "store": (store_phase, SMALL)}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The state changes in the log: side and state."""
    found = []
    for record in caplog.records:
        if record.name.endswith("stores.guard"):
            found.append("off" if " are off" in record.getMessage() else "on")
    return found


def assert_costs_nothing(bench: Bench, key: OffloadKey) -> None:
    """An open breaker answers a lookup in microseconds, refuses a load and drops a store at once."""
    context = ReqContext("cheap", None)
    best_s = min(timed(lambda: bench.tier.lookup(key, context)) for _ in range(200))
    assert best_s < 50e-6
    assert bench.tier.lookup(key, context) is LookupResult.MISS
    dropped = bench.counted(metrics.DROPPED_CHUNKS)["circuit_open"]
    assert not bench.load_chunk(key)
    assert not bench.store_chunk(new_key()).success
    assert bench.counted(metrics.DROPPED_CHUNKS)["circuit_open"] == dropped + 1


def timed(call: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    call()
    return time.perf_counter() - started_at


@pytest.mark.parametrize("kind", ["refuse", "hang", "trickle", "cut"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ALL)
def test_a_backend_that_fails(bench: Bench, phase: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    act, spared = PHASES[phase]
    key = new_key()
    assert bench.store_chunk(key).success
    assert works(bench)
    caplog.set_level(logging.INFO, "vllm.lmcache_ext")
    bench.backend.behave(Fault(kind, beyond=spared))  # type: ignore[arg-type]
    for _ in range(4 * FAILURES):
        act(bench, key)
        if bench.guarded.is_open(READ) or bench.guarded.is_open(WRITE):
            break
    writes_only = not bench.guarded.is_open(READ)
    assert bench.guarded.is_open(WRITE if writes_only else READ)
    if writes_only:
        assert phase == "store"
        assert not bench.store_chunk(new_key()).success
    elif kind in ("refuse", "hang"):  # others may look well to a probe in between
        assert_costs_nothing(bench, key)
    causes = bench.counted(metrics.STORE_FAILURES)
    side = "write" if writes_only else "read"
    assert causes.keys() & {f"{side}.StoreTimeout", f"{side}.StoreUnavailable", f"{side}.slow"}
    bench.backend.behave()
    until(lambda: not bench.guarded.is_open(READ) and works(bench), "works again by itself", 15)
    assert bench.load_chunk(key)
    until(lambda: told(caplog)[-1] == "on", "says so", 5)
    changes = told(caplog)
    assert changes == ["off", "on"] * (len(changes) // 2), "one line per change of state"


@pytest.mark.parametrize("name", ALL)
def test_many_requests_before_a_backend_that_hangs_wait_together(backends: dict[str, Backend], name: str) -> None:
    """One lookup deadline for all 64 of them, not one each."""
    with bench_on(backends[name]) as bench:
        bench.backend.behave(Fault("hang"))
        waiting = {request: ReqContext(f"many {request}", None) for request in range(64)}
        keys = {request: [new_key() for _ in range(4)] for request in waiting}
        watch = Stopwatch()
        while waiting:
            for request, context in list(waiting.items()):
                found = [bench.tier.lookup(key, context) for key in keys[request]]
                if LookupResult.RETRY not in found:
                    assert set(found) == {LookupResult.MISS}
                    bench.tier.on_request_finished(waiting.pop(request))
            bench.tier.on_schedule_end(STEP)
            time.sleep(0.001)
        assert watch.took_s() < LOOKUP_S + SLACK_S
        until(lambda: bench.guarded.is_open(READ), "the breaker is open", 5)


@pytest.mark.parametrize("name", ALL)
def test_a_backend_that_dies_in_the_middle_of_a_fetch(bench: Bench) -> None:
    """The peer: that request ends with an error, and later ones wait for seconds or are never served again."""
    key = new_key()
    assert bench.store_chunk(key).success
    assert bench.look(key) is LookupResult.HIT
    bench.backend.behave(Fault("hang", beyond=SMALL))
    rows = np.array([3], dtype=np.int32)
    bench.tier.submit_load(TransferJob(0, [key], rows, is_promotion=True, req_context=ReqContext("dies", None)))
    until(lambda: any(proxy.has_struck.is_set() for proxy in bench.backend.proxies), "in the middle of it", 5)
    bench.backend.behave(Fault("refuse"))
    assert bench.pool.drain(10)
    assert [result.success for result in bench.tier.get_finished_jobs()] == [False]
    bench.backend.behave()
    until(lambda: works(bench), "works again by itself", 15)
    assert bench.load_chunk(key)


# Long deadlines, as people have them, and a short one for a backend that stops sending.
STALL_S = 0.15
STALLING = {"request_timeout_s": 10.0, "stall_timeout_s": STALL_S}


@pytest.mark.parametrize("kind", ["stall", "hang", "trickle"])
@pytest.mark.parametrize("name", ALL)
def test_a_fetch_that_stops_in_the_middle_costs_a_moment_and_not_its_deadline(
    backends: dict[str, Backend], name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.lmcache_ext")
    with bench_on(backends[name], **STALLING) as bench:
        key = new_key()
        assert bench.store_chunk(key).success
        bench.backend.behave(Fault(kind, beyond=SMALL, way="down"))  # type: ignore[arg-type]
        for _ in range(2):
            assert bench.look(key) is LookupResult.HIT
            assert not bench.guarded.is_open(READ)
            watch = Stopwatch()
            assert not bench.load_chunk(key)
            assert watch.took_s() < STALL_S + SLACK_S
        assert bench.guarded.is_open(READ), "two are enough"
        assert_costs_nothing(bench, key)
        assert bench.counted(metrics.STORE_FAILURES)["read.StoreStalled"] == 2
        bench.backend.behave()
        until(lambda: not bench.guarded.is_open(READ) and works(bench), "works again by itself", 15)
        assert bench.load_chunk(key)
        assert told(caplog) == ["off", "on"]


@pytest.mark.parametrize("name", FAST)
def test_a_long_prompt_waits_once_for_a_fetch_that_stops_in_the_middle(backends: dict[str, Backend], name: str) -> None:
    """Not once for each of its tasks: the breaker ends those that wait for a thread."""
    with bench_on(backends[name], **STALLING) as bench:
        keys = [new_key() for _ in range(NUM_ROWS)]
        for key in keys:
            assert bench.store_chunk(key).success
        bench.backend.behave(Fault("stall", beyond=SMALL, way="down"))
        rows, context = np.arange(NUM_ROWS, dtype=np.int32), ReqContext("long", None)
        watch = Stopwatch()
        bench.tier.submit_load(TransferJob(0, keys, rows, is_promotion=True, req_context=context))
        assert bench.pool.drain(10)
        assert watch.took_s() < 2 * STALL_S + SLACK_S
        (result,) = bench.tier.get_finished_jobs()
        assert not result.success
        assert result.successful_keys == []


GBIT_PER_S = 125e6
BIG_BYTES = 32 * 1024**2


@pytest.mark.e2e
@pytest.mark.parametrize("name", STARTERS)
def test_a_long_fetch_that_goes_on_is_not_given_up(backends: dict[str, Backend], name: str) -> None:
    """Two threads with two rows of 32 MiB each over 1 Gbit/s in all take longer than twice what a stall may."""
    with bench_on(backends[name], request_timeout_s=10.0) as bench:
        names = [[NAMESPACE + bytes(new_key()) for _ in range(2)] for _ in range(2)]
        value = memoryview(np.random.default_rng(1).bytes(BIG_BYTES))
        assert bench.store.put_many([key for pair in names for key in pair], [[value]] * 4) == [None] * 4
        bench.backend.behave(Fault("slow", bytes_per_s=GBIT_PER_S / len(bench.backend.proxies)))
        rows = [[[memoryview(bytearray(BIG_BYTES))] for _ in pair] for pair in names]
        started_at = time.monotonic()
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(bench.store.get_many_into, names, rows))
        took_s = time.monotonic() - started_at
        bench.store.delete([key for pair in names for key in pair])
    assert found == [[BIG_BYTES] * 2] * 2
    assert all(row == value for pair in rows for (row,) in pair)
    assert took_s > 2 * STALL_TIMEOUT_S


# --- values ------------------------------------------------------------------------------------


def framed(key: bytes, payload: bytes, namespace: bytes = NAMESPACE) -> bytes:
    """An object as another engine would have written it."""
    tag, parts = NaiveSerde().tag, [memoryview(payload)]
    head = frame.encode(namespace=namespace, key=key, serde_tag=tag, raw_length=len(payload), payload_parts=parts)
    return head + payload


LIES: dict[str, tuple[str, Callable[[bytes, bytes], bytes]]] = {
    "truncated": ("TruncatedFrame", lambda key, honest: honest[: len(honest) // 2]),
    "emptied": ("TruncatedFrame", lambda key, honest: b""),
    "oversized": ("OversizedFrame", lambda key, honest: honest + bytes(1000)),
    "of another model": ("ForeignNamespace", lambda key, honest: framed(key, honest[64:], bytes(16))),
    "of another chunk": ("ForeignKey", lambda key, honest: framed(NAMESPACE + new_key(), honest[64:])),
    "of another size": ("LengthMismatch", lambda key, honest: framed(key, honest[64:-64])),
    "with a flipped bit": ("ChecksumMismatch", lambda key, honest: honest[:-1] + bytes([honest[-1] ^ 1])),
    "garbage of the same length": ("BadMagic", lambda key, honest: bytes(len(honest))),
}


@pytest.mark.parametrize("name", ALL)
def test_values_that_lie_are_misses_counted_by_cause_and_healed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The peer: thousands of tokens reused from garbage; an error and a lost lookup thread for a short value."""
    expected: Counter[str] = Counter()
    for what, (cause, lie) in LIES.items():
        key = new_key()
        assert bench.store_chunk(key).success
        name = NAMESPACE + bytes(key)
        bench.store.put(name, [memoryview(lie(name, framed(name, content(key).tobytes())))])
        assert bench.look(key) is LookupResult.HIT, what
        assert not bench.load_chunk(key), what
        expected[cause] += 1
        assert bench.look(key) is LookupResult.MISS, f"{what}: was not deleted"
        assert bench.store_chunk(key).success
        assert bench.load_chunk(key), f"{what}: is not healed"
    assert bench.counted(metrics.CORRUPT_CHUNKS) == expected
    assert not bench.guarded.is_open(READ)
    lines = [record for record in caplog.records if "Corrupt chunk" in record.getMessage()]
    assert len(lines) == len(expected), "one line per cause"


@pytest.mark.parametrize("name", ALL)
def test_bits_that_flip_on_the_way_never_reach_a_row_as_good(bench: Bench) -> None:
    key, other = new_key(), new_key()
    assert bench.store_chunk(key).success
    bench.backend.behave(Fault("flip", beyond=SMALL, way="down"))
    assert not bench.load_chunk(key)
    bench.backend.behave(Fault("flip", beyond=SMALL, way="up"))
    bench.store_chunk(other)
    bench.backend.behave()
    until(lambda: not bench.load_chunk(other) and works(bench), "works again", 5)


# --- servers -----------------------------------------------------------------------------------


@pytest.fixture
def own(name: str, tmp_path: Path) -> Iterator[Bench]:
    """A tier on servers of its own, which the test may end."""
    with ExitStack() as stack, bench_on(STARTERS[name](tmp_path, stack)) as bench:
        yield bench


def until_off(bench: Bench, act: Callable[[], object], side: str = READ) -> None:
    """Do it until that breaker is open, which does not take long."""
    for _ in range(4 * FAILURES):
        act()
        if bench.guarded.is_open(side):
            return
    pytest.fail(f"{side}s are still on")


@pytest.mark.parametrize("name", ALL)
def test_a_backend_that_restarts_is_used_again(own: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The peer's lm connector never hits again."""
    caplog.set_level(logging.INFO, "vllm.lmcache_ext")
    assert works(own)
    for node in own.backend.nodes:
        node.kill()
    until_off(own, lambda: own.look(new_key()))
    for node in own.backend.nodes:
        node.start()
    until(lambda: works(own), "works again by itself", 20)
    until(lambda: told(caplog)[-1] == "on", "says so", 5)
    changes = told(caplog)
    assert changes == ["off", "on"] * (len(changes) // 2)


@pytest.mark.parametrize("name", [name for name in ALL if name != "lm"])
def test_a_backend_without_room_still_serves(own: Bench) -> None:
    """The peer: stores fail silently, and no hits."""
    before = new_key()
    assert own.store_chunk(before).success
    for node in own.backend.nodes:
        servers.command(node.port, "CONFIG", "SET", "maxmemory", 1)
    until_off(own, lambda: own.store_chunk(new_key()), WRITE)
    assert own.counted(metrics.DROPPED_CHUNKS)["StoreFull"] >= FAILURES
    assert own.look(before) is LookupResult.HIT
    assert own.load_chunk(before)
    for node in own.backend.nodes:
        servers.command(node.port, "CONFIG", "SET", "maxmemory", 0)
    until(lambda: works(own), "works again by itself", 10)


def test_an_lm_server_without_room_still_serves(tmp_path: Path) -> None:
    with ExitStack() as stack:
        backend = lm(tmp_path, stack, "--max-bytes", "32Ki")
        with bench_on(backend) as bench:
            until_off(bench, lambda: bench.store_chunk(new_key()), WRITE)
            assert bench.counted(metrics.DROPPED_CHUNKS)["StoreFull"] >= FAILURES
            assert bench.look(new_key()) is LookupResult.MISS
            assert not bench.guarded.is_open(READ)
            backend.nodes[0].kill()
            roomy = lm(tmp_path, stack)
            backend.proxies[0].target_port = roomy.nodes[0].port
            until(lambda: works(bench), "works again by itself", 10)


@pytest.mark.parametrize("name", [name for name in ALL if name != "lm"])
def test_lost_authentication_ends_by_itself(own: Bench) -> None:
    key = new_key()
    assert own.store_chunk(key).success
    for node in own.backend.nodes:
        servers.command(node.port, "CONFIG", "SET", "requirepass", "changed")
        servers.command(node.port, "CLIENT", "KILL", "TYPE", "normal", password="changed")
    until_off(own, lambda: own.look(key))
    assert not own.store_chunk(new_key()).success
    for node in own.backend.nodes:
        servers.command(node.port, "CONFIG", "SET", "requirepass", "", password="changed")
    until(lambda: works(own), "works again by itself", 10)
    assert own.load_chunk(key)


def test_a_token_that_an_lm_server_begins_to_ask_for(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    with ExitStack() as stack:
        backend = lm(tmp_path, stack)
        with bench_on(backend) as bench:
            assert works(bench)
            strict = lm(tmp_path, stack, "--auth-token-file", str(token))
            open_port, backend.proxies[0].target_port = backend.proxies[0].target_port, strict.nodes[0].port
            backend.proxies[0].drop_connections()
            until_off(bench, lambda: bench.look(new_key()))
            backend.proxies[0].target_port = open_port
            backend.proxies[0].drop_connections()
            until(lambda: works(bench), "works again by itself", 10)


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["redis", "valkey"])
def test_a_failover_between_sentinels_is_misses_for_a_while(kind: str, tmp_path: Path) -> None:
    with (
        servers.replicated(kind, tmp_path) as (master, replica),
        servers.sentinels(kind, tmp_path, master) as (watch,),
        bench_on(Backend(f"{kind}-sentinel://{watch.address}", [], [master])) as bench,
    ):
        until(lambda: b"slaves=1" in servers.command(watch.port, "INFO", "sentinel"), "replica known", 15)
        key = new_key()
        assert bench.store_chunk(key).success
        until(lambda: b":1" in servers.command(replica.port, "DBSIZE"), "replicated")
        master.kill()
        until_off(bench, lambda: bench.look(key))
        until(lambda: works(bench), "the new master is used", 20)
        assert bench.load_chunk(key)


@pytest.mark.e2e
def test_a_replica_that_takes_over_in_a_cluster_is_found(tmp_path: Path) -> None:
    flags = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
    with servers.cluster("redis", tmp_path, 2) as nodes, servers.server("redis", tmp_path, *flags) as replica:
        master = nodes[0]
        name = servers.command(master.port, "CLUSTER", "MYID").split(b"\r\n")[1]
        servers.command(replica.port, "CLUSTER", "MEET", "127.0.0.1", master.port)
        follow = ("CLUSTER", "REPLICATE", name)
        until(lambda: b"+OK" in servers.command(replica.port, *follow), "the replica knows its master", 15)
        up = b"master_link_status:up"
        until(lambda: up in servers.command(replica.port, "INFO", "replication"), "in sync", 15)
        with bench_on(Backend(f"redis-cluster://{master.address},{nodes[1].address}", [], nodes)) as bench:
            until(lambda: works(bench), "works", 15)
            key = new_key()
            assert bench.store_chunk(key).success
            master.kill()
            until_off(bench, lambda: [bench.look(new_key()) for _ in range(8)])
            servers.command(replica.port, "CLUSTER", "FAILOVER", "TAKEOVER")
            until(lambda: works(bench), "the replica is used", 20)
            assert bench.load_chunk(key)
