"""Batches of objects in Redis: sent ahead over one connection, and failing one by one."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import redis

from lmcache_ext.errors import StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.resp_parts import slot_of
from tests import servers
from tests.contracts.store_contract import Landing, get, key_of, views
from tests.stopwatch import Stopwatch
from tests.unit.test_redis_faults import opened, played

MIB = 1024**2
KEYS = [key_of(f"batch {index}") for index in range(6)]


def read_lines(sock: socket.socket, num_lines: int) -> None:
    """A command of n words is 2n + 1 lines, where its words have none."""
    lines = 0
    while lines < num_lines:
        lines += sock.recv(65536).count(b"\r\n")


def test_all_objects_are_asked_for_before_the_first_comes() -> None:
    def play(sock: socket.socket) -> None:
        read_lines(sock, 6 * 5)
        sock.sendall(b"$1\r\nx\r\n" * 6)

    with played(play) as address, opened(f"redis://{address}", request_timeout_s=5.0) as store:
        assert store.get_many_into(KEYS, [Landing([1]).parts() for _ in KEYS]) == [1] * 6


def test_all_objects_are_sent_before_the_first_is_acknowledged() -> None:
    def play(sock: socket.socket) -> None:
        read_lines(sock, 6 * (9 + 7))
        sock.sendall(b"$0\r\n\r\n+OK\r\n" * 6)

    with played(play) as address, opened(f"redis://{address}", request_timeout_s=5.0) as store:
        assert store.put_many(KEYS, [views(b"x") for _ in KEYS]) == [None] * 6


def test_what_came_before_the_connection_was_lost_stands() -> None:
    def play(sock: socket.socket) -> None:
        read_lines(sock, 6 * 5)
        sock.sendall(b"$3\r\none\r\n$-1\r\n$3\r\nth")
        sock.close()

    with played(play) as address, opened(f"redis://{address}", request_timeout_s=5.0) as store:
        landings = [Landing([3]) for _ in KEYS]
        found = store.get_many_into(KEYS, [landing.parts() for landing in landings])
        assert found[:2] == [3, None]
        assert landings[0].data() == b"one"
        assert all(isinstance(outcome, StoreUnavailable) for outcome in found[2:])


@pytest.mark.parametrize("answered", [b"", b"+OK\r\n", b"$0\r\n\r\n+OK\r\n"])
def test_a_server_that_stops_answering_costs_one_deadline_for_all(answered: bytes) -> None:
    def play(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(answered)
        time.sleep(60)

    with played(play) as address, opened(f"redis://{address}", request_timeout_s=0.2) as store:
        watch = Stopwatch()
        kept = store.put_many(KEYS, [views(os.urandom(MIB)) for _ in KEYS])
        assert watch.took_s() < 1.0
        assert all(isinstance(outcome, StoreTimeout) for outcome in kept)


def test_what_has_no_room_fails_alone(tmp_path: Path) -> None:
    flags = ["--maxmemory", "8mb", "--maxmemory-policy", "noeviction"]
    with servers.server("redis", tmp_path, *flags) as server, opened(f"redis://{server.address}") as store:
        sizes = [10, 12 * MIB, 1000, 30 * MIB, 5]
        kept = store.put_many(KEYS[:5], [views(os.urandom(size)) for size in sizes])
        assert [type(outcome) for outcome in kept] == [type(None), StoreFull, type(None), StoreFull, type(None)]
        assert store.exists(KEYS[:5]) == [True, False, True, False, True]
        assert servers.command(server.port, "DBSIZE") == b":3\r\n", "parts of nothing stay behind"


def test_an_object_that_misses_a_part_is_a_miss_alone(tmp_path: Path) -> None:
    with servers.server("redis", tmp_path) as server, opened(f"redis://{server.address}", part_bytes=1000) as store:
        objects = [os.urandom(size) for size in (4500, 4500, 100, 4500)]
        store.put_many(KEYS[:4], [views(data) for data in objects])
        client = redis.Redis(port=server.port)
        client.delete(next(iter(client.scan_iter(f"{{*{KEYS[1][16:].hex()}*:3"))))
        landings = [Landing([len(data)]) for data in objects]
        assert store.get_many_into(KEYS[:4], [landing.parts() for landing in landings]) == [4500, None, 100, 4500]
        assert [landings[index].data() == objects[index] for index in (0, 2, 3)] == [True] * 3
        assert client.dbsize() == 5 + 1 + 5
        client.close()


@pytest.mark.redis
def test_a_dead_node_costs_its_share_of_a_batch(tmp_path: Path) -> None:
    with servers.cluster("redis", tmp_path) as nodes:
        for node in nodes:
            servers.command(node.port, "CONFIG", "SET", "cluster-require-full-coverage", "no")
        keys = [key_of(str(index)) for index in range(30)]
        with opened(f"redis-cluster://{nodes[0].address}", request_timeout_s=1.0) as store:
            assert store.put_many(keys, [views(key) for key in keys]) == [None] * 30
            nodes[0].kill()
            is_lost = [slot_of(key) < 16384 // 3 for key in keys]
            found = store.get_many_into(keys, [Landing([len(key)]).parts() for key in keys])
            kept = store.put_many(keys, [views(b"anew") for _ in keys])
            assert [isinstance(outcome, StoreUnavailable) for outcome in found] == is_lost
            assert [isinstance(outcome, StoreUnavailable) for outcome in kept] == is_lost
            assert 0 < sum(is_lost) < 30
            assert get(store, keys[is_lost.index(False)], 4) == b"anew"
