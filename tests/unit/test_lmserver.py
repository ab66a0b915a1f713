"""The `lm://` store: the contract against our server, with and without a data directory, and against LMCache's."""

from __future__ import annotations

import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from lmcache_ext.daemons.lmserver import main
from lmcache_ext.errors import ConfigError, StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.lmserver import LMServerStore, Settings, open_lm, parse_addresses, parse_options
from lmcache_ext.stores.lmserver_shards import ShardedStore
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.wire.names import name_of
from tests.contracts.store_contract import StoreContract, get, key_of, views
from tests.lm_servers import PATIENT, OldServer, ServerProcess, clear, serving
from tests.stopwatch import Stopwatch

MIB = 1024**2


class OldFrames:
    """Reads and writes objects by LMCache's frames, without the store."""

    server: ServerProcess

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        with self.server.dial() as client:
            client.put(name_of(key), data)
            assert client.exist(name_of(key))

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        with self.server.dial() as client:
            reply, data = client.get(name_of(key))
            return data if reply[0] == 200 else None

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        store = self.server.store()
        yield store
        store.close()
        clear(self.server)


class TestMemory(OldFrames, StoreContract):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def running(cls) -> Iterator[None]:
        with serving("--max-bytes", "256Mi") as server:
            cls.server = server
            yield


