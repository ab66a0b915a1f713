"""Other ways to reach Redis: over TLS, after a failover, in a cluster that changes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from lmcache_ext.errors import StoreError, StoreStalled, StoreUnavailable
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.registry import open_store
from lmcache_ext.stores.resp_parts import redis_key, slot_of
from tests import servers
from tests.certificates import Authority
from tests.contracts.store_contract import StoreContract, get, key_of, views
from tests.faulty_proxy import Fault, Proxy
from tests.unit.test_redis import RedisBypass, closing, emptied
from tests.unit.test_redis_faults import opened


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and redis.pem and redis.key of 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")
    Authority(folder, "ca").issue("redis", ["127.0.0.1"])
    return folder


@pytest.fixture(scope="module")
def tls_server(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    files = {"cert": "redis.pem", "key": "redis.key", "ca-cert": "ca.pem"}
    flags = [word for name, file in files.items() for word in (f"--tls-{name}-file", str(certificates / file))]
    user = ["--user", *["kv", "on", ">s3cret", "~*", "&*", "+@all"], "--tls-auth-clients", "no"]
    with servers.server("redis", tmp_path_factory.mktemp("tls"), *flags, *user, tls=True) as server:
        yield server


class TestRedisTls(RedisBypass, StoreContract):
    """With an ACL user, and the server's certificate verified."""

    @pytest.fixture
    def client(self, tls_server: servers.Server, certificates: Path) -> redis.Redis:
        return emptied(
            redis.Redis(port=tls_server.port, ssl=True, ssl_ca_certs=str(certificates / "ca.pem"), host="127.0.0.1")
        )

    @pytest.fixture
    def store(self, tls_server: servers.Server, certificates: Path) -> Iterator[Store]:
        url = f"rediss://kv:s3cret@{tls_server.address}?ssl_ca_certs={certificates / 'ca.pem'}"
        yield from closing(url, part_bytes=1024**2)


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_a_certificate_that_nobody_vouches_for_is_refused(scheme: str, tls_server: servers.Server) -> None:
    store = open_store(f"{scheme}://kv:s3cret@{tls_server.address}")
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        store.ping()
    store.close()


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_a_certificate_of_another_host_is_refused(scheme: str, tls_server: servers.Server, certificates: Path) -> None:
    authority = f"kv:s3cret@localhost:{tls_server.port}"
    store = open_store(f"{scheme}://{authority}?ssl_ca_certs={certificates / 'ca.pem'}")
    with pytest.raises(StoreUnavailable, match="mismatch"):
        store.ping()
    store.close()


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_a_fetch_over_tls_that_stops_in_the_middle_has_stalled(
    scheme: str, tls_server: servers.Server, certificates: Path
) -> None:
    data = os.urandom(1024**2)
    with contextlib.closing(Proxy(tls_server.port)) as proxy, ExitStack() as stack:
        url = f"{scheme}://kv:s3cret@{proxy.address}?ssl_ca_certs={certificates / 'ca.pem'}"
        store = stack.enter_context(opened(url, request_timeout_s=30.0, stall_timeout_s=0.1))
        store.put(key_of("stalls"), views(data))
        proxy.behave(Fault("stall", beyond=8192, way="down"))
        started_at = time.monotonic()
        with pytest.raises(StoreStalled, match="stopped in the middle"):
            get(store, key_of("stalls"), len(data))
        assert time.monotonic() - started_at < 15, "given up long before its deadline"
        assert proxy.has_struck.is_set()
        proxy.behave()
        assert get(store, key_of("stalls"), len(data)) == data


def test_a_plain_client_of_a_tls_server_is_unavailable(tls_server: servers.Server) -> None:
    store = open_store(f"redis://{tls_server.address}", options={"request_timeout_s": 1.0})
    with pytest.raises(StoreError):
        store.ping()
    store.close()


@pytest.mark.e2e
@pytest.mark.redis
@pytest.mark.parametrize("kind", ["redis", "valkey"])
def test_a_failover_is_followed(kind: str, tmp_path: Path) -> None:
    with (
        servers.replicated(kind, tmp_path) as (master, replica),
        servers.sentinels(kind, tmp_path, master) as (sentinel,),
    ):
        servers.until(lambda: b"slaves=1" in servers.command(sentinel.port, "INFO", "sentinel"), "replica known", 15)
        store = open_store(f"{kind}-sentinel://{sentinel.address}", options={"request_timeout_s": 1.0})
        store.put(key_of("before"), views(b"1"))
        servers.until(lambda: b":1" in servers.command(replica.port, "DBSIZE"), "replicated")
        master.kill()
        servers.until(lambda: stored(store, key_of("after")), "writes go to the new master", 20)
        assert get(store, key_of("before"), 1) == b"1"
        assert get(store, key_of("after"), 5) == b"after"
        store.close()


