"""The gate in front of the OpenAI app and its aliases. ASGI in process, no engine."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from runtime.openai import Gate, GuardAll, openai_routes


async def echo(request):
    return JSONResponse({"path": request.url.path, "root": request.scope.get("root_path", "")})


def application(gate: Gate, prefix: str = "/openai") -> FastAPI:
    app = FastAPI()
    app.router.routes.extend(openai_routes(gate, prefix))
    return app


async def call(app, method: str, path: str, **options) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path, **options)


@pytest.mark.parametrize("path", ["/openai/v1/completions", "/v1/completions", "/completions"])
def test_every_path_reaches_the_same_route(path):
    gate = Gate()
    inner = FastAPI(routes=[Route("/v1/completions", echo, methods=["POST"])])
    gate.attach(inner)
    answer = asyncio.run(call(application(gate), "POST", path))
    assert answer.status_code == 200
    assert answer.json()["path"].endswith("/completions")


def test_an_empty_prefix_leaves_the_aliases():
    gate = Gate()
    gate.attach(FastAPI(routes=[Route("/v1/models", echo)]))
    app = application(gate, prefix="")
    assert asyncio.run(call(app, "GET", "/v1/models")).status_code == 200
    assert asyncio.run(call(app, "GET", "/openai/v1/models")).status_code == 404


@pytest.mark.parametrize(("close", "word"), [(False, "loading"), (True, "shutting down")])
def test_a_closed_gate_answers_503_in_openais_shape(close, word):
    gate = Gate()
    if close:
        gate.attach(PlainTextResponse("ok"))
        gate.close("the server is shutting down")
    answer = asyncio.run(call(application(gate), "POST", "/v1/completions"))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == 503
    assert word in answer.json()["error"]["message"]


def test_idle_waits_for_requests_in_flight():
    async def scenario() -> None:
        gate, release = Gate(), asyncio.Event()

        async def slow(request):
            await release.wait()
            return PlainTextResponse("done")

        gate.attach(FastAPI(routes=[Route("/v1/completions", slow, methods=["POST"])]))
        request = asyncio.create_task(call(application(gate), "POST", "/v1/completions"))
        while gate.in_flight == 0:
            await asyncio.sleep(0)
        gate.close("the server is shutting down")
        idle = asyncio.create_task(gate.idle())
        await asyncio.sleep(0.01)
        assert not idle.done()
        release.set()
        assert (await request).text == "done"
        await asyncio.wait_for(idle, 1)
        assert gate.in_flight == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/tokenize", "/score"])
def test_the_key_guards_paths_vllm_leaves_open(path):
    app = FastAPI(routes=[Route(path, echo, methods=["POST", "OPTIONS"])])
    app.add_middleware(GuardAll, tokens=["secret"])
    assert asyncio.run(call(app, "POST", path)).status_code == 401
    assert asyncio.run(call(app, "POST", path, headers={"Authorization": "Bearer secret"})).status_code == 200
    assert asyncio.run(call(app, "OPTIONS", path)).status_code == 200