class TestDataDir(OldFrames, StoreContract):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def running(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        path = tmp_path_factory.mktemp("data")
        with serving("--max-bytes", "64Mi", "--data-dir", str(path), "--max-disk-bytes", "256Mi") as server:
            cls.server = server
            yield


class TestOldServer(StoreContract):
    """LMCache's own server, as far as it goes."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        self.server = OldServer()
        store = LMServerStore(Address("127.0.0.1", self.server.port), PATIENT)
        yield store
        store.close()
        self.server.close()

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        self.server.objects[name_of(key)] = ((4, 6, len(data), 0, 0, 0, 0), data)

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        found = self.server.objects.get(name_of(key))
        return found and found[1]


@pytest.fixture
def old() -> Iterator[OldServer]:
    server = OldServer()
    yield server
    server.close()


def old_store(server: OldServer, settings: Settings = PATIENT) -> LMServerStore:
    return LMServerStore(Address("127.0.0.1", server.port), settings)


def test_an_old_server_is_asked_harmlessly_and_never_for_a_list(old: OldServer) -> None:
    store = old_store(old)
    store.put(key_of("a"), views(b"x"))
    store.ping()
    assert set(old.commands) == {5, 1, 3}
    assert all(len(name.split("@")) == 5 for name in old.objects)
    store.close()


def test_a_token_is_not_shown_to_an_old_server_as_if_it_protected_anything(old: OldServer) -> None:
    store = old_store(old, Settings(token="secret", lookup_timeout_s=5))
    with pytest.raises(StoreUnavailable, match="knows no tokens"):
        store.ping()
    store.close()


def test_a_poisoned_object_of_an_old_server_is_unavailable_and_the_next_call_works(old: OldServer) -> None:
    store = old_store(old)
    old.objects[name_of(key_of("bad"))] = ((4, 6, 9, 0, 0, 0, 0), None)
    with pytest.raises(StoreUnavailable):
        get(store, key_of("bad"), 9)
    store.put(key_of("good"), views(b"1"))
    assert get(store, key_of("good"), 1) == b"1"
    store.close()


def test_a_small_object_of_an_old_server_does_not_wait_for_a_delayed_acknowledgement(old: OldServer) -> None:
    key = key_of("small")
    with closing(old_store(old)) as store:
        store.put(key, views(b"x" * 4096))
        times_s = []
        for _ in range(5):
            start = time.monotonic()
            assert get(store, key, 4096) == b"x" * 4096
            times_s.append(time.monotonic() - start)
    assert min(times_s) < 0.035, "Linux acknowledges after 40 ms unless asked"


def test_what_was_deleted_on_an_old_server_comes_back_with_the_next_put(old: OldServer) -> None:
    store = old_store(old)
    store.put(key_of("a"), views(b"x" * 100))
    store.delete([key_of("a")])
    assert old.objects[name_of(key_of("a"))][1] == b""
    store.put(key_of("a"), views(b"y"))
    assert get(store, key_of("a"), 1) == b"y"
    store.close()


@pytest.mark.parametrize("signal_kill", [True, False])
def test_a_restarted_server_is_found_again_by_itself(signal_kill: bool) -> None:
    first = ServerProcess()
    store = first.store()
    store.put(key_of("a"), views(b"1"))
    first.kill() if signal_kill else first.stop()
    with pytest.raises(StoreUnavailable, match=str(first.port)):
        store.exists([key_of("a")])
    with serving(port=first.port):
        assert store.exists([key_of("a")]) == [False]
        store.put(key_of("a"), views(b"2"))
        assert get(store, key_of("a"), 1) == b"2"
    store.close()


def test_connections_that_died_while_idle_cost_no_failure() -> None:
    first = ServerProcess()
    store = first.store()
    threads = [threading.Thread(target=store.put, args=(key_of(str(i)), views(b"x" * MIB))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.kill()
    with serving(port=first.port):
        for _ in range(6):
            assert store.exists([key_of("0")]) == [False]
    store.close()


class Stub:
    """A server that answers every connection with a fixed script of (wait, bytes), then hangs."""

    def __init__(self, *script: tuple[float, bytes]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        self._over = threading.Event()
        self._clients: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                for wait_s, data in self._script:
                    self._over.wait(wait_s)
                    client.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            client.close()


QUICK = Settings(connect_timeout_s=0.3, lookup_timeout_s=0.3, timeout_s=0.5)
OLD_OK = bytes.fromhex("c8000000 00000000 01000000 02000000" + "00000000" * 5)


def reply(code: int, length: int) -> bytes:
    return code.to_bytes(4, "little") + length.to_bytes(4, "little", signed=True) + OLD_OK[8:]


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        ([], StoreTimeout),
        ([(0, OLD_OK)], StoreTimeout),
        ([(0, OLD_OK), (0, reply(200, 10)), *[(0.2, b"x")] * 9], StoreTimeout),
        ([(0, OLD_OK), (0, b"HTTP/1.1 400 Bad Request, this is not a cache server")], StoreUnavailable),
        ([(0, OLD_OK), (0, reply(200, -1))], StoreUnavailable),
        ([(0, reply(200, 1 << 30))], StoreUnavailable),
        ([(0, b"\0" * 36)], StoreUnavailable),
    ],
    ids=["hangs after accept", "hangs in get", "trickles", "another protocol", "negative", "hello with body", "zeros"],
)
def test_a_server_that_misbehaves_costs_one_deadline_at_most(
    script: list[tuple[float, bytes]], failure: type[Exception]
) -> None:
    stub = Stub(*script)
    store = LMServerStore(stub.address, QUICK)
    watch = Stopwatch()
    with pytest.raises(failure):
        get(store, key_of("a"), 10)
    assert watch.took_s() < 1.5
    stub.close()
    store.close()


def test_nobody_listening_is_unavailable_at_once() -> None:
    stub = Stub()
    stub.close()
    store = LMServerStore(stub.address, QUICK)
    for call in (
        lambda: store.exists([key_of("a")]),
        lambda: store.get_into(key_of("a"), []),
        lambda: store.put(key_of("a"), views(b"x")),
        lambda: store.delete([key_of("a")]),
        store.ping,
        store.usage,
    ):
        with pytest.raises((StoreUnavailable, StoreTimeout)):
            call()


def test_no_free_connection_is_a_timeout_not_a_queue() -> None:
    stub = Stub()
    store = LMServerStore(stub.address, Settings(num_connections=1, lookup_timeout_s=0.2, timeout_s=1.0))

    def hold() -> None:
        with pytest.raises((StoreTimeout, StoreUnavailable)):
            store.get_into(key_of("a"), [])

    holder = threading.Thread(target=hold)
    holder.start()
    time.sleep(0.1)
    with pytest.raises(StoreTimeout, match="no connection became free"):
        store.ping()
    stub.close()
    holder.join()


def test_an_object_longer_than_the_server_takes_is_full_and_harms_nothing() -> None:
    with serving("--max-bytes", "8Mi", "--max-object-bytes", "1Mi") as server:
        store = server.store()
        with pytest.raises(StoreFull, match="1048577 bytes, the server takes 1048576"):
            store.put(key_of("a"), views(b"x" * (MIB + 1)))
        store.put(key_of("a"), views(b"x" * MIB))
        assert store.exists([key_of("a")]) == [True]
        store.close()


def test_thousands_of_keys_are_asked_for_in_one_call() -> None:
    with serving() as server:
        store = server.store()
        store.put(key_of("2999"), views(b"x"))
        found = store.exists([key_of(str(index)) for index in range(3000)])
        assert found == [False] * 2999 + [True]
        store.close()


def count_objects(server: ServerProcess) -> int | None:
    with closing(server.store()) as store:
        return store.usage().num_objects


class TestSharded:
    @pytest.fixture
    def servers(self) -> Iterator[list[ServerProcess]]:
        with ThreadPoolExecutor(3) as threads:
            servers = list(threads.map(lambda _: ServerProcess(), range(3)))
        yield servers
        for server in servers:
            server.stop()

    def open(self, servers: list[ServerProcess]) -> ShardedStore:
        url = "lm://" + ",".join(str(server.address) for server in servers)
        store = open_lm(url, {"lookup_timeout_s": 5, "connect_timeout_s": 5})
        assert isinstance(store, ShardedStore)
        return store

    def test_a_dead_shard_costs_its_keys_only_and_comes_back(self, servers: list[ServerProcess]) -> None:
        store = self.open(servers)
        keys = [key_of(str(index)) for index in range(60)]
        for key in keys:
            store.put(key, views(key))
        assert all(store.exists(keys))
        counts = [count_objects(server) for server in servers]
        assert sum(count or 0 for count in counts) == 60
        assert min(count or 0 for count in counts) > 5
        servers[1].kill()
        for _ in range(3):
            assert sum(store.exists(keys)) == 60 - (counts[1] or 0)
        assert store.ping() >= 0
        for key in keys:
            store.put(key, views(key))
            assert get(store, key, 50) in (key, None)
        assert store.num_dropped >= (counts[1] or 0)
        servers[1] = ServerProcess(port=servers[1].port)
        deadline = time.monotonic() + 10
        while not all(store.exists(keys)):
            assert time.monotonic() < deadline
            for key in keys:
                store.put(key, views(key))
            time.sleep(0.05)
        store.delete(keys)
        assert not any(store.exists(keys))
        store.close()
        store.close()

    def test_the_order_of_the_servers_does_not_matter(self, servers: list[ServerProcess]) -> None:
        store, again = self.open(servers), self.open(servers[::-1])
        keys = [key_of(str(index)) for index in range(30)]
        for key in keys:
            store.put(key, views(key))
        assert all(again.exists(keys))
        store.close()
        again.close()

    def test_all_shards_dead_is_unavailable(self, servers: list[ServerProcess]) -> None:
        store = self.open(servers)
        for server in servers:
            server.kill()
        with pytest.raises(StoreUnavailable, match="none of 3 servers answers"):
            store.ping()
        for _ in range(6):
            assert not any(store.exists([key_of(str(index)) for index in range(60)]))
        with pytest.raises(StoreUnavailable, match="none of 3"):
            store.put(key_of("a"), views(b"x"))
        store.close()


def test_the_package_declares_the_store_and_both_commands() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmcache_ext.stores"]["lm"] == f"{open_lm.__module__}:{open_lm.__name__}"
    command = f"{main.__module__}:{main.__name__}"
    assert [project["scripts"][name] for name in ("lmcache_server", "lmcache_experimental_server")] == [command] * 2


def test_urls_of_one_and_of_many_servers() -> None:
    assert parse_addresses("lm://cache:65432") == [Address("cache", 65432)]
    assert parse_addresses("lm://cache:65432/") == [Address("cache", 65432)]
    many = [Address("a", 1), Address("::1", 2), Address("c.d", 3)]
    assert parse_addresses("lm://a:1,[::1]:2,lm://c.d:3,a:1") == many
    assert str(many[1]) == "[::1]:2"


@pytest.mark.parametrize("url", ["lm://", "lm://host", "lm://host:0", "lm://host:65536", "lm://a:1,,b:1", "lm://a:b"])
def test_a_url_without_host_and_port_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected lm://host:65432"):
        open_lm(url, {})


def test_options_are_read_with_and_without_prefix_and_those_of_others_passed_over() -> None:
    settings = parse_options("lm://a:1", {"lm_timeout_s": "3", "num_connections": 2, "redis_x": 1, "capacity_bytes": 9})
    assert (settings.timeout_s, settings.num_connections, settings.tls) == (3.0, 2, None)
    assert parse_options("lm://a:1", {"tls": "false", "tls_ca": "/x"}).tls is None
    assert parse_options("lm://a:1", {"tls": True}).tls is not None
    settings = parse_options("lm://a:1", {"request_timeout": 4, "connection_timeout": 2.5, "tls_enable": True})
    assert (settings.timeout_s, settings.connect_timeout_s, settings.tls is not None) == (4.0, 2.5, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": "soon"}, "timeout_s is 'soon', expected a number above 0"),
        ({"num_connections": 1.5}, "num_connections is 1.5"),
        ({"num_connections": 0}, "num_connections is 0"),
        ({"token": "a", "token_file": "/b"}, "token and token_file are both set"),
        ({"tls_ca": "/does/not/exist"}, "tls: "),
    ],
)
def test_an_option_that_cannot_be_honoured_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_lm("lm://a:1", options)


def test_a_token_file_that_is_missing_is_unavailable(tmp_path: Path) -> None:
    store = LMServerStore(Address("127.0.0.1", 1), Settings(token_file=str(tmp_path / "none")))
    with pytest.raises(StoreUnavailable, match="token_file"):
        store.ping()
