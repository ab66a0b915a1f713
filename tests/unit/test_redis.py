"""Redis: the contract against real servers, by every way to reach one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis

from lmcache_ext.stores.base import Store
from lmcache_ext.stores.registry import open_store
from lmcache_ext.stores.resp_parts import MANIFEST_BYTES, new_manifest, parse_manifest, redis_key
from tests import servers
from tests.contracts.store_contract import StoreContract, get, key_of, views

OPTIONS = {"request_timeout_s": 10.0}
MIB = 1024**2


class RedisBypass:
    """Reads and writes objects by redis-py, without the store. Inherit and give `client`."""

    @pytest.fixture(autouse=True)
    def _bypass(self, client: redis.Redis) -> None:
        self.raw = client

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        self.raw.set(redis_key(key), data)

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        data = self.raw.get(redis_key(key))
        manifest = None if data is None else parse_manifest(data, key)
        if manifest is None:
            return data
        parts = [self.raw.get(name) for name in manifest.part_keys(key)]
        return data[MANIFEST_BYTES:] + b"".join(part for part in parts if part is not None)


def emptied(client: redis.Redis) -> redis.Redis:
    client.flushall()
    return client


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    directory = tmp_path_factory.mktemp("redis")
    flags = ["--unixsocket", str(directory / "redis.sock")]
    with servers.server("redis", directory, *flags) as server:
        yield server


@pytest.fixture
def client(redis_server: servers.Server) -> redis.Redis:
    return emptied(redis.Redis(port=redis_server.port))


def closing(url: str, **options: object) -> Iterator[Store]:
    store = open_store(url, options={**OPTIONS, **options})
    yield store
    store.close()


class TestRedis(RedisBypass, StoreContract):
    @pytest.fixture
    def store(self, redis_server: servers.Server) -> Iterator[Store]:
        yield from closing(f"redis://{redis_server.address}")


class TestRedisInSmallParts(RedisBypass, StoreContract):
    """Every object longer than 160 KiB in parts of 64 KiB, with a time to live that hits renew."""

    @pytest.fixture
    def store(self, redis_server: servers.Server) -> Iterator[Store]:
        yield from closing(f"resp://{redis_server.address}", part_bytes=65536, ttl_s=60, ttl_touch=True)


class TestRedisUnix(RedisBypass, StoreContract):
    @pytest.fixture
    def client(self, redis_server: servers.Server) -> redis.Redis:
        return emptied(redis.Redis(port=redis_server.port, db=3))

    @pytest.fixture
    def store(self, redis_server: servers.Server) -> Iterator[Store]:
        yield from closing(f"unix://{redis_server.directory.parent}/redis.sock?db=3")


class TestRedisOverOneConnection(RedisBypass, StoreContract):
    @pytest.fixture
    def store(self, redis_server: servers.Server) -> Iterator[Store]:
        yield from closing(f"redis://{redis_server.address}/0", num_connections=1)


@pytest.fixture(scope="module")
def sentinel(redis_server: servers.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    directory = tmp_path_factory.mktemp("sentinel")
    with servers.sentinels("redis", directory, redis_server, service="mymaster") as found:
        yield found[0]


class TestRedisSentinel(RedisBypass, StoreContract):
    @pytest.fixture
    def store(self, sentinel: servers.Server) -> Iterator[Store]:
        yield from closing(f"redis-sentinel://127.0.0.1:1,{sentinel.address}/mymaster")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[servers.Server]]:
    with servers.cluster("redis", tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


class TestRedisCluster(RedisBypass, StoreContract):
    @pytest.fixture
    def client(self, nodes: list[servers.Server]) -> Iterator[redis.RedisCluster]:
        with redis.RedisCluster(host="127.0.0.1", port=nodes[0].port) as client:
            yield emptied(client)

    @pytest.fixture
    def store(self, nodes: list[servers.Server]) -> Iterator[Store]:
        yield from closing(f"redis-cluster://{nodes[0].address},{nodes[1].address}")

    def test_keys_are_spread_and_asked_in_one_call(self, store: Store, nodes: list[servers.Server]) -> None:
        keys = [key_of(str(index)) for index in range(60)]
        for key in keys:
            store.put(key, views(key))
        assert store.exists([*keys, key_of("none")]) == [True] * 60 + [False]
        counts = [int(redis.Redis(port=node.port).dbsize()) for node in nodes]
        assert sum(counts) == 60
        assert min(counts) > 5
        store.delete(keys)
        assert store.exists(keys) == [False] * 60

    def test_all_parts_of_an_object_are_on_one_node(self, store: Store, nodes: list[servers.Server]) -> None:
        store.put(key_of("large"), views(os.urandom(9 * MIB)))
        assert sorted(int(redis.Redis(port=node.port).dbsize()) for node in nodes) == [0, 0, 36]


def test_an_object_in_parts_and_back_in_one_piece(redis_server: servers.Server, client: redis.Redis) -> None:
    store = open_store(f"redis://{redis_server.address}", options={"part_bytes": 1000, "num_connections": 3})
    for size in (5000, 100, 48, 3001, 3000, 2501, 2500, 0, 9999):
        data = os.urandom(size)
        store.put(key_of("a"), views(data))
        assert get(store, key_of("a"), size) == data
    lives_s = sorted(client.ttl(name) for name in client.scan_iter())
    assert lives_s[:10] == [-1] * 10, "the manifest with one part and nine others stay"
    assert all(0 < life_s <= 15 for life_s in lives_s[10:]), "what they replaced does not"
    store.delete([key_of("a")])
    assert store.exists([key_of("a")]) == [False]
    assert all(client.ttl(name) > 0 for name in client.scan_iter()), "an old generation that does not expire"
    store.close()


def test_an_object_that_looks_like_a_manifest_is_an_object(redis_server: servers.Server, client: redis.Redis) -> None:
    store = open_store(f"redis://{redis_server.address}")
    for rest in (b"", b"and more", b"x" * 3 * MIB):
        forged = new_manifest(10**9).encode(key_of("a")) + rest
        store.put(key_of("a"), views(forged[:10], forged[10:]))
        assert get(store, key_of("a"), len(forged)) == forged
    store.close()
