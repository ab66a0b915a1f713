"""/lmcache/v1/explain before an OpenAI app in process: what it asks, what it answers, and to whom."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.routing import Route
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from lmcache_ext import plugin
from lmcache_ext.offload import explain as told
from runtime import explain
from runtime.explain import EXPLAIN_PATH, ExplainRoute
from runtime.openai import Gate

EXPLANATION = {"reason": "differs", "first_missing_token": 64, "text": "..."}


class OpenAI:
    """An OpenAI app that answers with an explanation, and remembers what it was asked."""

    def __init__(self, explanation=EXPLANATION, *, key=None, nested=False):
        self.asked = []
        self._explanation = explanation
        self._nested = nested
        paths = ("/v1/completions", "/v1/chat/completions")
        self.app = FastAPI(routes=[Route(path, self._answer, methods=["POST"]) for path in paths])
        if key:
            self.app.add_middleware(AuthenticationMiddleware, tokens=[key])

    async def _answer(self, request):
        self.asked.append((request.url.path, json.loads(await request.body())))
        ids = {"prompt_token_ids": list(range(100))}
        params = None if self._explanation is None else {told.ANSWER: self._explanation}
        choice = ids if self._nested else {}
        return JSONResponse({"choices": [choice], "kv_transfer_params": params} | ({} if self._nested else ids))


def call(openai, method="POST", *, enabled=True, attach=True, headers=None, **options):
    gate = Gate()
    if attach:
        gate.attach(openai.app)
    route = ExplainRoute(gate, "tiny", lambda ids: f"{ids[0]}..{ids[-1]}", enabled=enabled)

    async def send():
        transport = httpx.ASGITransport(FastAPI(routes=route.routes()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, EXPLAIN_PATH, headers=headers, **options)

    return asyncio.run(send())


def test_a_body_that_had_no_hit_is_asked_again_for_one_token_that_is_not_stored():
    openai = OpenAI()
    body = {"model": "alias", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 500}
    assert call(openai, json=body | {"stream_options": {"include_usage": True}, "cache_salt": "s"}).status_code == 200
    ((path, asked),) = openai.asked
    assert path == "/v1/chat/completions"
    assert asked.pop("kv_transfer_params") == {told.ASK: True, "max_offload_tokens": 0}
    assert asked == {
        "model": "alias",
        "messages": body["messages"],
        "cache_salt": "s",
        "max_tokens": 1,
        "n": 1,
        "return_token_ids": True,
    }


def test_a_prompt_is_enough():
    openai = OpenAI()
    assert call(openai, "GET", params={"prompt": "once upon a time"}).status_code == 200
    ((path, asked),) = openai.asked
    assert (path, asked["prompt"], asked["model"]) == ("/v1/completions", "once upon a time", "tiny")


@pytest.mark.parametrize("nested", [False, True])
def test_the_answer_has_the_text_around_the_first_token_that_was_not_found(nested):
    answer = call(OpenAI(nested=nested), json={"prompt": "p"}).json()
    assert answer == EXPLANATION | {"text_before": "40..63", "text_after": "64..87"}


def test_an_answer_about_everything_has_no_such_text():
    assert call(OpenAI({"reason": "all"}), json={"prompt": "p"}).json() == {"reason": "all"}


@pytest.mark.parametrize("body", [b"{", b"[]", b'"prompt"', b"{}", b'{"model": "m"}'])
def test_a_body_without_a_prompt_is_400_and_never_asked(body):
    openai = OpenAI()
    answer = call(openai, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert openai.asked == []


def test_it_is_off_unless_enabled():
    openai = OpenAI()
    answer = call(openai, enabled=False, json={"prompt": "p"})
    assert answer.status_code == 404
    assert "--enable_lmcache_endpoints" in answer.json()["error"]
    assert openai.asked == []


def test_the_servers_key_opens_it():
    openai = OpenAI(key="secret")
    assert call(openai, json={"prompt": "p"}).status_code == 401
    assert call(openai, json={"prompt": "p"}, headers={"Authorization": "Bearer no"}).status_code == 401
    assert call(openai, json={"prompt": "p"}, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_while_the_model_loads_it_is_503_as_the_api_is():
    assert call(OpenAI(), attach=False, json={"prompt": "p"}).status_code == 503


def test_a_server_without_our_cache_says_so():
    answer = call(OpenAI(None), json={"prompt": "p"})
    assert answer.status_code == 404
    assert "off" in answer.json()["error"]


def test_both_ends_use_the_same_words():
    assert (explain.ASK, explain.ANSWER) == (told.ASK, told.ANSWER)
    assert plugin.EXPLAIN == told.ENABLED