@pytest.mark.e2e
@pytest.mark.redis
def test_a_master_that_was_demoted_is_left(tmp_path: Path) -> None:
    """READONLY: the connection still stands, but it leads to a replica now."""
    with (
        servers.replicated("redis", tmp_path) as (master, _),
        servers.sentinels("redis", tmp_path, master) as (sentinel,),
    ):
        servers.until(lambda: b"slaves=1" in servers.command(sentinel.port, "INFO", "sentinel"), "replica known", 15)
        store = open_store(f"redis-sentinel://{sentinel.address}", options={"request_timeout_s": 1.0})
        assert stored(store, key_of("a"))
        failover = ("SENTINEL", "FAILOVER", "redismaster")
        servers.until(lambda: b"+OK" in servers.command(sentinel.port, *failover), "a good replica is known", 15)
        servers.until(lambda: b"role:slave" in servers.command(master.port, "INFO", "replication"), "demoted", 15)
        servers.until(lambda: stored(store, key_of("b")), "writes go to the new master", 10)
        store.close()


def stored(store: Store, key: bytes) -> bool:
    try:
        store.put(key, views(key[16:]))
    except StoreError:
        return False
    return True


def test_sentinels_and_servers_have_passwords_of_their_own(tmp_path: Path) -> None:
    more = ["requirepass watch", "sentinel auth-pass redismaster data"]
    with (
        servers.server("redis", tmp_path, "--requirepass", "data") as master,
        servers.sentinels("redis", tmp_path, master, more=more) as (sentinel,),
    ):
        store = open_store(f"redis-sentinel://:data@{sentinel.address}", options={"sentinel_password": "watch"})
        assert stored(store, key_of("a"))
        store.close()
        store = open_store(f"redis-sentinel://:data@{sentinel.address}")
        with pytest.raises(StoreUnavailable, match="access denied"):
            store.ping()
        store.close()


def test_nobody_knows_the_service(tmp_path: Path) -> None:
    with (
        servers.server("redis", tmp_path) as master,
        servers.sentinels("redis", tmp_path, master) as (sentinel,),
    ):
        store = open_store(f"redis-sentinel://{sentinel.address}/another")
        with pytest.raises(StoreUnavailable, match="does not know it"):
            store.ping()
        store.close()


@pytest.mark.e2e
def test_slots_that_move_are_followed(tmp_path: Path) -> None:
    with servers.cluster("redis", tmp_path) as nodes:
        store = open_store(f"redis-cluster://{nodes[0].address}", options={"part_bytes": 1000})
        key = key_of("moving")
        data = os.urandom(2600)
        store.put(key, views(data))
        owner = min(index for index in range(3) if slot_of(key) < 16384 * (index + 1) // 3)
        source, target = nodes[owner], nodes[(owner + 1) % 3]
        ids = {node.port: servers.command(node.port, "CLUSTER", "MYID").split(b"\r\n")[1] for node in nodes}
        servers.command(target.port, "CLUSTER", "SETSLOT", slot_of(key), "IMPORTING", ids[source.port])
        servers.command(source.port, "CLUSTER", "SETSLOT", slot_of(key), "MIGRATING", ids[target.port])
        names = list(redis.Redis(port=source.port).scan_iter())
        assert len(names) == 3
        for name in names:
            servers.command(source.port, "MIGRATE", "127.0.0.1", target.port, name, 0, 1000)
        assert get(store, key, 2600) is None  # ASK: a miss while it moves
        for node in (target, source):
            servers.command(node.port, "CLUSTER", "SETSLOT", slot_of(key), "NODE", ids[target.port])
        assert get(store, key, 2600) == data
        assert store.exists([key]) == [True]
        assert redis.Redis(port=target.port).exists(redis_key(key)) == 1
        store.close()


@pytest.mark.e2e
@pytest.mark.redis
def test_a_dead_node_costs_its_own_keys_only(tmp_path: Path) -> None:
    with servers.cluster("redis", tmp_path) as nodes:
        for node in nodes:
            servers.command(node.port, "CONFIG", "SET", "cluster-require-full-coverage", "no")
        store = open_store(f"redis-cluster://{nodes[0].address}", options={"request_timeout_s": 1.0})
        keys = [key_of(str(index)) for index in range(30)]
        for key in keys:
            store.put(key, views(b"x"))
        nodes[0].kill()
        found = [found_or_none(store, key) for key in keys]
        lost = [index for index, key in enumerate(keys) if slot_of(key) < 16384 // 3]
        assert [index for index, data in enumerate(found) if data is None] == lost
        assert 0 < len(lost) < 30
        store.close()


def found_or_none(store: Store, key: bytes) -> bytes | None:
    try:
        return get(store, key, 1)
    except StoreError:
        return None
