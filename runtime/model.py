"""The model behind the server: one vLLM engine, from loading to its death or orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import psutil  # type: ignore[import-untyped]
from kserve.model import BaseKServeModel
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM

from runtime.argv import UsageError, one_line

logger = logging.getLogger("runtime")

WATCH_INTERVAL_S = 0.25
KILL_WAIT_S = 2.0


class State(enum.Enum):
    """What the engine can do now. LOADING -> SERVING -> DRAINING -> STOPPED; DEAD from anywhere."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class EngineModel(BaseKServeModel):
    """A Huggingface model served by vLLM, as KServe sees it.

    Thread: everything on the event loop, except `_build` and `_shutdown`, which block and run on a
    worker thread so that probes are answered meanwhile. Order: `start_engine` once, then `watch`,
    then `drain` and `shutdown`. Owner: this object owns the engine and every process under it.
    Failure: a failed start raises and leaves no process; a dead engine turns the state to DEAD.
    """

    def __init__(self, name: str, engine_args: Namespace) -> None:
        super().__init__(name)
        self.engine = True  # kserve's mark of a model with start_engine
        self.state = State.LOADING
        self.engine_args = engine_args
        self.client: Any = None  # vllm's AsyncLLM once loaded
        self._processes: list[psutil.Process] = []  # all below us; a dead EngineCore's workers are nobody's children

    def load(self) -> bool:
        """Says whether it is ready: kserve calls this on requests and must not wake anything."""
        return bool(self.ready)

    def start(self) -> None:
        """Ready is what `start_engine` says, not that the server began."""

    async def start_engine(self) -> None:
        """Build the engine on a worker thread; ready when it answers. Raises what vLLM raises."""
        loop = asyncio.get_running_loop()
        client = await loop.run_in_executor(None, self._build)
        self.client = client
        self._processes = psutil.Process().children(recursive=True)
        await client.reset_mm_cache()
        freeze_gc_heap()

    def serve(self) -> None:
        """The routes are up: take requests."""
        self.state = State.SERVING
        self.ready = True

    def _build(self) -> AsyncLLM:
        args = self.engine_args
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        propagate_flash_late_interaction(args, engine_args)
        try:
            config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except (ValueError, TypeError, OSError) as error:  # arguments that do not fit the model, or no such model
            raise UsageError(one_line(error)) from error
        return AsyncLLM.from_vllm_config(
            vllm_config=config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=engine_args.enable_log_requests,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            disable_log_stats=engine_args.disable_log_stats,
        )

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special ones included."""
        text: str = self.client.get_tokenizer().decode(token_ids)
        return text

    @property
    def dead(self) -> bool:
        """Whether the engine has died under us; one that we end ourselves has not."""
        return self.state is State.DEAD or (self.state is State.SERVING and self.client.errored)

    async def healthy(self) -> bool:
        """Ready to answer a request: serving, and the engine alive."""
        return self.state is State.SERVING and not self.dead

    async def watch(self) -> None:
        """Return when the engine has died; meanwhile print vLLM's statistics line now and then."""
        next_stats = time.monotonic() + envs.VLLM_LOG_STATS_INTERVAL
        while not self.client.errored:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if not self.engine_args.disable_log_stats and time.monotonic() >= next_stats:
                await self.client.do_log_stats()
                next_stats = time.monotonic() + envs.VLLM_LOG_STATS_INTERVAL
        if self.state is State.SERVING:
            self.state = State.DEAD
        self.ready = False

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        if self.state is not State.DEAD:
            self.state = State.DRAINING
        self.ready = False

    def stop(self) -> None:
        """kserve's word for `drain`."""
        self.drain()

    def stop_engine(self) -> None:
        """kserve's word for `shutdown`, blocking."""
        self._shutdown(float(self.engine_args.shutdown_timeout))

    async def shutdown(self, timeout_s: float) -> None:
        """Stop the engine; it has `timeout_s` to flush pending stores before it is killed."""
        self.drain()
        idle = self.client is not None and self.client.get_num_unfinished_requests() == 0
        if idle and self.client.output_handler is not None:
            self.client.output_handler.cancel()  # or it reports the engine's orderly end as a crash
        await asyncio.get_running_loop().run_in_executor(None, self._shutdown, timeout_s)

    def _shutdown(self, timeout_s: float) -> None:
        self.drain()
        if self.client is not None:
            self.client.shutdown(timeout=timeout_s)
        if self.state is not State.DEAD:
            self.state = State.STOPPED
        end_processes(self._processes, grace_s=0.0)


def end_processes(known: Iterable[psutil.Process] = (), *, grace_s: float) -> None:
    """End `known` and every process below this one: SIGTERM, `grace_s` to obey, then SIGKILL. Blocks."""
    found = {*known, *psutil.Process().children(recursive=True)}
    alive = [process for process in found if not _is_resource_tracker(process)]
    for signal_name, wait_s in (("terminate", grace_s), ("kill", KILL_WAIT_S)):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, signal_name)()
        _, alive = psutil.wait_procs(alive, timeout=wait_s)


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Python's own helper that unlinks leaked memory: it ends by itself, after those it cleans up for."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False
