"""Bytes per second to and from each store, as a share of what a bare socket moves in the same run.

    .venv/bin/python benchmarks/stores.py [--sizes 128K 4M] [--flights 1 2 4 8] [--seconds 0.3] [--rows redis lm]

Starts redis-server, valkey-server and cache servers on loopback. N in flight are one batch of N objects, of one thread;
8 are two threads with a batch of 4 each, as an engine's pool has them. The bare socket has as many connections and
sends as far ahead. "bare RESP" is the least a client of Redis can do, with values of at most 256 KiB, as far ahead as
the store: what Redis itself can. Puts have new keys; what was put before is deleted between, off the clock. All rows
take turns, so that a busy machine slows every row alike; shares of the socket are medians over the turns. CPU seconds
per GB are the client's and the server's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import redis

from lmcache_ext.stores.base import Store
from lmcache_ext.stores.lmserver import open_lm
from lmcache_ext.stores.registry import open_store
from tests import servers
from tests.lm_servers import ServerProcess

MIB = 1024**2
NAMESPACE = bytes(16)
PIECE_BYTES = MIB // 4
SHAPES = {1: (1, 1), 2: (1, 2), 4: (1, 4), 8: (2, 4)}
"""Threads, and objects of each thread's batch, by how many are in flight."""

PATIENT = {"request_timeout_s": 60.0}
LM_PATIENT = {"timeout_s": 60.0, "lookup_timeout_s": 60.0, "connect_timeout_s": 60.0}
Views = Sequence[memoryview]


class Mover:
    """One way to move a batch of objects; each thread has names of its own. Methods are called by its thread."""

    def put(self, thread: int, views: Views) -> None: ...

    def get(self, thread: int, views: Views) -> None: ...

    def forget(self, thread: int) -> None:
        """Delete what the thread put."""


class StoreMover(Mover):
    def __init__(self, store: Store) -> None:
        self._store = store
        self._numbers = itertools.count()
        self._keys: dict[int, list[bytes]] = {}

    def put(self, thread: int, views: Views) -> None:
        self._keys[thread] = keys = [NAMESPACE + b"%d %d" % (thread, next(self._numbers)) for _ in views]
        errors = self._store.put_many(keys, [[view] for view in views])
        assert not any(errors), errors

    def get(self, thread: int, views: Views) -> None:
        found = self._store.get_many_into(self._keys[thread], [[view] for view in views])
        assert found == [view.nbytes for view in views], found

    def forget(self, thread: int) -> None:
        self._store.delete(self._keys.pop(thread, []))


class RedisPy(Mover):
    """redis-py's own pipeline of SET and GET."""

    def __init__(self, port: int) -> None:
        self._client = redis.Redis(port=port)

    def put(self, thread: int, views: Views) -> None:
        pipe = self._client.pipeline(transaction=False)
        for index, view in enumerate(views):
            pipe.set(f"py {thread} {index}", view)
        pipe.execute()

    def get(self, thread: int, views: Views) -> None:
        pipe = self._client.pipeline(transaction=False)
        for index in range(len(views)):
            pipe.get(f"py {thread} {index}")
        assert all(pipe.execute())

    def forget(self, thread: int) -> None:
        self._client.unlink(*(f"py {thread} {index}" for index in range(8)))


class BareResp(Mover):
    """What Redis itself can: fixed commands, replies compared as bytes, payloads received where they belong."""

    WRITES_AHEAD = 2
    READS_AHEAD = 3

    def __init__(self, port: int, num_threads: int) -> None:
        self._socks = [connected(port) for _ in range(num_threads)]
        self._num_pieces = [0] * num_threads

    def put(self, thread: int, views: Views) -> None:
        sock, waiting = self._socks[thread], 0
        pieces = cut(views)
        self._num_pieces[thread] = len(pieces)
        for index, piece in enumerate(pieces):
            name = b"bare %d %d" % (thread, index)
            send_all(
                sock, [b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, piece.nbytes), piece, b"\r\n"]
            )
            waiting += 1
            while waiting == self.WRITES_AHEAD or (waiting and index == len(pieces) - 1):
                assert sock.recv(5, socket.MSG_WAITALL) == b"+OK\r\n"
                waiting -= 1

    def get(self, thread: int, views: Views) -> None:
        sock, pieces, asked = self._socks[thread], cut(views), 0
        for index, piece in enumerate(pieces):
            while asked < len(pieces) and asked - index < self.READS_AHEAD:
                name = b"bare %d %d" % (thread, asked)
                sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
                asked += 1
            head, tail = bytearray(len(b"$%d\r\n" % piece.nbytes)), bytearray(2)
            came, *_ = sock.recvmsg_into([head, piece, tail], 0, socket.MSG_WAITALL)
            assert came == len(head) + piece.nbytes + 2

    def forget(self, thread: int) -> None:
        sock = self._socks[thread]
        for index in range(self._num_pieces[thread]):
            name = b"bare %d %d" % (thread, index)
            sock.sendall(b"*2\r\n$6\r\nUNLINK\r\n$%d\r\n%b\r\n" % (len(name), name))
            sock.recv(4, socket.MSG_WAITALL)


