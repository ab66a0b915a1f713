"""What the lm server moves in a second, next to a bare socket pair that moves the same bytes.

    python benchmarks/lmserver.py [--sizes 4 32] [--threads 1 4] [--seconds 1] [--data-dir DIR]

GB/s of object bytes on loopback, best of three turns; the bare socket is one sender and one receiver
thread with `sendall` and `recv_into` in two processes. `exists` is the median of one call for 64 keys.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lmcache_ext.stores.lmserver import LMServerStore, Settings  # noqa: E402
from lmcache_ext.stores.lmserver_socket import Address  # noqa: E402

MIB = 1024**2
TURNS = 3


def key_of(index):
    return b"benchmark-space!" + index.to_bytes(4, "little")


def repeat(num_threads, seconds, call):
    """How often `call(thread, turn)` returned per second, from several threads; the best of TURNS."""
    best = 0.0
    for _ in range(TURNS):
        counts = [0] * num_threads
        until = time.perf_counter() + seconds

        def work(thread, counts=counts, until=until):
            while time.perf_counter() < until:
                call(thread, counts[thread])
                counts[thread] += 1

        started = time.perf_counter()
        threads = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(counts) / (time.perf_counter() - started))
    return best


def drain(listener, size):
    """The other end of the bare socket: receive objects of `size` into one buffer, for ever."""
    client, _ = listener.accept()
    buffer = memoryview(bytearray(size))
    while True:
        view = buffer
        while len(view):
            came = client.recv_into(view)
            if came == 0:
                return
            view = view[came:]


def bare_socket(size, seconds):
    """GB/s of sendall into another process's recv_into."""
    listener = socket.create_server(("127.0.0.1", 0))
    other = multiprocessing.get_context("fork").Process(target=drain, args=(listener, size), daemon=True)
    other.start()
    with socket.create_connection(listener.getsockname()) as sock:
        data = os.urandom(size)
        rate = repeat(1, seconds, lambda *_: sock.sendall(data))
    other.join()
    listener.close()
    return rate * size / 1e9


def start_server(options):
    command = [sys.executable, "-m", "lmcache_ext.daemons.lmserver", "127.0.0.1", "0", *options]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if "listening on" in line:
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, int(line.rsplit(":", 1)[1])
    raise SystemExit("the server did not start")


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(server, store, size, num_threads, seconds):
    """PUT and GET in GB/s, and the server's CPU seconds per GB of both."""
    data = [memoryview(os.urandom(size)) for _ in range(num_threads)]
    room = [memoryview(bytearray(size)) for _ in range(num_threads)]
    rates = []
    for call in (
        lambda thread, turn: store.put(key_of(thread * 4 + turn % 4), [data[thread]]),
        lambda thread, turn: store.get_into(key_of(thread * 4 + turn % 4), [room[thread]]),
    ):
        cpu = cpu_seconds(server.pid)
        started = time.perf_counter()
        per_second = repeat(num_threads, seconds, call)
        moved = per_second * size * (time.perf_counter() - started) / 1e9
        rates += [per_second * size / 1e9, (cpu_seconds(server.pid) - cpu) / max(moved, 1e-9)]
    return rates


def exists_of_64_keys(store):
    keys = [key_of(index) for index in range(64)]
    times = []
    for _ in range(200):
        started = time.perf_counter()
        store.exists(keys)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 32], help="MiB")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()
    options = ["--max-bytes", "2Gi", *(["--data-dir", arguments.data_dir] if arguments.data_dir else [])]
    server, port = start_server(options)
    patient = Settings(connect_timeout_s=10, lookup_timeout_s=10, timeout_s=30)
    store = LMServerStore(Address("127.0.0.1", port), patient)
    try:
        print(f"{'MiB':>4} {'threads':>7} {'bare':>6} {'put':>6} {'get':>6}   GB/s      server CPU s/GB put, get")
        for size in arguments.sizes:
            for num_threads in arguments.threads:
                bare = bare_socket(size * MIB, arguments.seconds / 2)
                put, put_cpu, get, get_cpu = measure(server, store, size * MIB, num_threads, arguments.seconds)
                print(f"{size:4} {num_threads:7} {bare:6.2f} {put:6.2f} {get:6.2f} {put_cpu:22.2f} {get_cpu:5.2f}")
        print(f"exists of 64 keys: {exists_of_64_keys(store) * 1e3:.3f} ms")
    finally:
        store.close()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
