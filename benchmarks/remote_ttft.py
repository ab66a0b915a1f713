"""Time to first token of a second engine's first request, by what it shares with the first.

    .venv/bin/python benchmarks/remote_ttft.py [--backends redis lm] [--tokens 4000] [--repeats 7] [--core 0]

For each backend two engines share nothing but it: the first computes a prompt and stores it, the second is then asked
for the same prompt, which it never saw; then once more with vLLM's own cache emptied, a hit in its host memory. Beside
them stands an engine without our cache, asked twice: cold, and its own prefix-cache hit, by which the ratios are
taken, prompt by prompt. Prompts end 100 tokens behind a chunk of 256, so every hit reuses the same number of tokens.
All on one core; an engine that is not asked does not compute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engines import CONNECTOR, DTYPE, Engine
from benchmarks.ttft import CHUNK, prompt, reused
from examples.tiny_model import build
from tests import servers
from tests.lm_servers import serving

SETTLE_S = 0.7
"""The write-behind of 30 MB is over by then."""

PEER = {
    "redis": ("LMCache + redis://, second engine's first request", 0.088),
    "lm": ("LMCache + lm://, second engine's first request", 0.089),
    "host": ("LMCache in process, host hit", 0.086),
}
PEER_PREFIX_HIT_S = 0.030
"""The peer's rows, of another machine (AVX-512, bfloat16): 3,840 of 4,000 tokens reused, 3,968 by the prefix cache."""

Rows = dict[str, list[float]]


@contextmanager
def backend(name: str, directory: Path) -> Iterator[dict[str, str]]:
    """Start it; the settings by which an engine finds it."""
    if name == "disk":
        yield {"LMCACHE_LOCAL_DISK": str(directory / "shared"), "LMCACHE_MAX_LOCAL_DISK_SIZE": "8"}
    elif name == "lm":
        with serving("--max-bytes", "2Gi") as server:
            yield {"LMCACHE_REMOTE_URL": f"lm://127.0.0.1:{server.port}"}
    else:
        with servers.server(name, directory) as server:
            yield {"LMCACHE_REMOTE_URL": f"{name}://{server.address}"}


def measure(name: str, plain: Engine, directory: Path, core: int, seeds: range, tokens: int) -> Rows:
    """Seconds by row; the n-th of each row belong to the same prompt, the first two of which do not count."""
    rows: Rows = {"cold": [], "prefix": [], "second": [], "host": []}
    with backend(name, directory) as found, ExitStack() as stack:
        started = [start(f"{name}-{which}", directory, core, tokens, found) for which in ("first", "second")]
        first, second = [stack.enter_context(engine) for engine in started]
        for index, seed in enumerate(seeds):
            seconds = one_prompt(plain, first, second, prompt(seed, tokens))
            for row, measured in zip(rows.values(), seconds, strict=True):
                row += [measured] if index >= 2 else []
    return rows


def start(name: str, directory: Path, core: int, tokens: int, env: dict[str, str]) -> Engine:
    transfer = {**CONNECTOR, "kv_connector_extra_config": {"lmcache.chunk_size": CHUNK}}
    env = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "1", **env}
    options = {"core": core, "max_model_len": tokens + 8, "kv_transfer_config": transfer}
    return Engine(model(), log=directory / f"{name}.log", env=env, **options)


def one_prompt(plain: Engine, first: Engine, second: Engine, asked: list[int]) -> tuple[float, float, float, float]:
    cold = plain.ask(asked)
    assert first.ask(asked)["cached"] == 0
    time.sleep(SETTLE_S)
    prefix, fetched = plain.ask(asked), second.ask(asked)
    second.reset()
    host = second.ask(asked)
    for hit in (prefix, fetched, host):
        assert hit["cached"] == reused(len(asked)), hit["cached"]
    assert fetched["logprobs"][0][0][0] == host["logprobs"][0][0][0]
    return cold["seconds"], prefix["seconds"], fetched["seconds"], host["seconds"]


def model() -> str:
    return str(build(Path(".cache/models/tiny-llama")))


def line(label: str, seconds: list[float], floor: list[float]) -> str:
    ratio = statistics.median(mine / theirs for mine, theirs in zip(seconds, floor, strict=True))
    return f"{label:44} {statistics.median(seconds) * 1e3:8.1f} {min(seconds) * 1e3:8.1f} {ratio:14.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["redis", "valkey", "lm", "disk"])
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    options = parser.parse_args()
    tokens = reused(options.tokens) + 100
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        log = Path(directory) / "plain.log"
        plain = stack.enter_context(Engine(model(), core=options.core, log=log, max_model_len=tokens + 8))
        print(
            f"{tokens} tokens, {reused(tokens)} reused by every hit, {DTYPE}, chunk {CHUNK}, {options.repeats} prompts"
        )
        print(f"{'':44} {'median ms':>8} {'min ms':>8} {'x prefix hit':>14}", flush=True)
        for index, name in enumerate(options.backends):
            seeds = range(2000 + 100 * index, 2000 + 100 * index + options.repeats + 2)
            rows = measure(name, plain, Path(directory), options.core, seeds, tokens)
            print(line(f"{name}: cold, vLLM alone", rows["cold"], rows["prefix"]))
            print(line(f"{name}: vLLM's own prefix-cache hit", rows["prefix"], rows["prefix"]))
            print(line(f"{name}: second engine, first request", rows["second"], rows["prefix"]))
            print(line(f"{name}: the same, then a host hit", rows["host"], rows["prefix"]), flush=True)
    print("\nthe peer, on another machine, with more recomputed than its prefix-cache hit (see PEER):")
    for label, seconds in PEER.values():
        print(f"{label:53} {seconds * 1e3:8.1f} {'':>5} {seconds / PEER_PREFIX_HIT_S:5.2f}")


if __name__ == "__main__":
    main()
