"""Batches of objects at cache servers: sent ahead, answered in any order, failing one by one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lmcache_ext.errors import StoreFull, StoreUnavailable
from lmcache_ext.stores.lmserver import LMServerStore, Settings, open_lm
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.wire import lm, v2
from tests.contracts.store_contract import Landing, key_of, views
from tests.lm_servers import ServerProcess, serving

MIB = 1024**2
KEYS = [key_of(f"batch {index}") for index in range(4)]
GETS = 4 * (v2.HEAD_BYTES + len(KEYS[0]))


@contextmanager
def scripted(answer: Callable[[socket.socket], None]) -> Iterator[LMServerStore]:
    """A store at a server that introduces itself, and then does what `answer` does, once."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(lm.REQUEST_BYTES, socket.MSG_WAITALL)
            client.sendall(v2.hello_reply().encode())
            client.recv(v2.HEAD_BYTES, socket.MSG_WAITALL)
            can = v2.Capabilities(MIB, 100, 128).encode()
            client.sendall(v2.Reply(v2.Status.OK, 1, len(can)).encode() + can)
            answer(client)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    store = LMServerStore(Address("127.0.0.1", listener.getsockname()[1]), Settings(timeout_s=5.0))
    try:
        yield store
    finally:
        store.close()
        thread.join(10)
        listener.close()


def found(request_id: int, data: bytes) -> bytes:
    return v2.Reply(v2.Status.OK, request_id, len(data), len(data)).encode() + data


def test_all_are_asked_for_at_once_and_answered_in_any_order() -> None:
    def answer(client: socket.socket) -> None:
        client.recv(GETS, socket.MSG_WAITALL)
        miss = v2.Reply(v2.Status.MISS, 3).encode()
        client.sendall(found(5, b"three") + miss + found(2, b"zero") + found(4, b"two"))

    with scripted(answer) as store:
        landings = [Landing([5]) for _ in KEYS]
        assert store.get_many_into(KEYS, [landing.parts() for landing in landings]) == [4, None, 3, 5]
        assert [landing.data().rstrip(b"\0") for landing in landings] == [b"zero", b"", b"two", b"three"]


def test_all_are_sent_before_the_first_is_acknowledged() -> None:
    def answer(client: socket.socket) -> None:
        client.recv(GETS + 4 * 1000, socket.MSG_WAITALL)
        no = v2.Reply(v2.Status.FULL, 3, 2).encode() + b"no"
        client.sendall(no + b"".join(v2.Reply(v2.Status.OK, request_id).encode() for request_id in (5, 4, 2)))

    with scripted(answer) as store:
        kept = store.put_many(KEYS, [views(b"x" * 1000) for _ in KEYS])
        assert [type(outcome) for outcome in kept] == [type(None), StoreFull, type(None), type(None)]


@pytest.mark.parametrize("rest", [b"", found(4, b"half")[:-1], found(99, b"what"), b"\0" * 24])
def test_what_came_before_the_connection_failed_stands(rest: bytes) -> None:
    def answer(client: socket.socket) -> None:
        client.recv(GETS, socket.MSG_WAITALL)
        client.sendall(found(3, b"good") + rest)

    with scripted(answer) as store:
        landings = [Landing([4]) for _ in KEYS]
        outcomes = store.get_many_into(KEYS, [landing.parts() for landing in landings])
        assert outcomes[1] == 4
        assert landings[1].data() == b"good"
        assert all(isinstance(outcomes[index], StoreUnavailable) for index in (0, 2, 3))


def test_what_is_too_long_or_has_no_room_fails_alone() -> None:
    with serving("--max-bytes", "8Mi", "--max-object-bytes", "2Mi") as server:
        store = server.store()
        objects = [os.urandom(size) for size in (MIB, 2 * MIB + 1, 10, 2 * MIB)]
        kept = store.put_many(KEYS, [views(data) for data in objects])
        assert [type(outcome) for outcome in kept] == [type(None), StoreFull, type(None), type(None)]
        assert store.exists(KEYS) == [True, False, True, True]
        store.close()


def test_a_dead_shard_costs_its_share_of_a_batch() -> None:
    servers = [ServerProcess() for _ in range(3)]
    try:
        store = open_lm("lm://" + ",".join(str(server.address) for server in servers), {"connect_timeout_s": 5})
        keys = [key_of(str(index)) for index in range(60)]
        assert store.put_many(keys, [views(key) for key in keys]) == [None] * 60
        servers[2].kill()
        landings = [Landing([len(key)]) for key in keys]
        lengths = store.get_many_into(keys, [landing.parts() for landing in landings])
        is_lost = [length is None for length in lengths]
        assert 5 < sum(is_lost) < 55
        assert all(lost or landing.data() == key for lost, landing, key in zip(is_lost, landings, keys, strict=True))
        assert store.put_many(keys, [views(key) for key in keys]) == [None] * 60
        assert store.exists(keys) == [not lost for lost in is_lost]
        store.close()
    finally:
        for server in servers:
            server.stop()
