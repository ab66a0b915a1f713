"""Valkey 9 by valkey-py: the contract against real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from lmcache_ext.stores.base import Store
from tests import servers
from tests.contracts.store_contract import StoreContract
from tests.unit.test_redis import RedisBypass, closing, emptied


@pytest.fixture(scope="module")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.server("valkey", tmp_path_factory.mktemp("valkey"), "--requirepass", "open sesame/@:%") as server:
        yield server


@pytest.fixture(scope="module")
def valkey_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[servers.Server]]:
    with servers.cluster("valkey", tmp_path_factory.mktemp("valkey-cluster")) as nodes:
        yield nodes


class TestValkey(RedisBypass, StoreContract):
    """With the options as LMCache names them in its file, a password that needs quoting, and a time to live."""

    @pytest.fixture
    def client(self, valkey_server: servers.Server) -> redis.Redis:
        return emptied(redis.Redis(port=valkey_server.port, db=5, password="open sesame/@:%"))

    @pytest.fixture
    def store(self, valkey_server: servers.Server) -> Iterator[Store]:
        login = {"username": "default", "password": "open sesame/@:%"}
        yield from closing(f"valkey://{valkey_server.address}", **login, database=5, ttl_s=100)

    def test_everything_expires(self, store: Store, client: redis.Redis) -> None:
        store.put(b"k" * 20, [memoryview(bytes(6 * 1024**2))])
        assert [0 < client.ttl(name) <= 100 for name in client.scan_iter()] == [True] * 24


class TestValkeyCluster(RedisBypass, StoreContract):
    @pytest.fixture
    def client(self, valkey_nodes: list[servers.Server]) -> Iterator[redis.RedisCluster]:
        with redis.RedisCluster(host="127.0.0.1", port=valkey_nodes[0].port) as client:
            yield emptied(client)

    @pytest.fixture
    def store(self, valkey_nodes: list[servers.Server]) -> Iterator[Store]:
        yield from closing(f"valkey://{valkey_nodes[1].address}", mode="cluster")


class TestValkeySentinel(RedisBypass, StoreContract):
    @pytest.fixture
    def client(self, valkey_master: servers.Server) -> redis.Redis:
        return emptied(redis.Redis(port=valkey_master.port))

    @pytest.fixture
    def store(self, valkey_sentinel: servers.Server) -> Iterator[Store]:
        yield from closing(f"valkey-sentinel://{valkey_sentinel.address}", sentinel_service="redismaster")


@pytest.fixture(scope="module")
def valkey_master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.server("valkey", tmp_path_factory.mktemp("valkey-master")) as master:
        yield master


@pytest.fixture(scope="module")
def valkey_sentinel(
    valkey_master: servers.Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[servers.Server]:
    with servers.sentinels("valkey", tmp_path_factory.mktemp("valkey-sentinel"), valkey_master) as found:
        yield found[0]
