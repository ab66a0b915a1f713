"""The cache server and its peers: an old client's frames, hostile bytes, limits on connections and memory."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from lmcache_ext.errors import StoreFull
from lmcache_ext.stores.lmserver import LMServerStore, Settings
from lmcache_ext.wire import v2
from tests.contracts.store_contract import get, in_threads, key_of, views
from tests.lm_servers import ServerProcess, serving

MIB = 1024**2
KEY = "meta-llama/Llama-3.1-8B-Instruct@1@0@1a2b@bfloat16"


@pytest.fixture(scope="module")
def shared() -> Iterator[ServerProcess]:
    """One server for all tests that neither stop it nor need options."""
    with serving("--max-bytes", "256Mi", "--max-object-bytes", "64Mi", "--read-timeout", "1") as server:
        yield server


# -- an old client works unchanged


def test_an_old_client_gets_what_it_put_with_its_metadata(shared: ServerProcess) -> None:
    with shared.dial() as client:
        data = os.urandom(3 * MIB)
        client.put(KEY, data)
        reply, found = client.get(KEY)
        assert reply == (200, len(data), 1, 3, 2, 32, 256, 1024, 0)
        assert found == data
        assert client.exist(KEY)
        assert not client.exist("nobody@1@0@0@half")
        assert client.get("nobody@1@0@0@half") == ((400, 0, 1, 2, 0, 0, 0, 0, 0), b"")
        assert client.health() == (200, 0, 1, 2, 0, 0, 0, 0, 0)


def test_keys_are_opaque_and_listed(shared: ServerProcess) -> None:
    names = [
        "two@parts",
        "vllm@Qwen/Qwen3-4B@1@0@-5d1b8de6da1b6d09@bfloat16@0",
        "x" * 150,
        "m@2@1@5@nodtype@u%b",
        "/模型/Qwen@1@0@5@half",
    ]
    with shared.dial() as client:
        for index, name in enumerate(names):
            client.put(name, bytes([index]))
        assert set(names) <= set(client.list().split("\n"))
        for index, name in enumerate(names):
            assert client.get(name)[1] == bytes([index])


def test_requests_in_one_segment_are_answered_in_their_order(shared: ServerProcess) -> None:
    with shared.dial() as client:
        frame = client.frame
        client.sock.sendall(
            frame(1, "order@1@0@0@half", 5) + b"first" + frame(2, "order@1@0@0@half")
            + frame(1, "order@1@0@0@half", 0) + frame(3, "order@1@0@0@half") + frame(2, "order@1@0@0@half")
            + frame(5, "a@b@c@d@e") + frame(3, "none@1@0@0@half")
        )  # fmt: skip
        assert client.reply()[:2] == (200, 5)
        assert client.exactly(5) == b"first"
        assert [client.reply()[:2] for _ in range(4)] == [(200, 0), (200, 0), (200, 0), (400, 0)]


def test_both_protocols_see_the_same_objects(shared: ServerProcess) -> None:
    store = shared.store()
    store.put(key_of("both"), views(b"new"))
    with shared.dial() as client:
        name = f"kvcf@1@0@{key_of('both').hex()}@uint8"
        assert client.get(name) == ((200, 3, 4, 6, 3, 0, 0, 0, 0), b"new")
        client.put(name, b"old!")
        assert client.exist(name)
    assert get(store, key_of("both"), 4) == b"old!"
    store.close()


def test_requests_of_version_2_travel_together(shared: ServerProcess) -> None:
    with shared.dial() as client:
        client.change_over()
        ids = range(300)
        client.sock.sendall(b"".join(v2.Request(v2.Op.PUT, i, b"p%d" % i, 3).encode() + b"abc" for i in ids))
        assert {client.reply_v2()[0].request_id for _ in ids} == set(ids)
        client.sock.sendall(b"".join(v2.Request(v2.Op.GET, i, b"p%d" % i, 0, 2).encode() for i in ids))
        replies = [client.reply_v2() for _ in ids]
        assert {reply.request_id for reply, _ in replies} == set(ids)
        assert {(reply.status, reply.value, body) for reply, body in replies} == {(v2.Status.OK, 3, b"ab")}
        assert client.exchange(v2.Op.DELETE, body=v2.encode_keys([b"p1", b"p2", b"none"]))[0].value == 2


# -- hostile peers


@pytest.mark.parametrize("within_v2", [False, True])
def test_a_truncated_put_is_never_visible(shared: ServerProcess, within_v2: bool) -> None:
    name, key = "kvcf@1@0@6375742d@uint8", b"cut-"
    for how in ("close", "reset", "half-close"):
        client = shared.dial()
        if within_v2:
            client.change_over()
            client.sock.sendall(v2.Request(v2.Op.PUT, 1, key, 5 * MIB).encode() + b"x" * 4 * MIB)
        else:
            client.sock.sendall(client.frame(1, name, 5 * MIB) + b"x" * 4 * MIB)
        if how == "reset":
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how == "half-close":
            client.sock.shutdown(socket.SHUT_WR)
            assert client.is_closed()
        client.sock.close()
    with shared.dial() as client:
        assert not client.exist(name)
        assert client.get(name)[0][0] == 400


def test_what_was_asked_before_the_end_of_the_stream_is_answered(shared: ServerProcess) -> None:
    with shared.dial() as client:
        client.put("eof@1@0@0@half", b"x" * 100_000)
        client.sock.sendall(client.frame(2, "eof@1@0@0@half") * 100 + b"and a part of a request")
        client.sock.shutdown(socket.SHUT_WR)
        for _ in range(100):
            assert client.reply()[:2] == (200, 100_000)
            client.exactly(100_000)
        assert client.is_closed()


def test_a_put_that_ends_with_the_stream_counts(shared: ServerProcess) -> None:
    with shared.dial() as client:
        client.put("last@1@0@0@half", b"x" * MIB)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.is_closed()
    with shared.dial() as client:
        assert client.exist("last@1@0@0@half")


def old(command: int, length: int = 0, key: bytes = b"a@b@c@d@e") -> bytes:
    return struct.pack("<9i", command, length, 0, 0, 0, 0, 0, 0, 0) + key.ljust(150)


@pytest.mark.parametrize(
    "data",
    [old(0), old(9), old(-1), old(1, -5), old(2, 1), old(5, 2**31 - 1), old(2, key=b""), old(2, key=b"\xff\xfe"),
     b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10, bytes(186), bytes(range(256)) * 4],
)  # fmt: skip
def test_garbage_is_answered_with_an_error_and_a_closed_connection(shared: ServerProcess, data: bytes) -> None:
    with shared.dial() as client:
        client.sock.sendall(data)
        assert client.reply()[0] == 400
        assert client.is_closed()


@pytest.mark.parametrize(
    "data",
    [bytes(24), b"\xc2" * 24, v2.Request(v2.Op.GET, 1).encode(), struct.pack("<BBHIQQ", 0xC2, 2, 1, 1, 2**63, 0) + b"k",
     v2.Request(v2.Op.EXISTS, 1, body_bytes=3).encode() + b"\xff\xff\xff"],
)  # fmt: skip
def test_garbage_in_version_2_is_refused_and_closed(shared: ServerProcess, data: bytes) -> None:
    with shared.dial() as client:
        client.change_over()
        client.sock.sendall(data)
        reply, message = client.reply_v2()
        assert reply.status == v2.Status.REFUSED
        assert message
        assert client.is_closed()


def test_an_oversized_put_is_refused_and_an_old_client_keeps_its_connection(shared: ServerProcess) -> None:
    with shared.dial() as client:
        client.put("big@1@0@0@half", bytes(65 * MIB))
        assert not client.exist("big@1@0@0@half")
    with shared.dial() as client:
        client.change_over()
        client.sock.sendall(v2.Request(v2.Op.PUT, 1, b"big", 2**40).encode())
        reply, message = client.reply_v2()
        assert (reply.status, message) == (v2.Status.FULL, b"1099511627776 bytes, objects may have 67108864")
        assert client.is_closed()


def test_a_request_that_trickles_is_cut_off(shared: ServerProcess) -> None:
    """Slowloris: a byte now and then keeps nothing alive. All of these at once."""
    hello = old(5, key=v2.HELLO_NAME.encode())
    starts = {
        "head": b"\x01",
        "body": old(1, 50_000),
        "head of version 2": hello + b"\xc2\x02",
        "body of version 2": hello + v2.Request(v2.Op.PUT, 1, b"slow", 50_000).encode(),
    }
    with ThreadPoolExecutor(len(starts)) as threads:
        found = threads.map(lambda start: is_cut_off(shared, start), starts.values())
        assert dict(zip(starts, found, strict=True)) == dict.fromkeys(starts, True)


def is_cut_off(server: ServerProcess, start: bytes) -> bool:
    """Whether the server closes a connection that sends this, and then a byte now and then."""
    with server.dial() as client:
        client.sock.sendall(start)
        closed = threading.Event()

        def trickle() -> None:
            while not closed.wait(0.1):
                try:
                    client.sock.sendall(b"\0")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        was_closed = client.is_closed(within_s=8)
        closed.set()
        thread.join()
    return was_closed


def test_replies_that_nobody_reads_are_cut_off_and_hold_no_memory() -> None:
    with serving("--max-bytes", "64Mi", "--max-object-bytes", "16Mi", "--read-timeout", "0.5") as server:
        store = server.store()
        store.put(key_of("big"), views(bytes(16 * MIB)))
        client = server.dial()
        client.change_over()
        client.sock.sendall(b"".join(v2.Request(v2.Op.GET, i, key_of("big"), 0, 16 * MIB).encode() for i in range(500)))
        deadline = time.monotonic() + 8
        while "timeouts_total 1" not in metrics_of(store):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for index in range(4):
            store.put(key_of(str(index)), views(bytes(15 * MIB)))
        client.sock.close()
        store.close()


def metrics_of(store: LMServerStore) -> str:
    with store._pool.link(5.0) as link:
        return "".join(f"{name}_total {value}\n" for name, value in link.stats().items())


def test_a_thousand_idle_and_64_busy_connections_hold(shared: ServerProcess) -> None:
    """All 64 are open at once, and none waits for another to close; the idle ones are still answered afterwards."""
    with ExitStack() as stack:
        idle = [stack.enter_context(shared.dial()) for _ in range(1000)]
        assert all(client.health()[0] == 200 for client in idle)
        busy = Settings(num_connections=64, lookup_timeout_s=20, timeout_s=20, connect_timeout_s=20)
        store = shared.store(busy)

        def work(index: int) -> None:
            keys = [key_of(f"busy {index} {turn}") for turn in range(4)]
            data = bytes([index]) * 300_000
            assert store.put_many(keys, [views(data)] * 4) == [None] * 4
            assert [get(store, key, len(data)) for key in keys] == [data] * 4
            with store._pool.link(20) as link:
                all_open.wait(20)
                assert link.stats()["num_connections"] >= 1064

        all_open = threading.Barrier(64)
        in_threads(64, work)
        assert all(client.health()[0] == 200 for client in idle)
        store.close()


def test_one_connection_too_many_is_closed_and_room_comes_back() -> None:
    with serving("--max-connections", "200") as server, ExitStack() as stack:
        clients = [stack.enter_context(server.dial()) for _ in range(200)]
        for client in clients:
            assert client.health()[0] == 200
        with server.dial() as late:
            assert late.is_closed()
        clients[0].sock.close()
        deadline = time.monotonic() + 5
        while True:
            with server.dial() as client:
                try:
                    assert client.health()[0] == 200
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)


# -- the bound on memory


@pytest.mark.parametrize("policy", ["lru", "s3-fifo", "arc"])
def test_memory_stays_under_its_limit_while_many_put(policy: str) -> None:
    limit = 24 * MIB
    with serving("--max-bytes", str(limit), "--max-object-bytes", "6Mi", "--policy", policy) as server:
        before = server.resident_bytes()
        store = server.store(Settings(num_connections=12, lookup_timeout_s=20, timeout_s=20, connect_timeout_s=20))
        peaks: list[int] = []
        over = threading.Event()

        def sample() -> None:
            while not over.wait(0.005):
                peaks.append(server.resident_bytes())

        def work(index: int) -> None:
            for turn in range(8):
                size = (1 + (index * 7 + turn * 3) % 10) * MIB // 2
                try:
                    store.put(key_of(f"{index}-{turn}"), views(bytes([turn]) * size))
                except StoreFull:
                    continue
                data = get(store, key_of(f"{index}-{turn}"), size)
                assert data is None or data == bytes([turn]) * size

        sampler = threading.Thread(target=sample)
        sampler.start()
        in_threads(12, work)
        over.set()
        sampler.join()
        usage = store.usage()
        assert usage.used_bytes is not None
        assert usage.used_bytes <= limit == usage.capacity_bytes
        assert max(peaks) - before <= limit + 16 * MIB  # what Python and 12 connections need themselves
        assert usage.num_objects
        store.close()


def test_the_oldest_makes_room_and_a_hit_keeps() -> None:
    with serving("--max-bytes", "10Mi", "--max-object-bytes", "4Mi") as server:
        store = server.store()
        for name in "abc":
            store.put(key_of(name), views(bytes(3 * MIB)))
        get(store, key_of("a"), 3 * MIB)
        store.put(key_of("d"), views(bytes(3 * MIB)))
        assert store.exists([key_of(name) for name in "abcd"]) == [True, False, True, True]
        store.close()
