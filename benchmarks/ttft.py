"""Time to first token: cold, vLLM's own prefix-cache hit, and our hits, paired in one run.

Run: ``python benchmarks/ttft.py [--tokens 4000 --repeats 7 --rounds 16 --core 0 --out benchmarks/results]``; with
``--only hits`` or ``--only overheads`` the other half of the report stays as it is.

Engines are held ready on one core and asked by turns, in an order drawn anew each time; every turn
uses a prompt of its own, so each hit is a first hit. Prompt lengths are chosen so that vLLM's prefix
cache (blocks of 128 on CPU) and a chunk of 256 reuse exactly the same number of tokens. "second process"
is an engine that never saw the prompt and shares only the directory.

Overheads have rounds of their own. Decoding is measured twice: right after a cold prefill, while its KV
travels to host memory (and disk), and in more rounds of one prompt, when there is nothing left to store. Two
rows tell what an overhead means: a second engine without a cache (how much two equal engines differ), and
the same engine while this process, on the cores that the engine leaves free, does nothing but write as
many bytes to the same disk (what the bytes themselves cost).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engines import CONNECTOR, DTYPE, Engine
from benchmarks.paired import Ratio, ratio, rounds
from examples.tiny_model import build

BLOCK, CHUNK = 128, 256
TOKEN_BYTES = 8192
CHUNK_BYTES = CHUNK * TOKEN_BYTES
DECODED = 65
DECODE_ROUNDS = 5
"""For each of the overheads': what there is to be seen is smaller, and a round is over sooner."""
SETTLE_S = 0.3
"""The write-behind of 30 MB is over by then."""

SIDES = {"plain": "vLLM alone", "block": "chunk = block", "chunk": "chunk 256"}
TARGETS = {
    "host hit, chunk = block": 1.2,
    "host hit, chunk 256": 1.2,
    "disk hit, chunk = block": 1.6,
    "disk hit, chunk 256": 1.6,
    "second process, chunk 256": 1.6,
}
Rows = dict[str, list[float]]


def prompt(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 264) for _ in range(num_tokens)]


HITS = ["plain", "block", "chunk", "second"]
OVERHEADS = ["plain", "twin", "host", "chunk"]
CACHES = {
    "block": (BLOCK, "kv-block"),
    "chunk": (CHUNK, "kv-chunk"),
    "second": (CHUNK, "kv-chunk"),
    "host": (CHUNK, None),
}
"""Of the engines that have one: tokens of a chunk, and the directory of its disk."""


@contextmanager
def engines_for(names: Iterable[str], directory: Path, core: int, tokens: int) -> Iterator[dict[str, Engine]]:
    """Started side by side, warm, and ended side by side."""
    with ExitStack() as stack:
        started = {name: start(name, directory, core, tokens) for name in names}
        engines = {name: stack.enter_context(engine) for name, engine in started.items()}
        for engine in engines.values():
            stack.callback(engine.hang_up)
            for _ in range(3):
                engine.ask(prompt(999_999, tokens), max_tokens=DECODED)
        yield engines


def start(name: str, directory: Path, core: int, tokens: int) -> Engine:
    model = str(build(Path(".cache/models/tiny-llama")))
    shared = {"core": core, "max_model_len": tokens + 2 * DECODED, "log": directory / f"{name}.log"}
    if name not in CACHES:
        return Engine(model, **shared)
    chunk, disk = CACHES[name]
    transfer = {**CONNECTOR, "kv_connector_extra_config": {"lmcache.chunk_size": chunk}}
    env = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "1"}
    if disk is not None:
        env |= {"LMCACHE_LOCAL_DISK": str(directory / disk), "LMCACHE_MAX_LOCAL_DISK_SIZE": "8"}
    return Engine(model, env=env, kv_transfer_config=transfer, **shared)


def note(rows: Rows, row: str, seconds: float) -> None:
    rows.setdefault(row, []).append(seconds)


def measure_hits(engines: dict[str, Engine], tokens: int, repeats: int) -> Rows:
    rows: Rows = {}
    for repeat, names in rounds(["plain", "block", "chunk"], repeats, seed=1):
        asked = prompt(repeat, tokens)
        for name in names:
            cold, hit = one_engine(engines[name], asked, name)
            note(rows, f"cold, {SIDES[name]}", cold)
            for row, seconds in hit.items():
                note(rows, row, seconds)
        second = engines["second"].ask(asked)
        assert second["cached"] == reused(tokens), second["cached"]
        note(rows, "second process, chunk 256", second["seconds"])
    return rows


