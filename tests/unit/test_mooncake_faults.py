"""mooncakestore:// when the master or an engine with objects goes away, hangs or is full."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from lmcache_ext.errors import StoreError, StoreFull, StoreStalled
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.mooncake_options import parse_options
from lmcache_ext.stores.mooncake_store import MooncakeStore
from lmcache_ext.stores.registry import open_store
from tests.contracts.store_contract import get, key_of, views
from tests.mooncake_servers import MIB, master, needs_mooncake, owner
from tests.servers import Server, longest_pause, until
from tests.stopwatch import Stopwatch

pytestmark = pytest.mark.e2e  # real processes that die and come back: half a minute

LOOKUP_S = 0.3
GRACE_S = 0.3  # of a busy machine
OPTIONS = {
    "global_segment_bytes": 0,
    "local_buffer_bytes": 32 * MIB,
    "local_hostname": "127.0.0.1",
    "request_timeout_s": 1.0,
    "lookup_timeout_s": LOOKUP_S,
}


def opened(address: str, **options: object) -> Store:
    return open_store(f"mooncakestore://{address}/", options={**OPTIONS, **options})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with master(tmp_path) as one:
        yield one


@pytest.fixture
def closing() -> Iterator[Callable[[Store], Store]]:
    stores: list[Store] = []

    def keep(store: Store) -> Store:
        stores.append(store)
        return store

    yield keep
    for store in stores:
        store.close()


def connected(store: Store) -> Store:
    """Joining takes a moment, on a busy machine longer than a call may."""
    until(lambda: answers(store), "the store has joined", 20)
    return store


def answers(store: Store) -> bool:
    try:
        store.ping()
    except StoreError:
        return False
    return True


def fails_within(call: Callable[[], object], limit_s: float) -> None:
    watch = Stopwatch()
    with pytest.raises(StoreError):
        call()
    assert watch.took_s() < limit_s + GRACE_S


def stores_again(store: Store, name: str) -> bool:
    try:
        store.put(key_of(name), views(b"again"))
        return get(store, key_of(name), 5) == b"again"
    except StoreError:
        return False


def with_rows(store: Store) -> memoryview:
    """Join with two registered rows of 1 MiB."""
    rows = memoryview(mmap.mmap(-1, 2 * MIB))
    rows[:MIB] = b"r" * MIB
    store.register(rows)
    connected(store)
    return rows


def with_rows_stored(store: Store) -> memoryview:
    """The same, and the first of them is stored as `row`."""
    rows = with_rows(store)
    store.put(key_of("row"), [rows[:MIB]])
    return rows


def test_nobody_waits_for_a_master_that_is_away_and_it_is_found_when_it_comes(tmp_path, closing):
    needs_mooncake()
    with master(tmp_path) as server:
        server.kill()
        store = closing(opened(server.address, global_segment_bytes=64 * MIB))
        fails_within(lambda: store.exists([key_of("a")]), LOOKUP_S)
        fails_within(lambda: get(store, key_of("a"), 1), 1.0)
        fails_within(store.ping, LOOKUP_S)
        server.start()
        until(lambda: stores_again(store, "a"), "the master is found", 15)


def test_calls_end_in_time_while_the_master_is_dead_and_succeed_when_it_is_back(server, closing):
    store = closing(opened(server.address, global_segment_bytes=64 * MIB))
    rows = with_rows_stored(store)
    server.kill()
    fails_within(lambda: store.exists([key_of("row")]), LOOKUP_S)
    fails_within(lambda: store.get_into(key_of("row"), [rows[MIB:]]), 1.0)
    fails_within(lambda: store.put(key_of("b"), [rows[:MIB]]), 1.0)
    fails_within(lambda: store.delete([key_of("row")]), LOOKUP_S)
    fails_within(store.ping, LOOKUP_S)
    server.start()
    until(lambda: stores_again(store, "back"), "the master is back", 15)
    assert store.exists([key_of("row")]) == [False]  # what the master knew is gone with it


def test_calls_end_in_time_while_the_master_hangs(server, closing):
    store = closing(connected(opened(server.address, global_segment_bytes=64 * MIB)))
    store.put(key_of("a"), views(b"x"))
    server.signal(signal.SIGSTOP)
    try:
        fails_within(lambda: store.exists([key_of("a")]), LOOKUP_S)
        fails_within(lambda: get(store, key_of("a"), 1), 1.0)
        fails_within(lambda: store.put(key_of("b"), views(b"x")), 1.0)
    finally:
        server.signal(signal.SIGCONT)
    until(lambda: stores_again(store, "back"), "the master goes on", 15)


def test_an_object_whose_engine_died_is_a_failure_and_then_a_miss(server, closing):
    store = closing(opened(server.address))
    with owner(server.address) as engine:
        rows = with_rows_stored(store)
        engine.kill()
        engine.wait()
        fails_within(lambda: store.get_into(key_of("row"), [rows[MIB:]]), 1.0)
        fails_within(lambda: get(store, key_of("row"), MIB), 1.0)  # the way of a copy
        fails_within(lambda: store.put(key_of("b"), [rows[:MIB]]), 1.0)
        fails_within(lambda: store.put(key_of("b"), views(b"x")), 1.0)
    until(lambda: store.exists([key_of("row")]) == [False], "the master gives the engine up", 10)
    assert store.get_into(key_of("row"), [rows[MIB:]]) is None
    with owner(server.address):
        assert stores_again(store, "another")


def test_a_full_store_says_so_and_makes_room(tmp_path, closing):
    with master(tmp_path, "-default_kv_lease_ttl=100") as server, owner(server.address, num_bytes=32 * MIB):
        store = closing(connected(opened(server.address)))
        outcomes = store.put_many([key_of(str(index)) for index in range(40)], [views(bytes(2 * MIB))] * 40)
        assert any(isinstance(outcome, StoreFull) and "no segment has room" in str(outcome) for outcome in outcomes)
        until(lambda: stores_again(store, "room"), "the oldest are evicted")


def test_what_does_not_fit_memory_comes_back_from_the_ssd(tmp_path, closing, monkeypatch):
    """In a file each and at once, for by itself Mooncake writes 256 MiB together."""
    monkeypatch.setenv("MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR", "file_per_key_storage_backend")
    monkeypatch.setenv("MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS", "1")
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    with master(tmp_path, "-enable_offload=true", "-default_kv_lease_ttl=100") as server:
        store = closing(opened(server.address, global_segment_bytes=32 * MIB, storage_root_dir=str(ssd)))
        rows = with_rows(store)
        for index in range(64):
            rows[:MIB] = bytes([index]) * MIB
            until(lambda index=index: put_succeeds(store, str(index), rows[:MIB]), "there is room")
        keys = [key_of(str(index)) for index in range(64)]
        assert store.exists(keys) == [True] * 64
        for index, key in enumerate(keys):
            assert store.get_into(key, [rows[MIB:]]) == MIB
            assert rows[MIB:] == bytes([index]) * MIB


def put_succeeds(store: Store, name: str, row: memoryview) -> bool:
    try:
        store.put(key_of(name), [row])
    except StoreFull:
        return False
    return True


def test_an_engine_that_hangs_costs_its_objects_and_nothing_is_written_late(server, closing, monkeypatch):
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")
    settings = parse_options(f"mooncakestore://{server.address}/", {**OPTIONS, "request_timeout_s": 10.0})
    from lmcache_ext.stores.mooncake import Client

    # a read that fails after a second counts as one whose bytes may still come
    store = closing(MooncakeStore(settings, partial(Client, settings, certain_s=0.5)))
    with owner(server.address) as engine:
        rows = with_rows_stored(store)
        assert store.get_into(key_of("row"), [rows[MIB:]]) == MIB
        rows[MIB:] = bytes(MIB)
        engine.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(store.get_into, key_of("row"), [rows[MIB:]])
            assert store.exists([key_of("row")]) == [True]  # nobody else waits
            assert not stuck.done()
            watch = Stopwatch()
            with pytest.raises(StoreStalled):
                stuck.result()
            assert watch.took_s() < 4.0, "a second, and one more for leaving: not its deadline of ten"
        filled = bytes(rows[MIB:])
        assert store._session._client is None
        engine.send_signal(signal.SIGCONT)
        until(lambda: stores_again(store, "on"), "the engine goes on", 10)
        assert bytes(rows[MIB:]) == filled


def test_closing_while_the_master_is_dead_holds_up_nobody_and_ends_when_it_is_back(server):
    """A live change of remote_url closes the store of a running engine, which would stand still for half a minute."""
    store = connected(opened(server.address, global_segment_bytes=64 * MIB, request_timeout_s=10.0))
    client = store._session._client
    server.kill()
    fails_within(lambda: store.exists([key_of("a")]), LOOKUP_S)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(store.close)
        assert longest_pause(closing.done) < 0.5
    assert not client.has_left.is_set()
    server.start()
    assert client.has_left.wait(20)
