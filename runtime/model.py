"""The model behind the server: one vLLM engine, from loading to its death or orderly end."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from argparse import Namespace
from typing import Any

import psutil
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

logger = logging.getLogger("runtime")

WATCH_INTERVAL_S = 0.25


class State(enum.Enum):
    """What the engine can do now. LOADING -> SERVING -> DRAINING -> STOPPED; DEAD from anywhere."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class EngineModel(BaseKServeModel):  # type: ignore[misc]  # kserve is untyped
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
        return AsyncLLM.from_vllm_config(
            vllm_config=engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER),
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=engine_args.enable_log_requests,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            disable_log_stats=engine_args.disable_log_stats,
        )

    @property
    def dead(self) -> bool:
        """Whether the engine has died under us."""
        return self.state is State.DEAD or (self.client is not None and self.client.errored)

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
        await asyncio.get_running_loop().run_in_executor(None, self._shutdown, timeout_s)

    def _shutdown(self, timeout_s: float) -> None:
        self.drain()
        if self.client is not None:
            self.client.shutdown(timeout=timeout_s)
        if self.state is not State.DEAD:
            self.state = State.STOPPED
        kill_descendants(grace_s=0.0)


def kill_descendants(grace_s: float) -> None:
    """End every process below this one: SIGTERM, `grace_s` to obey, then SIGKILL."""
    children = psutil.Process().children(recursive=True)
    for signal_name in ("terminate", "kill"):
        for child in children:
            if not _is_resource_tracker(child):
                _send(child, signal_name)
        _, children = psutil.wait_procs(children, timeout=grace_s if signal_name == "terminate" else 2.0)


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Python's own helper that unlinks leaked semaphores and memory: it ends with us, and must outlast the others."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _send(process: psutil.Process, signal_name: str) -> None:
    try:
        getattr(process, signal_name)()
    except psutil.NoSuchProcess:
        pass
