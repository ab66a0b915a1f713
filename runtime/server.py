"""kserve's ModelServer around one vLLM engine: start, probes, signals, drain, end.

The port is bound first, so that probes are answered while weights load. SIGTERM or SIGINT:

* while loading: everything under us is ended at once; exit 128 + signal;
* while serving: readiness fails and new requests get 503, requests in flight finish, then the engine
  flushes pending stores; exit 0. Both share `--shutdown-timeout` seconds, of which the flush gets
  FLUSH_FLOOR_S at least; a second signal ends the wait. Give the pod a terminationGracePeriodSeconds
  of its preStop + `--shutdown-timeout` + 20.

An engine that dies ends the server with exit 1, after its probes have failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from kserve.errors import ModelNotReady, ServerNotLive, ServerNotReady
from kserve.model_server import ModelServer
from kserve.protocol.rest.server import RESTServer, _RefreshingServer, metrics_handler
from kserve.protocol.rest.v1_endpoints import register_v1_endpoints
from kserve.protocol.rest.v2_endpoints import V2Endpoints, register_v2_endpoints
from starlette.routing import Route

from runtime.args import Settings
from runtime.argv import UsageError
from runtime.cache import CacheRoutes
from runtime.explain import ExplainRoute
from runtime.health import EngineDataPlane
from runtime.model import EngineModel, end_processes
from runtime.openai import Gate, build_openai_app, openai_routes

logger = logging.getLogger("runtime")

FLUSH_FLOOR_S = 10.0  # what the engine gets to flush even when the drain used up the whole timeout
DEATH_NOTICE_S = 2.0  # a dead engine's server stays up this long, for probes and clients to hear of it
HTTP_CLOSE_S = 5  # for connections still open after the engine has ended
# kserve routes with nothing behind them here, or that would let anyone end the engine
UNSERVED = (":predict", ":explain", "/infer", "/load", "/unload")


class _QuietServer(_RefreshingServer):
    """uvicorn without signal handlers of its own: EngineServer orders the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer(RESTServer):
    """kserve's routes that mean something for an engine, the OpenAI gate, and the cache's own."""

    def __init__(self, server: EngineServer, gate: Gate, cache_routes: list[Route], sock: socket.socket) -> None:
        super().__init__(
            "kserve.model_server:app",
            server.dataplane,
            server.model_repository_extension,
            server.http_port,
            access_log_format=server.access_log_format,
            grace_period=HTTP_CLOSE_S,
            event_loop=server.event_loop,
            timeout_keep_alive=server.timeout_keep_alive,
            ssl_certfile=server.ssl_certfile,
            ssl_keyfile=server.ssl_keyfile,
        )
        self._gate = gate
        self._prefix = server.settings.openai_prefix
        self._cache_routes = cache_routes
        self._sock = sock
        self._latency_logging = server.enable_latency_logging
        self._server: uvicorn.Server = _QuietServer(self.config)

    async def start(self) -> None:
        """Serve until `close`."""
        self.create_application()
        await self._server.serve(sockets=[self._sock])

    def close(self) -> None:
        """Stop accepting, close what is open within HTTP_CLOSE_S."""
        self._server.should_exit = True

    def _register_endpoints(self, app: FastAPI) -> None:
        app.router.routes.extend([*openai_routes(self._gate, self._prefix), *self._cache_routes])
        kserve_routes: Any = APIRouter()
        register_v1_endpoints(kserve_routes, self.dataplane, self.model_repository_extension)
        register_v2_endpoints(kserve_routes, self.dataplane, self.model_repository_extension)
        kserve_routes.routes = [route for route in kserve_routes.routes if not route.path.endswith(UNSERVED)]
        app.include_router(kserve_routes)
        app.add_api_route("/", self.dataplane.live)
        app.add_api_route("/health", V2Endpoints(self.dataplane).ready)
        app.add_api_route("/metrics", metrics_handler)

    def _add_exception_handlers(self, app: FastAPI) -> None:
        super()._add_exception_handlers(app)
        for error in (ServerNotReady, ServerNotLive, ModelNotReady):
            app.add_exception_handler(error, _unavailable)  # kserve's logs a traceback for every failed probe

    def _add_middlewares(self, app: FastAPI) -> None:
        if self._latency_logging:
            super()._add_middlewares(app)


async def _unavailable(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=503)