class RawSocket(Mover):
    """The floor: a process that receives into one buffer and says so, or sends from it."""

    def __init__(self, port: int, num_threads: int) -> None:
        self._socks = [connected(port) for _ in range(num_threads)]

    def put(self, thread: int, views: Views) -> None:
        sock = self._socks[thread]
        for view in views:
            send_all(sock, [b"p" + view.nbytes.to_bytes(8, "little"), view])
        sock.recv(len(views), socket.MSG_WAITALL)

    def get(self, thread: int, views: Views) -> None:
        sock = self._socks[thread]
        sock.sendall(b"".join(b"g" + view.nbytes.to_bytes(8, "little") for view in views))
        for view in views:
            sock.recv_into(view, 0, socket.MSG_WAITALL)


def connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send_all(sock: socket.socket, buffers: Sequence[bytes | memoryview]) -> None:
    total = sum(memoryview(buffer).nbytes for buffer in buffers)
    assert sock.sendmsg(buffers) == total, "a blocking socket sends all, unless a signal comes"


def cut(views: Views) -> list[memoryview]:
    return [view[at : at + PIECE_BYTES] for view in views for at in range(0, view.nbytes, PIECE_BYTES)]


def serve_raw(listener: socket.socket) -> None:
    """The other end of `RawSocket`, a thread for each connection."""

    def serve(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(64 * MIB))
        while head := sock.recv(9, socket.MSG_WAITALL):
            size = int.from_bytes(head[1:], "little")
            if head[:1] == b"p":
                sock.recv_into(buffer, size, socket.MSG_WAITALL)
                sock.sendall(b"k")
            else:
                sock.sendall(buffer[:size])

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@contextlib.contextmanager
def raw_server() -> Iterator[tuple[int, int]]:
    """Port and process id."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=serve_raw, args=(listener,), daemon=True)
        process.start()
        assert process.pid is not None
        yield listener.getsockname()[1], process.pid
        process.kill()


class Row(NamedTuple):
    name: str
    mover: Mover
    server_pid: int | None


@dataclass
class Turns:
    """What a row did in its turns, in one direction."""

    gb_per_s: list[float] = field(default_factory=list)
    gb: float = 0.0
    client_cpu_s: float = 0.0
    server_cpu_s: float = 0.0


def measure(row: Row, direction: str, values: list[Views], seconds: float, turns: Turns) -> None:
    """One turn: batches until so many seconds were spent in them; threads begin each batch together."""
    mover = row.mover
    move = mover.put if direction == "put" else mover.get
    server_before = cpu_s(row.server_pid)
    spent_s = cpu = 0.0
    num_batches = 0
    with ThreadPoolExecutor(len(values)) as pool:
        in_threads = functools.partial(run_all, pool, len(values))
        while spent_s < seconds:
            if direction == "put":
                in_threads(lambda thread: mover.forget(thread))
            cpu_before, began = time.process_time(), time.perf_counter()
            in_threads(lambda thread: move(thread, values[thread]))
            spent_s += time.perf_counter() - began
            cpu += time.process_time() - cpu_before
            num_batches += 1
    gb = num_batches * sum(view.nbytes for views in values for view in views) / 1e9
    turns.gb_per_s.append(gb / spent_s)
    turns.gb += gb
    turns.client_cpu_s += cpu
    turns.server_cpu_s += cpu_s(row.server_pid) - server_before


def run_all(pool: ThreadPoolExecutor, num_threads: int, call: Callable[[int], None]) -> None:
    if num_threads == 1:
        call(0)
    else:
        list(pool.map(call, range(num_threads)))


def cpu_s(pid: int | None) -> float:
    """CPU seconds of a process so far, to the nanosecond, of its living threads."""
    if pid is None:
        return 0.0
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def table(rows: list[Row], size: int, flight: int, seconds: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Print the rows for one size and number in flight; the shares of the socket, put and get."""
    threads, batch = SHAPES[flight]
    values: list[Views] = [[memoryview(bytearray(os.urandom(size))) for _ in range(batch)] for _ in range(threads)]
    found = {(row.name, direction): Turns() for row in rows for direction in ("put", "get")}
    for _ in range(rounds):
        for row in rows:
            for direction in ("put", "get"):
                measure(row, direction, values, seconds / rounds, found[row.name, direction])
    for row in rows:
        for thread in range(threads):
            row.mover.forget(thread)
    print(
        f"\n{shown(size)}, {flight} in flight: {'put GB/s':>10}  of raw {'get GB/s':>10}  of raw   CPU s/GB put, get: ",
        end="",
    )
    print("client      server")
    shares = {}
    for row in rows:
        put, get = found[row.name, "put"], found[row.name, "get"]
        shares[row.name] = (share(put, found[rows[0].name, "put"]), share(get, found[rows[0].name, "get"]))
        numbers = [statistics.median(turns.gb_per_s) for turns in (put, get)]
        cpu = [turns.client_cpu_s / turns.gb for turns in (put, get)] + [t.server_cpu_s / t.gb for t in (put, get)]
        of_raw = shares[row.name]
        print(
            f"  {row.name:24} {numbers[0]:8.2f} {of_raw[0]:7.0%} {numbers[1]:10.2f} {of_raw[1]:7.0%}"
            f"{'':20}{cpu[0]:5.2f} {cpu[1]:5.2f}  {cpu[2]:5.2f} {cpu[3]:5.2f}",
            flush=True,
        )
    return shares


