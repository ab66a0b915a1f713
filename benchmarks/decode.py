"""What the cache adds to a decode step when it has nothing to do: one engine, with its connector and without, by turns.

Run: ``python benchmarks/decode.py [--layers 4 16 --repeats 4 --rounds 200 --tokens 3940 --out benchmarks/results]``.

Two engines of one kind differ by 2 % for as long as they live, which is more than there is to be seen. So each engine
is compared with itself: it has one request in decoding, and makes STEPS steps of it with the connector in place and as
many without (in the scheduler, in the worker and in what joins the workers' outputs), in an order drawn anew each
round, for who comes first is 5 % slower. The first WARM of them are left out, and the median of the others counts: a
step in which somebody else had the core is not seen, nor is what the cache does once in a second. What vLLM does for
any connector counts, too; what other threads do does not, for they do it at any time. An engine that never had a
connector is taken through the same, for the noise. All engines are started anew for each of `--repeats`, whose rounds
are counted together.

Engines are stepped in the process that times them (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), from the scheduler's decision
to its update; workers are processes as ever. What there is to store was stored before.
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
from benchmarks.paired import balanced_ratio, rounds
from benchmarks.ttft import CHUNK, SETTLE_S, prompt
from examples.tiny_model import build

STEPS, WARM = 12, 2
ENGINES = {"none": "(noise) no cache", "host": "host memory", "disk": "host memory and disk"}
Rows = dict[str, list[float]]
"""Seconds of a step "with" and "without" in each round, and whether "with" came "first" (1 or 0)."""


def no_rows() -> dict[str, Rows]:
    return {kind: {"with": [], "without": [], "first": []} for kind in ENGINES}


def start(kind: str, directory: Path, *, layers: int, core: int, max_model_len: int) -> Engine:
    model = str(build(Path(f".cache/models/tiny-llama-{layers}"), layers=layers))
    options = {"core": core, "max_model_len": max_model_len, "log": directory / f"{kind}.log"}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if kind == "none":
        return Engine(model, env=env, **options)
    env["LMCACHE_MAX_LOCAL_CPU_SIZE"] = "1"
    if kind == "disk":
        env |= {"LMCACHE_LOCAL_DISK": str(directory / "kv"), "LMCACHE_MAX_LOCAL_DISK_SIZE": "8"}
    transfer = {**CONNECTOR, "kv_connector_extra_config": {"lmcache.chunk_size": CHUNK}}
    return Engine(model, env=env, kv_transfer_config=transfer, **options)


def measure(engines: dict[str, Engine], tokens: int, num_rounds: int) -> dict[str, Rows]:
    """Of each engine, in each round."""
    asked = prompt(1, tokens)
    for engine in engines.values():
        engine.ask(asked)
        engine.ask(asked)
        time.sleep(SETTLE_S)
        engine.begin(asked, max_tokens=2 * STEPS * (num_rounds + 1))
        engine.steps(2 * STEPS)
    rows = no_rows()
    order = random.Random()  # another one for each set of engines
    for _, kinds in rounds(list(engines), num_rounds, seed=4):
        for kind in kinds:
            sides = order.sample(["with", "without"], 2)
            rows[kind]["first"].append(float(sides[0] == "with"))
            for side in sides:
                engines[kind].connect(side == "with")
                rows[kind][side].append(statistics.median(engines[kind].steps(STEPS)[WARM:]))
    return rows


def measure_new(layers: int, options: argparse.Namespace) -> dict[str, Rows]:
    """Of engines that are started for it."""
    shared = {"layers": layers, "core": options.core}
    shared["max_model_len"] = options.tokens + 2 * STEPS * (options.rounds + 2)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        started = {kind: start(kind, Path(name), **shared) for kind in ENGINES}
        engines = {kind: stack.enter_context(engine) for kind, engine in started.items()}
        for engine in engines.values():
            stack.callback(engine.hang_up)
        return measure(engines, options.tokens, options.rounds)


def run(layers: int, options: argparse.Namespace) -> dict[str, object]:
    rows = no_rows()
    for _ in range(options.repeats):
        for kind, new in measure_new(layers, options).items():
            for column, values in new.items():
                rows[kind][column] += values
    return summary(layers, rows)


def summary(layers: int, rows: dict[str, Rows]) -> dict[str, object]:
    step_ms = statistics.median(rows["none"]["without"]) * 1e3
    num_rounds = len(rows["none"]["with"])
    print(f"\n{layers} layers, a step of {step_ms:.2f} ms, {num_rounds} rounds of {STEPS - WARM} steps")
    ratios = {}
    for kind, label in ENGINES.items():
        alone = rows[kind]["without"]
        found = balanced_ratio(rows[kind]["with"], alone, [bool(first) for first in rows[kind]["first"]])
        added_s = (found.median - 1) * statistics.median(alone)
        print(f"{label:24} {found.overhead}  {added_s * 1e6:+.0f} us", flush=True)
        ratios[label] = {**found._asdict(), "added_s": added_s}
    return {"step_ms": step_ms, "ratios": ratios, "seconds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--tokens", type=int, default=3940)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    print(f"decoding behind {options.tokens} tokens, {DTYPE}, core {options.core}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "decode.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for layers in options.layers:
        report[f"{layers} layers"] = {"machine": platform.processor(), "dtype": DTYPE, **run(layers, options)}
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