class EngineServer(ModelServer):
    """One engine, one HTTP port. `start` returns when all is over and leaves `exit_code`."""

    def __init__(self, settings: Settings) -> None:
        own = settings.kserve
        super().__init__(
            http_port=settings.http_port,
            workers=1,
            enable_grpc=False,
            max_asyncio_workers=own.max_asyncio_workers,
            enable_docs_url=own.enable_docs_url,
            enable_latency_logging=own.enable_latency_logging,
            access_log_format=own.access_log_format,
            event_loop=own.event_loop,
            timeout_keep_alive=own.timeout_keep_alive,
            ssl_certfile=own.ssl_certfile,
            ssl_keyfile=own.ssl_keyfile,
        )
        self.settings = settings
        self.dataplane = EngineDataPlane(model_registry=self.registered_models)
        self.exit_code = 0

    def start(self, models: list[EngineModel]) -> None:
        """Serve the one model of `models` until a signal or the engine's death."""
        (model,) = models
        lora_names = [module.name for module in self.settings.engine.lora_modules or []]
        for name in (*self.settings.model_names, *lora_names):
            self.register_model(model, name)
        sock = self._bind()
        loop_factory = uvicorn.Config("", loop=self.event_loop, log_config=None).get_loop_factory()
        with sock, asyncio.Runner(loop_factory=loop_factory) as runner:
            self.exit_code = runner.run(self._run(model, sock))

    def _bind(self) -> socket.socket:
        host = self.settings.http_host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, self.http_port), family=family, backlog=2048)
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{self.http_port}: {error.strerror}") from None

    async def _run(self, model: EngineModel, sock: socket.socket) -> int:
        self.setup_event_loop()
        signals = _catch_signals()
        gate = Gate()
        cache = CacheRoutes(self.settings)
        cache.open()
        explain = ExplainRoute(gate, self.settings.model_name, model.decode, enabled=self.settings.lmcache_endpoints)
        http = HttpServer(self, gate, [*cache.routes(), *explain.routes()], sock)
        serving = asyncio.create_task(http.start())
        try:
            return await self._live(model, gate, signals)
        finally:
            http.close()
            await serving
            cache.close()

    async def _live(self, model: EngineModel, gate: Gate, signals: asyncio.Queue[int]) -> int:
        stop = asyncio.create_task(signals.get())
        loading = asyncio.create_task(self._load(model, gate))
        await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            _abandon(stop.result())
        if (error := loading.exception()) is not None:
            return _failed_start(error)
        dying = asyncio.create_task(model.watch())
        await asyncio.wait({dying, stop}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            return await self._drain(model, gate, signals, dying)
        logger.error("The engine has died; ending the server")
        gate.close("the engine has died")
        await asyncio.sleep(DEATH_NOTICE_S)
        await model.shutdown(0.0)
        return 1

    async def _load(self, model: EngineModel, gate: Gate) -> None:
        await model.start_engine()
        settings = self.settings
        gate.attach(await build_openai_app(model.client, settings.engine, tokenize_endpoint=settings.tokenize_endpoint))
        model.serve()
        logger.info("%s", start_line(settings))

    async def _drain(
        self, model: EngineModel, gate: Gate, signals: asyncio.Queue[int], dying: asyncio.Task[None]
    ) -> int:
        loop = asyncio.get_running_loop()
        budget_s = float(self.settings.shutdown_timeout_s)
        deadline = loop.time() + budget_s
        model.drain()
        gate.close("the server is shutting down")
        logger.info("Draining: %d requests in flight, at most %d s", gate.in_flight, budget_s)
        idle = asyncio.create_task(gate.idle())
        again = asyncio.create_task(signals.get())
        await asyncio.wait({idle, again, dying}, timeout=budget_s, return_when=asyncio.FIRST_COMPLETED)
        flush_s = min(budget_s, max(deadline - loop.time(), FLUSH_FLOOR_S)) if not again.done() else 0.0
        logger.info("Stopping the engine: %d requests left, at most %d s to flush", gate.in_flight, flush_s)
        await model.shutdown(flush_s)
        for task in (idle, again, dying):
            task.cancel()
        return 0


def serve(settings: Settings) -> int:
    """Serve until the end; returns the exit code."""
    for note in settings.notes:
        logger.info("%s", note)
    server = EngineServer(settings)
    try:
        server.start([EngineModel(settings.model_name, settings.engine)])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return server.exit_code


def start_line(settings: Settings) -> str:
    """The one line that says what is served, where, and whether the cache is on."""
    scheme = "https" if settings.kserve.ssl_certfile else "http"
    url = f"{scheme}://{settings.http_host}:{settings.http_port}{settings.openai_prefix}/v1"
    if settings.our_cache:
        cache = f"on ({settings.engine.kv_transfer_config.kv_connector}, settings from {settings.cache_source})"
    elif settings.engine.kv_transfer_config is not None:
        cache = f"{settings.engine.kv_transfer_config.kv_connector}, not ours"
    else:
        cache = "off (no --kv-transfer-config)"
    return f"Serving {settings.model} as {', '.join(settings.model_names)} at {url}; KV cache: {cache}"


def _catch_signals() -> asyncio.Queue[int]:
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, signals.put_nowait, int(number))
    return signals


def _abandon(number: int) -> None:
    """End a start that a signal interrupted: by force, as the thread that builds the engine cannot be stopped."""
    logger.info("Got %s while loading; ending", signal.Signals(number).name)
    end_processes(grace_s=2.0)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)


def _failed_start(error: BaseException) -> int:
    end_processes(grace_s=2.0)
    if isinstance(error, UsageError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    # a RuntimeError is vLLM's word for "see above": the engine's process has printed its own traceback
    logger.error("The engine did not start: %s", error, exc_info=None if isinstance(error, RuntimeError) else error)
    return 1
