"""What a request costs when the remote backend is dead or hangs, once the breaker has opened.

    .venv/bin/python benchmarks/remote_faults.py [--backends redis lm] [--faults hang] [--tokens 4000] [--rounds 30]

Engines whose only tier is that backend, behind a proxy that refuses connections or swallows what is sent, and one
without a cache. In each round all are asked for a prompt of their own that nobody has seen, in random order, the one
without a cache twice: its second answer shows how much equal engines differ here. Ratios are of one round; the interval
is that of their median (bootstrap). All on one core; an engine that is not asked does not compute.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engines import CONNECTOR, DTYPE, Engine
from benchmarks.remote_ttft import model
from benchmarks.ttft import CHUNK, prompt, reused
from tests.far_tier import STARTERS, Backend
from tests.faulty_proxy import Fault

FAULTS = ("refuse", "hang")
PLAIN, AGAIN = "no cache", "no cache, again"
MAX_TO_OPEN = 20
"""Requests until a breaker must have opened."""

SEEDS = itertools.count(9000)


class Subject:
    """An engine, and the backend that is its only tier."""

    def __init__(self, engine: Engine, backend: Backend, log: Path) -> None:
        self.engine = engine
        self.backend = backend
        self._log = log

    @property
    def is_up(self) -> bool:
        """Whether its breaker is closed: each change is one line."""
        log = self._log.read_text(errors="replace")
        return log.rfind("reads are off") <= log.rfind("reads are on again")

    def fail(self, kind: str, tokens: int) -> list[float]:
        """Let the backend fail; the seconds of each request until the breaker has opened."""
        self.backend.behave(Fault(kind))  # type: ignore[arg-type]
        found: list[float] = []
        while self.is_up:
            assert len(found) < MAX_TO_OPEN, "the breaker does not open"
            found.append(seconds(self.engine, tokens))
        return found

    def recover(self, tokens: int) -> None:
        self.backend.behave()
        while not self.is_up:
            seconds(self.engine, tokens)


def seconds(engine: Engine, tokens: int) -> float:
    """Of a prompt that nobody has seen."""
    answer = engine.ask(prompt(next(SEEDS), tokens))
    assert answer["cached"] == 0, answer["cached"]
    return float(answer["seconds"])


def start(name: str, directory: Path, core: int, tokens: int, stack: ExitStack) -> Subject:
    backend = STARTERS[name](directory, stack)
    transfer = {**CONNECTOR, "kv_connector_extra_config": {"lmcache.chunk_size": CHUNK}}
    env = {"LMCACHE_LOCAL_CPU": "false", "LMCACHE_REMOTE_URL": backend.url}
    log = directory / f"{name}.log"
    engine = Engine(model(), core=core, log=log, env=env, max_model_len=tokens + 8, kv_transfer_config=transfer)
    return Subject(engine, backend, log)


def rounds(asked: dict[str, Engine], tokens: int, num_rounds: int) -> dict[str, list[float]]:
    """Seconds by row; the n-th of each row belong together."""
    found: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(num_rounds):
        for name in random.sample(list(asked), len(asked)):
            found[name].append(seconds(asked[name], tokens))
    return found


def interval(ratios: np.ndarray, num_samples: int = 10_000) -> tuple[float, float]:
    """95 % of the medians of samples drawn from the ratios with replacement."""
    drawn = np.random.default_rng(0).choice(ratios, (num_samples, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def report(kind: str, found: dict[str, list[float]]) -> None:
    floor = np.array(found[PLAIN])
    for name, row in found.items():
        ratios = np.array(row) / floor
        low, high = interval(ratios)
        label = name if name in (PLAIN, AGAIN) else f"{name}, {kind}"
        print(f"{label:28} {np.median(row) * 1e3:8.1f} {np.median(ratios):10.3f}   {low:.3f} to {high:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["redis", "lm"], choices=STARTERS)
    parser.add_argument("--faults", nargs="+", default=FAULTS, choices=FAULTS)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    options = parser.parse_args()
    tokens = reused(options.tokens) + 100
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        directory = Path(place)
        plain = Engine(model(), core=options.core, log=directory / "plain.log", max_model_len=tokens + 8)
        subjects = {name: start(name, directory, options.core, tokens, stack) for name in options.backends}
        for engine in (plain, *(subject.engine for subject in subjects.values())):
            stack.enter_context(engine)
        asked = {PLAIN: plain, AGAIN: plain, **{name: subject.engine for name, subject in subjects.items()}}
        rounds(asked, tokens, 2)
        print(f"{tokens} tokens, nothing reused, {DTYPE}, chunk {CHUNK}, {options.rounds} rounds for each fault")
        print(f"{'':28} {'median ms':>8} {'of no cache':>10}   95 %")
        for kind in options.faults:
            for name, subject in subjects.items():
                before = ", ".join(f"{took * 1e3:.0f}" for took in subject.fail(kind, tokens))
                print(f"{name}, {kind}: ms until the breaker was open: {before}")
            report(kind, rounds(asked, tokens, options.rounds))
            assert not any(subject.is_up for subject in subjects.values())
            for subject in subjects.values():
                subject.recover(tokens)


if __name__ == "__main__":
    main()
