"""Redis when things go wrong: each ends in a miss or a StoreError, in time, and is over when the cause is."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from lmcache_ext.errors import StoreError, StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.guard import WRITE, Guarded
from lmcache_ext.stores.registry import open_store
from lmcache_ext.stores.resp_parts import new_manifest, redis_key
from lmcache_ext.stores.resp_pool import Pool
from lmcache_ext.stores.resp_wire import Deadline, Wire
from tests import servers
from tests.contracts.store_contract import Landing, get, key_of, views
from tests.stopwatch import Stopwatch

MIB = 1024**2
KEY = key_of("a")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.server("redis", tmp_path_factory.mktemp("faults")) as server:
        yield server


@pytest.fixture
def client(server: servers.Server) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port) as client:
        client.flushall()
        yield client


@pytest.fixture
def store(server: servers.Server, client: redis.Redis) -> Iterator[Store]:
    with opened(f"redis://{server.address}", part_bytes=1000) as store:
        yield store


@contextmanager
def opened(url: str, **options: object) -> Iterator[Store]:
    store = open_store(url, options=options)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def played(play: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that accepts, and does what `play` does to each connection; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                accepted.append(sock)
                threading.Thread(target=play_one, args=(sock,), daemon=True).start()

        def play_one(sock: socket.socket) -> None:
            try:
                play(sock)
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for sock in accepted:
                sock.close()


def every_call(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.exists([KEY]),
        lambda: store.get_into(KEY, [memoryview(bytearray(100))]),
        lambda: store.put(KEY, views(b"x" * 100)),
        lambda: store.put(KEY, views(b"x" * 9_000_000)),
        lambda: store.delete([KEY]),
        lambda: store.ping(),
        lambda: store.usage(),
    ]


def assert_all_fail_within(store: Store, timeout_s: float, error: type[StoreError]) -> None:
    """All at once, over a connection each, so that together they take as long as one."""

    def assert_fails(call: Callable[[], object]) -> None:
        watch = Stopwatch()
        with pytest.raises(error):
            call()
        assert watch.took_s() < timeout_s

    calls = every_call(store)
    with ThreadPoolExecutor(len(calls)) as threads:
        list(threads.map(assert_fails, calls))


def trickle(data: bytes) -> Callable[[socket.socket], None]:
    def play(sock: socket.socket) -> None:
        sock.recv(100)
        for at in range(10_000):
            sock.sendall(data[at : at + 1] or b"x")
            time.sleep(0.01)

    return play


@pytest.mark.parametrize("scheme", ["redis", "valkey", "redis-sentinel", "redis-cluster", "rediss"])
def test_a_server_that_never_answers_costs_the_deadline(scheme: str) -> None:
    with (
        played(lambda sock: time.sleep(60)) as address,
        opened(f"{scheme}://:secret@{address}", request_timeout_s=0.1) as store,
    ):
        assert_all_fail_within(store, 0.6, StoreError)


@pytest.mark.parametrize("data", [b"+OK", b"$100000\r\n", b"*3\r\n", b"-ERR "])
@pytest.mark.parametrize("login", ["", ":secret@"])
def test_a_server_that_trickles_costs_the_deadline(data: bytes, login: str) -> None:
    with played(trickle(data)) as address, opened(f"redis://{login}{address}", request_timeout_s=0.1) as store:
        assert_all_fail_within(store, 0.6, StoreError)


@pytest.mark.parametrize(
    "data",
    [
        *(b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$-2\r\n", b"$99999999999999999999\r\n", b":\r\n", b"\r\n\r\n"),
        *(b"+" * 9000, b"*-5\r\n", b"*1\r\n" * 50, b"%1\r\n", b"$1\r\nxyz\r\n", b"\0" * 100, b"*262144\r\n"),
    ],
)
def test_garbage_is_unavailable_and_the_connection_is_dropped(data: bytes) -> None:
    connections = []

    def play(sock: socket.socket) -> None:
        connections.append(sock)
        sock.recv(100)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(10**6)

    with played(play) as address, opened(f"redis://{address}", request_timeout_s=1.0) as store:
        for call in every_call(store):
            with pytest.raises(StoreUnavailable):
                call()
    assert len(connections) == len(every_call(store))


def test_servers_that_hang_leave_time_for_the_one_that_answers(server: servers.Server, tmp_path: Path) -> None:
    with (
        played(lambda sock: time.sleep(60)) as deaf,
        servers.sentinels("redis", tmp_path, server) as (sentinel,),
        servers.server("redis", tmp_path, "--cluster-enabled", "yes") as node,
    ):
        servers.command(node.port, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        servers.until(lambda: b"cluster_state:ok" in servers.command(node.port, "CLUSTER", "INFO"), "cluster")
        for url in (f"redis-sentinel://{deaf},{deaf},{sentinel.address}", f"redis-cluster://{deaf},{node.address}"):
            with opened(url, request_timeout_s=0.4) as store:
                assert store.exists([KEY]) == [False]


def test_a_server_that_takes_one_client_is_served_by_one(tmp_path: Path) -> None:
    flags = ["--maxclients", "1", "--requirepass", "pw"]
    with (
        servers.server("redis", tmp_path, *flags) as server,
        opened(f"redis://:pw@{server.address}", part_bytes=1000) as store,
    ):
        servers.until(lambda: stored(store), "the client that looked for the port is gone")
        data = os.urandom(9999)
        store.put(KEY, views(data))
        assert get(store, KEY, 9999) == data


def stored(store: Store) -> bool:
    try:
        store.put(KEY, views(b"x"))
    except StoreError:
        return False
    return True


def test_a_server_that_refuses_is_unavailable_at_once() -> None:
    with opened(f"redis://127.0.0.1:{servers.free_port()}", request_timeout_s=5.0) as store:
        assert_all_fail_within(store, 0.3, StoreUnavailable)


def test_a_restarted_server_is_used_again_without_an_error(tmp_path: Path) -> None:
    with servers.server("redis", tmp_path) as server, opened(f"redis://{server.address}") as store:
        store.put(KEY, views(b"1"))
        server.kill()
        server.start()
        assert get(store, KEY, 1) is None
        store.put(KEY, views(b"2"))
        assert get(store, KEY, 1) == b"2"


def test_a_killed_server_is_misses_and_recovers_by_itself(tmp_path: Path) -> None:
    with servers.server("redis", tmp_path) as server:
        inner = open_store(f"redis://{server.address}", options={"request_timeout_s": 0.3})
        store = Guarded(inner, deadline_s=0.3, failures_to_open=2, probe_interval_s=0.05, max_probe_interval_s=0.1)
        store.put(KEY, views(b"1"))
        server.kill()
        for _ in range(5):
            assert get(store, KEY, 1) is None
            assert store.exists([KEY]) == [False]
        assert store.is_open()
        server.start()
        servers.until(lambda: not store.is_open(), "the breaker closes")
        store.put(KEY, views(b"2"))
        assert get(store, KEY, 1) == b"2"
        store.close()


def test_a_stopped_server_is_a_timeout_and_then_itself_again(server: servers.Server, client: redis.Redis) -> None:
    with opened(f"redis://{server.address}", request_timeout_s=0.2) as store:
        store.put(KEY, views(b"1"))
        server.signal(19)
        try:
            with pytest.raises(StoreTimeout, match=r"no answer within 0\.2 s"):
                store.get_into(KEY, [])
        finally:
            server.signal(18)
        servers.until(lambda: store.exists([KEY]) == [True], "it answers")
        assert get(store, KEY, 1) == b"1"


def test_maxmemory_without_eviction_is_full_and_reads_go_on(tmp_path: Path) -> None:
    flags = ["--maxmemory", "8mb", "--maxmemory-policy", "noeviction"]
    with servers.server("redis", tmp_path, *flags) as server, opened(f"redis://{server.address}") as store:
        guarded = Guarded(store, deadline_s=5, failures_to_open=1)
        guarded.put(KEY, views(b"1"))
        for size in (9 * MIB, 30 * MIB):
            with pytest.raises(StoreFull, match="OOM"):
                store.put(key_of("b"), views(os.urandom(size)))
            assert servers.command(server.port, "DBSIZE") == b":1\r\n", "parts of nothing stay behind"
        assert store.exists([KEY, key_of("b")]) == [True, False]
        for index in range(5):
            with suppress(StoreFull, StoreUnavailable):
                guarded.put(key_of(str(index)), views(os.urandom(4 * MIB)))
        assert guarded.is_open(WRITE)
        assert get(guarded, KEY, 1) == b"1"
        assert store.usage().capacity_bytes == 8 * MIB


def test_eviction_while_writing_is_full_and_publishes_nothing(tmp_path: Path) -> None:
    flags = ["--maxmemory", "24mb", "--maxmemory-policy", "allkeys-lru"]
    with servers.server("redis", tmp_path, *flags) as server, opened(f"redis://{server.address}") as store:
        with pytest.raises(StoreFull, match=r"parts were evicted while writing|OOM"):
            store.put(KEY, views(bytes(64 * MIB)))
        assert store.exists([KEY]) == [False]


def test_under_eviction_an_object_is_right_or_a_miss(tmp_path: Path) -> None:
    flags = ["--maxmemory", "10mb", "--maxmemory-policy", "allkeys-lru"]
    with (
        servers.server("redis", tmp_path, *flags) as server,
        opened(f"redis://{server.address}", part_bytes=65536) as store,
    ):
        num_found = 0
        for index in range(40):
            with suppress(StoreFull):  # one of its parts was evicted at once
                store.put(key_of(str(index)), views(bytes([index]) * MIB))
        for index in range(40):
            data = get(store, key_of(str(index)), MIB)
            num_found += data is not None
            assert data is None or data == bytes([index]) * MIB
        assert num_found < 20


@pytest.mark.parametrize("index", [1, 2, 4])
def test_an_evicted_part_is_a_miss_and_the_rest_is_removed(store: Store, client: redis.Redis, index: int) -> None:
    store.put(KEY, views(os.urandom(4500)))
    client.delete(next(iter(client.scan_iter(f"{{*:{index}"))))
    assert get(store, KEY, 4500) is None
    assert client.dbsize() == 0
    store.put(KEY, views(b"y" * 4500))
    assert get(store, KEY, 4500) == b"y" * 4500


@pytest.mark.parametrize("value", [b"", b"short", b"x" * 1001, b"x" * 5000, b"x" * (3 * MIB)])
def test_a_part_of_another_length_is_a_miss(store: Store, client: redis.Redis, value: bytes) -> None:
    store.put(KEY, views(os.urandom(4500)))
    client.set(next(iter(client.scan_iter("{*:1"))), value)
    landing = Landing([64, 4436])
    assert store.get_into(KEY, landing.parts()) is None
    landing.assert_guards_untouched()
    assert store.exists([KEY]) == [False]


def test_an_evicted_manifest_is_a_miss(store: Store, client: redis.Redis) -> None:
    store.put(KEY, views(os.urandom(4500)))
    client.delete(redis_key(KEY))
    assert get(store, KEY, 4500) is None


def test_parts_of_a_writer_that_died_expire(store: Store, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmcache_ext.stores.resp_transfer._publishing", die)
    with pytest.raises(KeyboardInterrupt):
        store.put(KEY, views(os.urandom(4500)))
    assert store.exists([KEY]) == [False]
    assert [0 < client.ttl(name) <= 600 for name in client.scan_iter()] == [True] * 4


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"x", b"x" * 47, b"x" * 48, b"x" * 49, b"KVCP" + b"\0" * 44, b"x" * 5000, b"x" * (5 * MIB)),
        new_manifest(4500).encode(key_of("another")),
        new_manifest(4500).encode(KEY)[:-1] + b"\xff",
    ],
    ids=["0", "1", "47", "48", "49", "KVCP", "5000", "5 MiB", "another's manifest", "its manifest damaged"],
)
def test_foreign_values_are_told_by_length_and_left_to_the_frame(
    store: Store, client: redis.Redis, value: bytes
) -> None:
    client.set(redis_key(KEY), value)
    landing = Landing([64, 4032])
    assert store.get_into(KEY, landing.parts()) == len(value)
    landing.assert_guards_untouched()
    assert landing.data()[: len(value)] == value[:4096]
    assert store.ping() > 0
    store.delete([KEY])
    assert client.dbsize() == 0


@pytest.mark.parametrize("rest", [b"", b"x", b"x" * 1000, b"x" * 5000, b"x" * (5 * MIB)])
def test_a_manifest_whose_parts_never_were_is_a_miss(store: Store, client: redis.Redis, rest: bytes) -> None:
    for num_bytes in (999, 4500, 2**62):
        client.set(redis_key(KEY), new_manifest(num_bytes, 1000).encode(KEY) + rest)
        assert get(store, KEY, 4500) is None
        assert client.dbsize() == 0


def test_foreign_types_are_a_miss_and_overwritten(store: Store, client: redis.Redis) -> None:
    client.lpush(redis_key(KEY), "x")
    assert get(store, KEY, 10) is None
    store.put(KEY, views(b"mine"))
    assert get(store, KEY, 4) == b"mine"


def test_lost_authentication_is_unavailable_until_it_is_back(server: servers.Server, client: redis.Redis) -> None:
    with opened(f"redis://{server.address}", request_timeout_s=1.0) as store:
        store.put(KEY, views(b"1"))
        client.config_set("requirepass", "changed")
        try:
            for id_ in re.findall(r"id=(\d+)", str(servers.command(server.port, "CLIENT", "LIST", password="changed"))):
                client.execute_command("CLIENT", "KILL", "ID", id_, "SKIPME", "yes")
            with pytest.raises(StoreUnavailable, match="access denied, check username and password"):
                store.get_into(KEY, [])
            with pytest.raises(StoreUnavailable):
                store.put(KEY, views(b"2"))
        finally:
            client.config_set("requirepass", "")
        assert get(store, KEY, 1) == b"1"


def test_a_wrong_password_is_not_shown(server: servers.Server, client: redis.Redis) -> None:
    with (
        opened(f"redis://someone:hunter2@{server.address}") as store,
        pytest.raises(StoreUnavailable, match="invalid username-password") as caught,
    ):
        store.ping()
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "hunter2" not in repr(chain)
        chain = chain.__cause__
    assert "hunter2" not in repr(vars(store))


def test_a_user_who_may_not_write_still_reads(server: servers.Server, client: redis.Redis) -> None:
    client.acl_setuser("reader", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@read", "+ping"])
    client.set(redis_key(KEY), b"theirs")
    with opened(f"redis://reader:pw@{server.address}") as store:
        assert get(store, KEY, 6) == b"theirs"
        with pytest.raises(StoreUnavailable, match="access denied"):
            store.put(KEY, views(b"mine"))


def test_threads_share_few_connections(server: servers.Server, client: redis.Redis) -> None:
    with opened(f"redis://{server.address}", num_connections=3, part_bytes=1000) as store:
        data = os.urandom(20_000)
        store.put(KEY, views(data))
        found: list[bytes | None] = []
        threads = [threading.Thread(target=lambda: found.append(get(store, KEY, 20_000))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [data] * 12
        assert len(client.client_list()) <= 1 + 3


def test_a_busy_pool_is_a_timeout(server: servers.Server) -> None:
    pool = Pool("p", lambda _: Wire(socket.create_connection(("127.0.0.1", server.port))), 1)
    with (
        pool.connection(Deadline(5)),
        pytest.raises(StoreTimeout, match=r"p: all 1 connections are busy for 0\.05 s"),
        pool.connection(Deadline(0.05)),
    ):
        pass
    with pool.connection(Deadline(0.05)) as wire:
        assert wire.is_alive()
    pool.close()


def test_a_closed_store_opens_nothing(server: servers.Server, client: redis.Redis) -> None:
    with opened(f"redis://{server.address}") as store:
        store.ping()
        store.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            store.ping()
