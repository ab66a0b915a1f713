"""One of several cache servers hangs: it costs its keys, the others serve, and it comes back by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from threading import Thread

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.base import TransferJob

from lmcache_ext.offload import metrics
from lmcache_ext.stores.guard import READ
from lmcache_ext.stores.lmserver_shards import ShardedStore
from tests.far_tier import LOOKUP_S, NAMESPACE, ROW_BYTES, SLACK_S, SMALL, Backend, Bench, bench_on, lm, new_key
from tests.faulty_proxy import Fault
from tests.servers import until
from tests.stopwatch import Stopwatch

NUM_KEYS = 12
HUNG = 1
LONG = {"request_timeout_s": 10.0, "stall_timeout_s": 0.15}
BACK_S = 15.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with ExitStack() as stack:
        each = [lm(tmp_path_factory.mktemp("shard"), stack) for _ in range(3)]
        proxies = [proxy for backend in each for proxy in backend.proxies]
        url = "lm://" + ",".join(proxy.address for proxy in proxies)
        yield Backend(url, proxies, [node for backend in each for node in backend.nodes])


@pytest.fixture
def bench(shards: Backend) -> Iterator[Bench]:
    with bench_on(shards, **LONG) as bench:
        yield bench


def guards(bench: Bench) -> Sequence:
    assert isinstance(bench.store, ShardedStore)
    return bench.store._stores


def are_off(bench: Bench) -> list[bool]:
    """By server, whether its own breaker is open; that of all together never is."""
    assert not bench.guarded.is_open(READ)
    return [guard.is_open(READ) for guard in guards(bench)]


def stored(bench: Bench) -> tuple[list[OffloadKey], list[OffloadKey]]:
    """New chunks: those on the server that will hang, and those on the others; some of each."""
    hung, fine = [], []
    while not hung or not fine or len(hung) + len(fine) < NUM_KEYS:
        key = new_key()
        assert bench.store_chunk(key).success
        on_hung = bench.store._store_of(NAMESPACE + bytes(key)) is guards(bench)[HUNG]
        (hung if on_hung else fine).append(key)
    return hung, fine


def lookup_s(bench: Bench, names: Sequence[bytes], num_there: int) -> float:
    """Seconds that a lookup takes, of which the first `num_there` names must be there and the others a miss."""
    watch = Stopwatch()
    assert bench.guarded.exists(names) == [True] * num_there + [False] * (len(names) - num_there)
    return watch.took_s()


def works_again(bench: Bench, hung: Sequence[OffloadKey]) -> None:
    bench.backend.behave()
    until(lambda: are_off(bench) == [False] * 3, "it is asked again", BACK_S)
    assert all(bench.look(key) is LookupResult.HIT and bench.load_chunk(key) for key in hung)


def test_a_server_that_accepts_and_never_answers_costs_its_keys_only(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.lmcache_ext")
    hung, fine = stored(bench)
    names = [NAMESPACE + bytes(key) for key in (*fine, *hung)]
    bench.backend.proxies[HUNG].drop_connections()
    bench.backend.proxies[HUNG].behave(Fault("hang"))
    before = bench.counted(metrics.STORE_FAILURES)["read.StoreTimeout"]
    for _ in range(5):
        assert are_off(bench) == [False] * 3
        assert lookup_s(bench, names, len(fine)) < LOOKUP_S + SLACK_S
    assert are_off(bench) == [index == HUNG for index in range(3)]
    assert bench.counted(metrics.STORE_FAILURES)["read.StoreTimeout"] == before + 5
    assert lookup_s(bench, names, len(fine)) < LOOKUP_S / 2, "nobody waits for it any more"
    assert all(bench.look(key) is LookupResult.HIT and bench.load_chunk(key) for key in fine)
    assert all(bench.look(key) is LookupResult.MISS for key in hung)
    works_again(bench, hung)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("stores.guard")]
    assert len(lines) == 2
    assert all(bench.backend.proxies[HUNG].address in line for line in lines)


def test_a_server_that_stops_in_the_middle_of_a_fetch_costs_its_chunks_only(bench: Bench) -> None:
    hung, fine = stored(bench)
    bench.backend.proxies[HUNG].behave(Fault("stall", beyond=SMALL, way="down"))
    keys = [*fine, *hung]
    rows, context = np.arange(len(keys), dtype=np.int32), ReqContext("prompt", None)
    watch = Stopwatch()
    bench.tier.submit_load(TransferJob(0, keys, rows, is_promotion=True, req_context=context))
    assert bench.pool.drain(10)
    assert watch.took_s() < 2 * LONG["stall_timeout_s"] + SLACK_S
    (result,) = bench.tier.get_finished_jobs()
    assert set(result.successful_keys or ()) == set(fine)
    until(lambda: bench.counted(metrics.STORE_FAILURES)["read.StoreStalled"] >= 1, "counted")
    works_again(bench, hung)


def test_writes_that_a_server_does_not_take_hold_up_no_lookup_of_the_others(bench: Bench) -> None:
    hung, fine = stored(bench)
    guards(bench)[HUNG].exists([NAMESPACE + bytes(hung[0])])
    bench.backend.proxies[HUNG].behave(Fault("hang", beyond=SMALL, way="up"))
    value = [memoryview(bytes(ROW_BYTES))]
    names = [NAMESPACE + bytes(key) for key in (*fine, *hung)]
    writers = [Thread(target=bench.store.put_many, args=(names, [value] * len(names)), daemon=True) for _ in range(7)]
    for writer in writers:
        writer.start()
    until(bench.backend.proxies[HUNG].has_struck.is_set, "one of them is held up", 5)
    for _ in range(10):
        assert lookup_s(bench, names[: len(fine)], len(fine)) < LOOKUP_S
    assert any(writer.is_alive() for writer in writers)
    bench.backend.proxies[HUNG].behave()
    for writer in writers:
        writer.join(5)
        assert not writer.is_alive()