def measure_overheads(engines: dict[str, Engine], tokens: int, num_rounds: int, writer: Writer) -> Rows:
    """Each side's first token and its decoding meanwhile, seconds; the n-th of each row belong to the same round."""
    rows: Rows = {}
    for index, names in rounds(["plain", "twin", "host", "chunk", "bytes"], num_rounds, seed=2):
        for place, name in enumerate(names):
            fresh = prompt(10_000 + 10 * index + place, tokens)
            if name == "bytes":
                estimate = statistics.median(rows.get("first token, twin", [0.5]))
                with writer.after(estimate):
                    answer = engines["twin"].ask(fresh, max_tokens=DECODED)
            else:
                answer = engines[name].ask(fresh, max_tokens=DECODED)
            assert answer["cached"] == 0
            time.sleep(SETTLE_S)
            note(rows, f"first token, {name}", answer["first"])
            note(rows, f"decode while storing, {name}", answer["per_token"])
    return rows


def measure_decode(engines: dict[str, Engine], tokens: int, num_rounds: int) -> Rows:
    """Decoding of each side when there is nothing left to store, seconds per token."""
    rows: Rows = {}
    asked = prompt(9_999, tokens)
    for engine in engines.values():
        engine.ask(asked)
    time.sleep(SETTLE_S)
    for _, names in rounds(OVERHEADS, num_rounds, seed=3):
        for name in names:
            note(rows, f"decode, {name}", engines[name].ask(asked, max_tokens=DECODED)["per_token"])
    return rows


