"""vLLM's OpenAI routes as one ASGI app, and the gate in front of it.

Only the wanted routers are attached: vLLM's whole app would bring a second /metrics and, without
authentication, /invocations, /scale_elastic_ep and /ping.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat
from vllm.entrypoints.openai.completion.api_router import attach_router as attach_completion
from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
from vllm.entrypoints.openai.responses.api_router import attach_router as attach_responses
from vllm.entrypoints.pooling.factories import register_pooling_api_routers
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.lora.api_router import attach_router as attach_lora
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX, AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.entrypoints.serve.tokenize.api_router import attach_router as attach_tokenize
from vllm.tasks import POOLING_TASKS

# Served bare and under /v1 as well as under /openai/v1: vLLM's own server and the tutorials use these.
ALIASED = ("completions", "chat/completions", "embeddings", "responses", "score", "rerank", "models")


class ExitRequest:
    """Stands for the uvicorn server in vLLM's state; its error handlers set `should_exit`, the watchdog decides."""

    should_exit = False


class GuardAll(AuthenticationMiddleware):
    """vLLM's key check on the paths it leaves open (/tokenize, /score, /pooling, ...)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        open_path = scope["type"] == "http" and not path.startswith(GUARDED_PREFIX)
        if open_path and scope["method"] != "OPTIONS" and not self.verify_token(Headers(scope=scope)):
            await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def api_keys(args: Namespace) -> list[str]:
    """The keys of --api-key or VLLM_API_KEY, any of which opens the server; none where it is open."""
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


async def build_openai_app(client: EngineClient, args: Namespace, *, tokenize_endpoint: bool) -> FastAPI:
    """vLLM's routers for what the model can do, with vLLM's state, errors, CORS and API keys."""
    tasks = await client.get_supported_tasks()
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.args = args
    app.state.server = ExitRequest()
    attach_models(app)
    attach_lora(app)  # only where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set
    if "generate" in tasks:
        attach_chat(app)
        attach_completion(app)
        attach_responses(app)
    if any(task in POOLING_TASKS for task in tasks):
        register_pooling_api_routers(app, tasks, client.model_config)
    if tokenize_endpoint:
        attach_tokenize(app)
    init_exception_handler(app)
    app.add_exception_handler(HTTPException, http_exception_handler)  # an unknown path, in OpenAI's shape
    init_entrypoints_middleware(args, app, tasks)
    keys = api_keys(args)
    if keys:
        app.add_middleware(GuardAll, tokens=keys)
    await init_app_state(client, app.state, args, tasks)
    return app


class Gate:
    """ASGI app in front of the OpenAI app: 503 before it is attached and after `close`; counts requests in flight.

    Thread: the event loop's only. Order: attach once, close once. A request counts until its last byte is sent.
    """

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._reason = "the model is loading"
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def attach(self, app: ASGIApp) -> None:
        self._app = app

    def close(self, reason: str) -> None:
        """Answer 503 from now on; requests in flight go on."""
        self._app, self._reason = None, reason

    @property
    def in_flight(self) -> int:
        return self._in_flight

    async def idle(self) -> None:
        """Return when no request is in flight."""
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            await self._refuse(scope, receive, send)
            return
        self._in_flight += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = {
            "message": f"Unavailable: {self._reason}.",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
        headers = {"Retry-After": "5", "Connection": "close"}
        await JSONResponse({"error": error}, status_code=503, headers=headers)(scope, receive, send)


class Alias:
    """The same app under another path."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        moved = {**scope, "path": self._path, "raw_path": self._path.encode(), "root_path": ""}
        await self._app(moved, receive, send)


def openai_routes(gate: Gate, prefix: str) -> list[Route | Mount]:
    """The gate under `prefix` and under every alias."""
    aliases = [
        Route(stem + name, Alias(gate, f"/v1/{name}"), methods=None) for name in ALIASED for stem in ("/v1/", "/")
    ]
    return [*aliases, Mount(prefix, gate)] if prefix else list(aliases)
