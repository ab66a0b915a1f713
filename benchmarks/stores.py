"""Bytes per second of stores by value size, next to a raw socket and redis-py's own get and set in the same run.

    .venv/bin/python benchmarks/stores.py [--seconds 0.5] [--sizes 1 4 16 32] [--threads 1 2]

Starts its own redis-server on loopback. Values are written under new keys and the last is read back into the same
buffer; rounds of all rows by turns, so that a busy machine slows every row alike. Prints medians, GB/s.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import redis

from lmcache_ext.stores.base import Store
from lmcache_ext.stores.registry import open_store
from tests import servers

MIB = 1024**2
NAMESPACE = bytes(16)
LIMIT = ["--maxmemory", "768mb", "--maxmemory-policy", "allkeys-lru"]
"""As a cache is run: memory is soon full, and new values take the place of old ones."""


class Row(NamedTuple):
    """One way to move a value; `index` says which thread's."""

    name: str
    put: Callable[[int, memoryview], object]
    get: Callable[[int, memoryview], object]


class Keys:
    """A new key for every put, as a cache sees it; a get asks for the thread's last."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def new(self, index: int) -> bytes:
        self._last[index] = self._last.get(index, 0) + 1
        return self.last(index)

    def last(self, index: int) -> bytes:
        return NAMESPACE + b"%d-%d" % (index, self._last[index])


def of_store(name: str, store: Store) -> Row:
    keys = Keys()
    return Row(
        name,
        lambda index, value: store.put(keys.new(index), [value]),
        lambda index, value: store.get_into(keys.last(index), [value]),
    )


def of_redis_py(name: str, client: redis.Redis) -> Row:
    keys = Keys()
    return Row(
        name,
        lambda index, value: client.set(keys.new(index) + b"plain", value),
        lambda index, value: client.get(keys.last(index) + b"plain"),
    )


class RawSocket:
    """The floor: as many bytes over loopback, to or from a thread that does nothing else."""

    def __init__(self, num_threads: int) -> None:
        self._pairs = [self._pair() for _ in range(num_threads)]

    def row(self) -> Row:
        return Row("raw TCP socket", self._put, self._get)

    def _pair(self) -> socket.socket:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return ours

    def _serve(self, sock: socket.socket) -> None:
        """`p` or `g` and a length: receive so much, or send it."""
        buffer = memoryview(bytearray(64 * MIB))
        while head := sock.recv(9, socket.MSG_WAITALL):
            size = int.from_bytes(head[1:], "little")
            if head[:1] == b"p":
                sock.recv_into(buffer, size, socket.MSG_WAITALL)
                sock.sendall(b"k")
            else:
                sock.sendall(buffer[:size])

    def _put(self, index: int, value: memoryview) -> None:
        self._pairs[index].sendall(b"p" + value.nbytes.to_bytes(8, "little"))
        self._pairs[index].sendall(value)
        self._pairs[index].recv(1)

    def _get(self, index: int, value: memoryview) -> None:
        self._pairs[index].sendall(b"g" + value.nbytes.to_bytes(8, "little"))
        self._pairs[index].recv_into(value, 0, socket.MSG_WAITALL)


def measure(call: Callable[[int, memoryview], object], values: list[memoryview], seconds: float) -> float:
    """GB/s of all threads together."""
    end = time.perf_counter() + seconds

    def work(index: int) -> int:
        count = 0
        while time.perf_counter() < end:
            call(index, values[index])
            count += 1
        return count

    started_at = time.perf_counter()
    if len(values) == 1:
        count = work(0)
    else:
        with ThreadPoolExecutor(len(values)) as pool:
            count = sum(pool.map(work, range(len(values))))
    return count * values[0].nbytes / (time.perf_counter() - started_at) / 1e9


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def print_table(rows: list[Row], size_mib: int, num_threads: int, seconds: float, rounds: int) -> None:
    values = [memoryview(bytearray(os.urandom(size_mib * MIB))) for _ in range(num_threads)]
    found: dict[str, list[tuple[float, float, float]]] = {row.name: [] for row in rows}
    for _ in range(rounds):
        for row in rows:
            put = measure(row.put, values, seconds / rounds)
            before, started_at = cpu_s(), time.perf_counter()
            get = measure(row.get, values, seconds / rounds)
            cpu_per_gb = (cpu_s() - before) / (get * (time.perf_counter() - started_at))
            found[row.name].append((put, get, cpu_per_gb))
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    print(
        f"\n{size_mib} MiB, {num_threads} in flight     put GB/s   x redis-py    get GB/s   x redis-py   CPU s/GB get"
    )
    for name, (put, get, cpu) in medians.items():
        base = medians["redis-py unix" if "unix" in name else "redis-py TCP"]
        print(f"  {name:24} {put:9.2f} {put / base[0]:11.2f} {get:11.2f} {get / base[1]:11.2f} {cpu:11.2f}")


def measure_exists(store: Store, num_keys: int = 64) -> None:
    keys = [NAMESPACE + b"key %d" % index for index in range(num_keys)]
    times = []
    for _ in range(200):
        started_at = time.perf_counter()
        store.exists(keys)
        times.append(time.perf_counter() - started_at)
    print(f"\nexists of {num_keys} keys, {store.name}: {statistics.median(times) * 1e3:.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="per row and direction")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 32], help="MiB")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = str(directory / "redis.sock")
        server = stack.enter_context(servers.server("redis", directory, "--unixsocket", path, *LIMIT))
        stores = {
            "redis TCP": open_store(f"redis://{server.address}"),
            "redis unix": open_store(f"unix://{path}"),
            "disk": open_store(f"file://{directory}/disk", capacity_bytes=768 * MIB),
        }
        rows = [RawSocket(max(arguments.threads)).row()]
        rows += [of_store(name, store) for name, store in stores.items()]
        rows.append(of_redis_py("redis-py TCP", redis.Redis(port=server.port)))
        rows.append(of_redis_py("redis-py unix", redis.Redis(unix_socket_path=path)))
        for size_mib in arguments.sizes:
            for num_threads in arguments.threads:
                print_table(rows, size_mib, num_threads, arguments.seconds, arguments.rounds)
        measure_exists(stores["redis TCP"])
        for store in stores.values():
            store.close()


if __name__ == "__main__":
    main()