class Writer:
    """Writes what a prompt's chunks would, on the cores that the engines leave free."""

    def __init__(self, directory: Path, core: int, num_bytes: int) -> None:
        self._directory = directory
        self._cores = (os.sched_getaffinity(0) - {core}) or os.sched_getaffinity(0)
        self._chunks = [random.Random(i).randbytes(CHUNK_BYTES) for i in range(num_bytes // CHUNK_BYTES)]
        self._written = 0
        directory.mkdir()

    @contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        """Inside, everything is written once, beginning so many seconds from now."""
        timer = threading.Timer(seconds, self._write)
        timer.start()
        yield
        timer.join()

    def _write(self) -> None:
        os.sched_setaffinity(0, self._cores)
        for chunk in self._chunks:
            self._written += 1  # no file is removed: its pages would be had for less than new ones
            temporary = self._directory / "temporary"
            temporary.write_bytes(chunk)
            temporary.rename(self._directory / str(self._written))


def one_engine(engine: Engine, asked: list[int], name: str) -> tuple[float, dict[str, float]]:
    cold = engine.ask(asked)
    assert cold["cached"] == 0
    time.sleep(SETTLE_S)
    if name == "plain":
        return cold["seconds"], {"vLLM's own prefix-cache hit": expect(engine, asked)}
    found = {}
    for tier in ("host", "disk"):
        engine.reset(connector=tier == "disk")
        before = lookup_seconds(engine)
        found[f"{tier} hit, {SIDES[name]}"] = expect(engine, asked)
        found[f"lookup, {tier} hit, {SIDES[name]}"] = lookup_seconds(engine) - before
    return cold["seconds"], found


def expect(engine: Engine, asked: list[int]) -> float:
    answer = engine.ask(asked)
    assert answer["cached"] == reused(len(asked)), (answer["cached"], reused(len(asked)))
    return float(answer["seconds"])


def reused(tokens: int) -> int:
    return tokens // CHUNK * CHUNK


def table(rows: Rows) -> str:
    floor = rows["vLLM's own prefix-cache hit"]
    lines = [f"{'':32} {'median ms':>10} {'min':>9} {'max':>9}   x prefix hit (95 % CI)  target"]
    for name, seconds in rows.items():
        if name.startswith("lookup"):
            continue
        target = f"<= {TARGETS[name]}" if name in TARGETS else ""
        lines.append(
            f"{name:32} {statistics.median(seconds) * 1e3:10.2f} {min(seconds) * 1e3:9.2f} {max(seconds) * 1e3:9.2f}   "
            f"{ratio(seconds, floor)!s:22}  {target}"
        )
    for name, seconds in rows.items():
        if name.startswith("lookup"):
            lines.append(f"{name}: {statistics.median(seconds) * 1e6:.0f} us of the scheduler's (target <= 100)")
    return "\n".join(lines)


def overheads(rows: Rows) -> dict[str, Ratio]:
    """Of each side to the mean of both engines without a cache in its round; "noise" is one of these to the other."""

    def alone(row: str) -> list[float]:
        pairs = zip(rows[f"{row}, plain"], rows[f"{row}, twin"], strict=True)
        return [statistics.mean(pair) for pair in pairs]

    cold, storing, steady = "first token", "decode while storing", "decode"
    found = {}
    for name, row, side in (
        ("cold TTFT, storing to host memory", cold, "host"),
        ("cold TTFT, storing to host memory and disk", cold, "chunk"),
        ("decode, nothing to store, host memory", steady, "host"),
        ("decode, nothing to store, host memory and disk", steady, "chunk"),
        ("decode while storing to host memory", storing, "host"),
        ("decode while storing to host memory and disk", storing, "chunk"),
        ("decode while another process writes the bytes", storing, "bytes"),
    ):
        found[name] = ratio(rows[f"{row}, {side}"], alone(row))
    for row in (cold, steady, storing):
        found[f"(noise) {row}, two engines without a cache"] = ratio(rows[f"{row}, twin"], rows[f"{row}, plain"])
    return found


def lookup_seconds(engine: Engine) -> float:
    """Of all lookups so far: time in the scheduler, every asking again of a request that waits included."""
    return engine.metrics().get("vllm:kv_offload_lookup_sync_delay_seconds_sum", 0.0)


def plot(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        name: seconds
        for name, seconds in rows.items()
        if name.endswith(("hit", "block", "256")) and not name.startswith(("cold", "lookup"))
    }
    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    axes.boxplot([[s * 1e3 for s in seconds] for seconds in shown.values()], orientation="horizontal", widths=0.6)
    axes.set_yticks(range(1, len(shown) + 1), list(shown))
    axes.set_xlabel("time to first token, ms")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["hits", "overheads"], help="measure a half of the rows")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=7, help="of the hits")
    parser.add_argument("--rounds", type=int, default=16, help="of the overheads")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    tokens = reused(options.tokens) + 100  # the prefix cache of 128-token blocks stops at the same boundary
    print(f"{tokens} tokens, {reused(tokens)} reused by every hit, {DTYPE}, core {options.core}")
    if options.only != "overheads":
        with (
            tempfile.TemporaryDirectory() as directory,
            engines_for(HITS, Path(directory), options.core, tokens) as engines,
        ):
            hits = measure_hits(engines, tokens, options.repeats)
        print(f"\n{options.repeats} prompts\n{table(hits)}", flush=True)
        save(options.out, tokens, "hits", {"seconds": hits})
        plot(hits, options.out / "ttft.png")
    if options.only != "hits":
        with (
            tempfile.TemporaryDirectory() as directory,
            engines_for(OVERHEADS, Path(directory), options.core, tokens) as engines,
        ):
            writer = Writer(Path(directory) / "bytes", options.core, reused(tokens) * TOKEN_BYTES)
            stored = measure_overheads(engines, tokens, options.rounds, writer)
            stored |= measure_decode(engines, tokens, DECODE_ROUNDS * options.rounds)
        shares = overheads(stored)
        print(f"\noverheads, {options.rounds} paired rounds (target <= 2 %)")
        print("\n".join(f"{name:56} {share.overhead}" for name, share in shares.items()))
        ratios = {name: share._asdict() for name, share in shares.items()}
        save(options.out, tokens, "overheads", {"ratios": ratios, "seconds": stored})


def save(directory: Path, tokens: int, part: str, found: dict[str, object]) -> None:
    """Write one part of the report, and leave the other as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "ttft.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: report[name] for name in ("hits", "overheads") if name in report}
    machine = {"tokens": tokens, "dtype": DTYPE, "machine": platform.processor()}
    path.write_text(json.dumps({**kept, part: {**machine, **found}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
