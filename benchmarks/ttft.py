"""Time to first token: cold, vLLM's own prefix-cache hit, and our hits, paired in one run.

Run: ``python benchmarks/ttft.py [--tokens 4000 --repeats 7 --core 0 --out benchmarks/results]``

Six engines are held ready on one core and asked by turns; every repeat uses prompts of its own, so
each hit is a first hit. Prompt lengths are chosen so that vLLM's prefix cache (blocks of 128 on CPU)
and a chunk of 256 reuse exactly the same number of tokens. "second process" is an engine that never
saw the prompt and shares only the directory. A second engine without a cache tells how much two equal
engines differ: no overhead below that means anything. Decoding is measured twice: right after a cold
prefill, while its KV travels to host memory (and disk), and of the same prompt again, when there is
nothing left to store.
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
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engines import CONNECTOR, DTYPE, Engine
from examples.tiny_model import build

BLOCK, CHUNK = 128, 256
DECODED = 65
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


def open_engines(stack: ExitStack, directory: Path, core: int, max_model_len: int) -> dict[str, Engine]:
    model = str(build(Path(".cache/models/tiny-llama")))
    shared = {"core": core, "max_model_len": max_model_len}

    def start(name: str, chunk: int | None, disk: str) -> Engine:
        if chunk is None:
            return Engine(model, log=directory / f"{name}.log", **shared)
        transfer = {**CONNECTOR, "kv_connector_extra_config": {"lmcache.chunk_size": chunk}}
        env = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "1"}
        if disk:
            env |= {"LMCACHE_LOCAL_DISK": str(directory / disk), "LMCACHE_MAX_LOCAL_DISK_SIZE": "8"}
        return Engine(model, log=directory / f"{name}.log", env=env, kv_transfer_config=transfer, **shared)

    made = {
        "plain": start("plain", None, ""),
        "twin": start("twin", None, ""),
        "block": start("block", BLOCK, "kv-block"),
        "chunk": start("chunk", CHUNK, "kv-chunk"),
        "second": start("second", CHUNK, "kv-chunk"),
        "host": start("host", CHUNK, ""),
    }
    return {name: stack.enter_context(engine) for name, engine in made.items()}


def measure(engines: dict[str, Engine], tokens: int, repeats: int) -> Rows:
    rows: Rows = {}

    def note(row: str, seconds: float) -> None:
        rows.setdefault(row, []).append(seconds)

    for engine in engines.values():
        for _ in range(3):
            engine.ask(prompt(999_999, tokens), max_tokens=DECODED)
    for repeat in range(repeats):
        asked = prompt(repeat, tokens)
        cold, hit = one_engine(engines["plain"], asked, "plain")
        note("cold, vLLM alone", cold)
        note("cold, vLLM alone, its twin", float(engines["twin"].ask(asked)["seconds"]))
        note("vLLM's own prefix-cache hit", hit["plain"])
        for name, label in (("block", "chunk = block"), ("chunk", "chunk 256")):
            cold, hit = one_engine(engines[name], asked, name)
            note(f"cold, {label}", cold)
            for tier in ("host", "disk"):
                note(f"{tier} hit, {label}", hit[tier])
                note(f"lookup, {tier} hit, {label}", hit[f"lookup, {tier}"])
        second = engines["second"].ask(asked)
        assert second["cached"] == reused(tokens), second["cached"]
        note("second process, chunk 256", second["seconds"])
        for name in order(repeat, ["plain", "twin", "host", "chunk"]):
            fresh = prompt(10_000 + repeat, tokens)
            note(f"decode while storing, {name}", decode(engines[name], fresh))
            note(f"decode, {name}", decode(engines[name], fresh))
    return rows


def order(repeat: int, names: list[str]) -> list[str]:
    """Alternate who goes first: caches and clocks favour one side otherwise."""
    return names if repeat % 2 else names[::-1]


def one_engine(engine: Engine, asked: list[int], name: str) -> tuple[float, dict[str, float]]:
    cold = engine.ask(asked)
    assert cold["cached"] == 0
    time.sleep(0.5)  # the write-behind of the cold request is not part of the hits
    if name == "plain":
        return cold["seconds"], {"plain": expect(engine, asked)}
    found = {}
    for tier in ("host", "disk"):
        engine.reset(connector=tier == "disk")
        before = lookup_seconds(engine)
        found[tier] = expect(engine, asked)
        found[f"lookup, {tier}"] = lookup_seconds(engine) - before
    return cold["seconds"], found


def expect(engine: Engine, asked: list[int]) -> float:
    answer = engine.ask(asked)
    assert answer["cached"] == reused(len(asked)), (answer["cached"], reused(len(asked)))
    return float(answer["seconds"])


def reused(tokens: int) -> int:
    return tokens // CHUNK * CHUNK


def decode(engine: Engine, asked: list[int]) -> float:
    """Seconds per decoded token."""
    return float(engine.ask(asked, max_tokens=DECODED)["per_token"])


def table(rows: Rows) -> str:
    floor = rows["vLLM's own prefix-cache hit"]
    lines = [f"{'':32} {'median ms':>10} {'min':>9} {'max':>9} {'x prefix hit':>13}  target"]
    for name, seconds in rows.items():
        if name.startswith("lookup"):
            continue
        paired = statistics.median(mine / theirs for mine, theirs in zip(seconds, floor, strict=True))
        target = f"<= {TARGETS[name]}" if name in TARGETS else ""
        lines.append(
            f"{name:32} {statistics.median(seconds) * 1e3:10.2f} {min(seconds) * 1e3:9.2f} {max(seconds) * 1e3:9.2f} "
            f"{paired:13.2f}  {target}"
        )
    return "\n".join(lines)


def overheads(rows: Rows) -> dict[str, float]:
    def ratio(ours: str, theirs: str) -> float:
        return statistics.median(a / b for a, b in zip(rows[ours], rows[theirs], strict=True)) - 1

    return {
        "cold TTFT, chunk 256": ratio("cold, chunk 256", "cold, vLLM alone"),
        "cold TTFT, chunk = block": ratio("cold, chunk = block", "cold, vLLM alone"),
        "decode": ratio("decode, chunk", "decode, plain"),
        "decode while storing to host memory": ratio("decode while storing, host", "decode while storing, plain"),
        "decode while storing to disk too": ratio("decode while storing, chunk", "decode while storing, plain"),
        "(noise: cold TTFT of two equal engines)": ratio("cold, vLLM alone, its twin", "cold, vLLM alone"),
        "(noise: decode of two equal engines)": ratio("decode, twin", "decode, plain"),
    }


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
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    tokens = reused(options.tokens) + 100  # the prefix cache of 128-token blocks stops at the same boundary
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        engines = open_engines(stack, Path(directory), options.core, tokens + 2 * DECODED)
        rows = measure(engines, tokens, options.repeats)
    print(f"\n{tokens} tokens, {reused(tokens)} reused, {DTYPE}, core {options.core}, {options.repeats} repeats")
    print(table(rows))
    for name, share in overheads(rows).items():
        print(f"overhead, {name}: {share:+.1%} (target <= 2 %)")
    for name, seconds in rows.items():
        if name.startswith("lookup"):
            print(f"{name}: {statistics.median(seconds) * 1e6:.0f} us per request in the scheduler (target <= 100)")
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"tokens": tokens, "dtype": DTYPE, "machine": platform.processor(), "seconds": rows}
    (options.out / "ttft.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, options.out / "ttft.png")


if __name__ == "__main__":
    main()