def share(turns: Turns, floor: Turns) -> float:
    return statistics.median(mine / raw for mine, raw in zip(turns.gb_per_s, floor.gb_per_s, strict=True))


def shown(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB"


def milliseconds_of_exists(store: Store, num_keys: int = 64) -> float:
    keys = [NAMESPACE + b"key %d" % index for index in range(num_keys)]
    times = []
    for _ in range(300):
        began = time.perf_counter()
        store.exists(keys)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def open_rows(stack: ExitStack, directory: Path, wanted: Sequence[str]) -> tuple[list[Row], dict[str, Store]]:
    num_threads = max(threads for threads, _ in SHAPES.values())
    raw_port, raw_pid = stack.enter_context(raw_server())
    rows = [Row("raw TCP socket", RawSocket(raw_port, num_threads), raw_pid)]
    stores: dict[str, Store] = {}

    def add(name: str, store: Store, pid: int | None) -> None:
        stores[name] = store
        stack.callback(store.close)
        rows.append(Row(name, StoreMover(store), pid))

    for kind in ("redis", "valkey"):
        if kind not in wanted:
            continue
        path = str(directory / f"{kind}.sock")
        server = stack.enter_context(servers.server(kind, directory, "--unixsocket", path))
        assert server._process is not None
        pid = server._process.pid
        add(kind, open_store(f"{kind}://{server.address}", options=PATIENT), pid)
        rows.append(Row(f"{kind}, bare RESP", BareResp(server.port, num_threads), pid))
        if kind == "redis":
            rows.append(Row("redis, redis-py", RedisPy(server.port), pid))
            add("redis, Unix socket", open_store(f"unix://{path}", options=PATIENT), pid)
    if "lm" in wanted:
        lm = ServerProcess("--max-bytes", "2Gi")
        stack.callback(lm.stop)
        add("lm server", open_lm(f"lm://127.0.0.1:{lm.port}", LM_PATIENT), lm.process.pid)
        data_dir = ["--data-dir", str(directory / "lm"), "--max-disk-bytes", "4Gi"]
        kept = ServerProcess("--max-bytes", "2Gi", *data_dir)
        stack.callback(kept.stop)
        add("lm server, data directory", open_lm(f"lm://127.0.0.1:{kept.port}", LM_PATIENT), kept.process.pid)
    if "disk" in wanted:
        add("disk", open_store(f"file://{directory}/disk", capacity_bytes=4096 * MIB), None)
    return rows, stores


def size_of(text: str) -> int:
    found = re.fullmatch(r"([0-9]+)([KM])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected such as 128K or 4M")
    return int(found[1]) * {"K": 1024, "M": MIB}[found[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size_of, nargs="+", default=[128 * 1024, MIB, 4 * MIB, 16 * MIB, 32 * MIB])
    parser.add_argument("--flights", type=int, nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--seconds", type=float, default=0.3, help="per row and direction, in all rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=["redis", "valkey", "lm", "disk"])
    arguments = parser.parse_args()
    shares: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows, stores = open_rows(stack, directory, arguments.rows)
        for size in arguments.sizes:
            for flight in arguments.flights:
                for name, pair in table(rows, size, flight, arguments.seconds, arguments.rounds).items():
                    shares.setdefault(name, []).append(pair)
        print("\nof raw, median over all of these: " + "put (target >= 80 %), get (target >= 85 %)")
        for name, pairs in shares.items():
            put, get = (statistics.median(side) for side in zip(*pairs, strict=True))
            print(f"  {name:24} {put:7.0%} {get:7.0%}")
        print("\nexists of 64 keys, ms (target <= 1)")
        for name, store in stores.items():
            print(f"  {name:24} {milliseconds_of_exists(store):7.3f}")


if __name__ == "__main__":
    main()
