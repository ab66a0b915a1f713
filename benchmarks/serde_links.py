"""Time to first token of a prefix that comes over a slow link, for each serde; next to computing it.

Run: ``python benchmarks/serde_links.py [--repeats 5] [--dtype float32] [--serdes naive cachegen]``. Each serde has an
engine, on one server; a proxy between them lets through so many bits a second, all connections together. The model is
the trained one of `benchmarks/tiny_llama.py`. Before each measurement everything near is forgotten: vLLM's prefix cache
and host memory. Two columns say what no serde can save: a link without a limit, and host memory instead of a link.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engines import CONNECTOR, Engine
from benchmarks.tiny_llama import trained

SERDES = ("naive", "lossless", "cachegen")
GIGABITS = {"1 Gbit/s": 1.0, "5 Gbit/s": 5.0, "10 Gbit/s": 10.0, "no limit": float("inf")}
HOST, COMPUTED = "host memory", "computed"
CHUNK = 256
CHUNKS = 7
TOKENS = CHUNKS * CHUNK + 100
PIECE_BYTES = 256 << 10
CATCH_UP_S = 0.005

Rows = dict[str, dict[str, list[float]]]


class PacedLink:
    """A TCP proxy to `target_port` that forwards at `bits_per_s`, in each direction, all connections together."""

    def __init__(self, target_port: int) -> None:
        self.bits_per_s = float("inf")
        self._target_port = target_port
        self._lock = threading.Lock()
        self._free_at = {"up": 0.0, "down": 0.0}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target_port))
            for source, sink, way in ((client, server, "up"), (server, client, "down")):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(source, sink, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        piece = memoryview(bytearray(PIECE_BYTES))
        with suppress(OSError):
            while count := source.recv_into(piece):
                if (wait_s := self._wait_s(way, count)) > 0:
                    time.sleep(wait_s)
                sink.sendall(piece[:count])
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _wait_s(self, way: str, num_bytes: int) -> float:
        """How long until these bytes are through; who overslept may make up for it."""
        now = time.monotonic()
        with self._lock:
            begin = max(self._free_at[way], now - CATCH_UP_S)
            self._free_at[way] = begin + 8 * num_bytes / self.bits_per_s
            return self._free_at[way] - now


def start_server(stack: ExitStack) -> int:
    """A cache server in memory; its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "lmcache_ext.daemons.lmserver", "127.0.0.1", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return port
        time.sleep(0.1)


def prompt(model: Path, serde: str, number: int) -> list[int]:
    """A prompt of the held-out text that no other serde has: bit-exact ones read each other's chunks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer((model / "held_out.txt").read_text())["input_ids"]
    own: list[int] = tokenizer(f"{serde} {number}\n")["input_ids"]
    return (own + ids[number * 500 :])[:TOKENS]


def measure(serde: str, model: Path, link: PacedLink, options: argparse.Namespace, log: Path) -> dict[str, list[float]]:
    """Seconds by row, for one serde."""
    rows: dict[str, list[float]] = {}
    env = {
        "LMCACHE_CHUNK_SIZE": str(CHUNK),
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5",
        "LMCACHE_REMOTE_URL": f"lm://127.0.0.1:{link.port}",
        "LMCACHE_REMOTE_SERDE": serde,
    }
    settings = {"kv_transfer_config": CONNECTOR, "dtype": options.dtype, "max_model_len": TOKENS + 8}
    with Engine(str(model), core=options.core, log=log, env=env, **settings) as engine:
        for number in range(options.repeats + 1):
            asked = prompt(model, serde, number)
            link.bits_per_s = float("inf")
            cold = engine.ask(asked)
            assert cold["cached"] == 0, cold["cached"]
            time.sleep(1.0)  # written behind
            seconds = {COMPUTED: cold["seconds"]}
            for column, gigabits in (*GIGABITS.items(), (HOST, float("inf"))):
                engine.reset(connector=column != HOST)
                link.bits_per_s = gigabits * 1e9
                answer = engine.ask(asked)
                assert answer["cached"] == CHUNKS * CHUNK, answer["cached"]
                seconds[column] = answer["seconds"]
            for column in seconds if number else ():  # the first prompt warms up
                rows.setdefault(column, []).append(seconds[column])
    return rows


def table(rows: Rows) -> str:
    floors = [HOST, COMPUTED]
    lines = [
        f"| TTFT, ms (share of {next(iter(rows))}) | " + " | ".join([*GIGABITS, *floors]) + " |",
        "|---" * (len(GIGABITS) + len(floors) + 1) + "|",
    ]
    for serde, seconds in rows.items():
        cells = []
        for column in GIGABITS:
            mine, first = (statistics.median(rows[name][column]) for name in (serde, next(iter(rows))))
            cells.append(f"{mine * 1e3:.1f} ({mine / first:.0%})")
        cells += [f"{statistics.median(seconds[column]) * 1e3:.1f}" for column in floors]
        lines.append(f"| {serde} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="bfloat16 where the CPU computes it")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="the one the model computes on")
    parser.add_argument("--serdes", nargs="+", default=SERDES, help="the others are compared with the first")
    options = parser.parse_args()
    model = trained()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        link = PacedLink(start_server(stack))
        rows = {serde: measure(serde, model, link, options, Path(directory, serde)) for serde in options.serdes}
    print(f"{TOKENS} tokens, {CHUNKS * CHUNK} of them fetched, {options.dtype}, core {options.core}")
    print(table(rows))


if __name__ == "__main__":
    main()
