"""vLLM engines in processes of their own, asked in turn, for paired measurements.

An engine that is not asked does not compute, so several can be held ready and measured by turns on
the same core. Commands and answers are lines of JSON over two pipes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DTYPE = "float32"  # what every CPU computes fast; 8 KiB of KV per token with the tiny model
CONNECTOR = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


class Engine:
    """One engine process; a context manager."""

    def __init__(
        self, model: str, *, core: int, log: Path, env: Mapping[str, str] | None = None, **options: object
    ) -> None:
        ours, theirs = os.pipe(), os.pipe()
        settings = {
            **{key: value for key, value in os.environ.items() if not key.startswith("LMCACHE_")},
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            **(env or {}),
        }
        command = [sys.executable, __file__, str(ours[0]), str(theirs[1]), json.dumps({"model": model, **options})]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, env=settings, cwd=ROOT, pass_fds=(ours[0], theirs[1])
            )
        os.close(ours[0])
        os.close(theirs[1])
        self._log = log
        self._to = os.fdopen(ours[1], "w")
        self._from = os.fdopen(theirs[0])

    def __enter__(self) -> Engine:
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()
        self._process.wait(60)
        self._from.close()

    def hang_up(self) -> None:
        """Let the engine end, without waiting for it; may be called twice."""
        self._to.close()

    def ask(self, tokens: Sequence[int], *, max_tokens: int = 1) -> dict[str, Any]:
        """{"seconds": whole request, "first": of them until the first token, "per_token": decoding, each after it,
        "cached": reused tokens, "logprobs": [...]}"""
        return self._call({"ask": list(tokens), "max_tokens": max_tokens})

    def begin(self, tokens: Sequence[int], *, max_tokens: int) -> None:
        """Put a request into decoding. Here and in `steps` only for an engine that is stepped in its own process."""
        self._call({"begin": list(tokens), "max_tokens": max_tokens})

    def steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps, each of them of the scheduler and the model, without the frontend."""
        seconds: list[float] = self._call({"steps": count})["seconds"]
        return seconds

    def connect(self, on: bool) -> None:
        """Put the engine's connector in its place, or take it out, between two steps."""
        self._call({"connect": on})

    def reset(self, *, connector: bool = False) -> None:
        """Empty vLLM's own prefix cache; with `connector`, our host memory too (far tiers keep theirs)."""
        self._call({"reset": connector})

    def metrics(self) -> dict[str, float]:
        """Counters and gauges; of histograms, name_sum and name_count."""
        return self._call({"metrics": True})

    def _call(self, command: Mapping[str, object]) -> dict[str, Any]:
        self._to.write(json.dumps(command) + "\n")
        self._to.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise RuntimeError(f"the engine ended; its log is {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(commands: Any, answers: Any, options: dict[str, Any]) -> None:
    """The engine's process: answer commands until their pipe closes."""
    from vllm import LLM

    llm = LLM(**{"enforce_eager": True, "dtype": DTYPE, "disable_log_stats": False, **options})

    def say(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"ready": True})
    for line in commands:
        say(_execute(llm, json.loads(line)))


def _execute(llm: Any, command: dict[str, Any]) -> object:
    if "reset" in command:
        return {"done": llm.reset_prefix_cache(reset_connector=command["reset"])}
    if "metrics" in command:
        return _metrics(llm)
    if "connect" in command:
        return {"connected": _connect(llm.llm_engine.engine_core.engine_core, command["connect"])}
    if "steps" in command:
        return {"seconds": [_step(llm.llm_engine) for _ in range(command["steps"])]}
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=command["max_tokens"], logprobs=5, ignore_eos=True)
    if "begin" in command:
        llm.llm_engine.add_request("decoding", {"prompt_token_ids": command["begin"]}, sampling)
        return {"begun": True}
    begin = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": command["ask"]}], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    steps, stamps = output.outputs[0].logprobs, output.metrics
    decoding = stamps.last_token_ts - stamps.first_token_ts
    return {
        "seconds": seconds,
        "first": seconds - decoding,
        "per_token": decoding / max(1, len(steps) - 1),
        "cached": output.num_cached_tokens,
        "logprobs": [sorted((token, entry.logprob) for token, entry in step.items()) for step in steps],
    }


def _step(engine: Any) -> float:
    """One step of the engine's core in this process, and what the frontend makes of it; seconds of the former."""
    core = engine.engine_core
    begin = time.perf_counter()
    outputs = core.get_output()
    seconds = time.perf_counter() - begin
    engine.output_processor.process_outputs(outputs.outputs, engine_core_timestamp=outputs.timestamp)
    return seconds


_Parts = tuple[Any, Any]
_out: dict[str, _Parts] = {}


def _connect(core: Any, on: bool) -> bool:
    """Put the connector in place or take it out, with all that vLLM does for it; whether one is in place."""
    assert core.batch_queue is None, "a step is under way between two steps"
    scheduler, executor = core.scheduler, core.model_executor
    if on and _out:
        scheduler.connector, executor.kv_output_aggregator = _out.pop("parts")
        executor.collective_rpc(_attach, args=(True,))
    elif not on and scheduler.connector is not None:
        _out["parts"] = scheduler.connector, executor.kv_output_aggregator
        scheduler.connector = executor.kv_output_aggregator = None
        executor.collective_rpc(_attach, args=(False,))
    return scheduler.connector is not None


def _attach(worker: Any, on: bool) -> None:
    """In the worker's process."""
    from vllm.distributed.kv_transfer import kv_transfer_state as state

    if on:
        state._KV_CONNECTOR_AGENT = worker.connector_out
    else:
        worker.connector_out, state._KV_CONNECTOR_AGENT = state._KV_CONNECTOR_AGENT, None


def _metrics(llm: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            found[metric.name] = found.get(metric.name, 0.0) + metric.value
        elif hasattr(metric, "sum"):
            found[f"{metric.name}_sum"], found[f"{metric.name}_count"] = metric.sum, metric.count
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An engine on two pipes; started by Engine.")
    parser.add_argument("commands", type=int)
    parser.add_argument("answers", type=int)
    parser.add_argument("options", type=json.loads)
    arguments = parser.parse_args()
    serve(os.fdopen(arguments.commands), os.fdopen(arguments.answers, "w"), arguments.options)
