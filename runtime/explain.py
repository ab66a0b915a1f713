"""/lmcache/v1/explain: why one request finds nothing in the cache. Off unless --enable_lmcache_endpoints.

It takes the very body that was sent to /v1/chat/completions or /v1/completions (POST), or `?prompt=` (GET), asks
the engine for one token of it, and answers with what the cache says about its lookup and the text around the
first token that was not found. The prompt is looked up and computed as any other, and not stored. Who may ask is
the OpenAI API's to say: the request goes through it, with the caller's headers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

EXPLAIN_PATH = "/lmcache/v1/explain"
ASK, ANSWER = "lmcache_ext.explain", "lmcache_ext.explanation"  # as in lmcache_ext.offload.explain; a test compares

SHOWN_TOKENS = 24
"""Of the text before, and after, the first token that was not found."""

# What a body may ask for that one token has no use for, or that would make another answer of it.
_DROPPED = ("stream", "stream_options", "max_completion_tokens", "best_of", "min_tokens", "tools", "tool_choice")
_CHANGED: dict[str, Any] = {"max_tokens": 1, "n": 1, "return_token_ids": True}
_FORWARDED = ("authorization",)

Decode = Callable[[list[int]], str]


class ExplainRoute:
    """Asks `openai_app` in this process; `decode` makes text of token ids."""

    def __init__(self, openai_app: ASGIApp, model_name: str, decode: Decode, *, enabled: bool) -> None:
        self._app = openai_app
        self._model_name = model_name
        self._decode = decode
        self._enabled = enabled

    def routes(self) -> list[Route]:
        """For the server's app."""
        return [Route(EXPLAIN_PATH, self._route, methods=["GET", "POST"])]

    async def _route(self, request: Request) -> Response:
        if not self._enabled:
            return _error(404, f"{EXPLAIN_PATH} is off: start the server with --enable_lmcache_endpoints")
        try:
            body = await _body(request)
        except ValueError as error:
            return _error(400, str(error))
        answer = await self._ask(body, request)
        if answer.status_code != 200:
            return Response(answer.content, answer.status_code, media_type="application/json")
        payload = answer.json()
        explanation = (payload.get("kv_transfer_params") or {}).get(ANSWER)
        if explanation is None:
            return _error(404, "the cache said nothing: it is off, or not this package's")
        return JSONResponse(explanation | self._around(payload, explanation.get("first_missing_token")))

    async def _ask(self, body: dict[str, Any], request: Request) -> httpx.Response:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        kept = {name: value for name, value in body.items() if name not in _DROPPED}
        params = {ASK: True, "max_offload_tokens": 0}
        asked = {"model": self._model_name, **kept, **_CHANGED, "kv_transfer_params": params}
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
            return await client.post(path, json=asked, headers=headers)

    def _around(self, payload: dict[str, Any], token: int | None) -> dict[str, str]:
        """The text before and after a token of the prompt."""
        ids = payload.get("prompt_token_ids") or payload["choices"][0].get("prompt_token_ids")
        if token is None or not ids:
            return {}
        before, after = ids[max(0, token - SHOWN_TOKENS) : token], ids[token : token + SHOWN_TOKENS]
        return {"text_before": self._decode(before), "text_after": self._decode(after)}


async def _body(request: Request) -> dict[str, Any]:
    """The request to explain. Raises ValueError with what is missing."""
    if request.method == "GET":
        body: Any = dict(request.query_params)
    else:
        try:
            body = json.loads(await request.body())
        except ValueError:
            raise ValueError("the body is not JSON: send what you send to /v1/chat/completions") from None
    if not isinstance(body, dict) or not body.keys() & {"prompt", "messages"}:
        raise ValueError("nothing to explain: send the body of a completion, with its prompt or messages")
    return body


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)
