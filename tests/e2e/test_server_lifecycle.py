"""The model server as clients and Kubernetes meet it: routes, errors, probes, signals, death. Real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from examples.tiny_model import build
from lmcache_ext import cli
from tests.e2e.server import MODELS, ROOT, Server, cached_tokens

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model():
    return build(MODELS / "tiny-llama")


@pytest.fixture(scope="module")
def server(model):
    """One server for the whole file; the tests at the end use it up."""
    args = ["--served_model_name", "alias-of-tiny", "--enable_tokenize_endpoint", "--api-key", "secret"]
    with Server(model, args) as running:
        running._client.headers["Authorization"] = "Bearer secret"
        yield running


COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}


def test_doctor_says_that_the_cache_is_off_and_nothing_is_explained_unless_enabled(server, capsys, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    assert cli.main(["doctor", server.url, "--api-key-file", str(key), "--prompt", "hello"]) == 1
    said = capsys.readouterr().out
    assert "problem: the cache is off: /metrics has nothing of it\n" in said
    off = "/lmcache/v1/explain is off: start the server with --enable_lmcache_endpoints"
    assert f"note: this request could not be explained: {off}\n" in said


@pytest.mark.parametrize("path", ["/openai/v1/completions", "/v1/completions", "/completions"])
def test_text_completion_on_every_path(server, path):
    answer = server.post(path, COMPLETION)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("path", ["/openai/v1/chat/completions", "/v1/chat/completions", "/chat/completions"])
def test_chat_completion_on_every_path(server, path):
    answer = server.post(path, CHAT)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("path", ["/openai/v1/chat/completions", "/chat/completions"])
def test_chat_streams_token_by_token(server, path):
    events = list(server.stream(path, {**CHAT, "stream_options": {"include_usage": True}}))
    assert sum(bool(event["choices"]) for event in events) >= 4
    assert events[-1]["usage"]["completion_tokens"] == 4


def test_responses_api(server):
    answer = server.post("/openai/v1/responses", {"model": "tiny", "input": "hi", "max_output_tokens": 4})
    assert answer.status_code == 200, answer.text


def test_aliases_answer_and_are_listed_once(server):
    assert server.post("/v1/completions", {**COMPLETION, "model": "alias-of-tiny"}).status_code == 200
    for path in ("/openai/v1/models", "/v1/models"):
        cards = server.get(path).json()["data"]
        assert [card["id"] for card in cards] == ["tiny", "alias-of-tiny"]
        assert cards[0]["max_model_len"] == 8192


def test_usage_shows_cached_tokens(server):
    prompt = "a prompt to be seen twice " * 20
    assert cached_tokens(server.complete(prompt)) == 0
    assert cached_tokens(server.complete(prompt)) >= 384


def test_kserve_protocol_knows_the_model(server):
    assert server.get("/v1/models/tiny").json() == {"name": "tiny", "ready": True}
    assert server.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    assert server.get("/v2/models/alias-of-tiny/ready").status_code == 200
    assert server.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize("path", ["/", "/health", "/v2/health/live", "/v2/health/ready"])
def test_healthy_while_serving(server, path):
    assert httpx.get(server.url + path).status_code == 200  # without the API key: a probe has none


def test_metrics_carry_the_engines(server):
    before = server.metrics()["vllm:prompt_tokens_total"]
    server.complete("count these tokens")
    assert server.metrics()["vllm:prompt_tokens_total"] == before + len("count these tokens")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({**COMPLETION, "model": "other"}, 404),
        ({**COMPLETION, "temperature": -3}, 400),
        ({**COMPLETION, "prompt": "x" * 9000}, 400),
        ({**COMPLETION, "prompt": {"not": "a prompt"}}, 400),
    ],
)
def test_errors_have_openais_shape(server, body, status):
    answer = server.post("/openai/v1/completions", body)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status
    assert answer.json()["error"]["message"]


def test_bad_json_and_unknown_paths_have_openais_shape(server):
    answer = server._client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)
    answer = server.get("/openai/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, 404)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/models/tiny/unload",
        "/v2/repository/models/tiny/load",
        "/openai/invocations",
        "/openai/scale_elastic_ep",
        "/openai/ping",
        "/openai/v1/load_lora_adapter",
        "/v2/models/tiny/infer",
    ],
)
def test_no_route_that_ends_or_bypasses_the_engine(server, path):
    assert server.post(path, {}).status_code in (404, 405)


def test_openai_metrics_are_not_served_twice(server):
    assert server.get("/openai/metrics").status_code == 404


@pytest.mark.parametrize("path", ["/openai/v1/completions", "/v1/completions", "/completions", "/openai/tokenize"])
def test_api_key_guards_every_openai_path(server, path):
    assert httpx.post(server.url + path, json=COMPLETION).status_code == 401
    assert httpx.post(server.url + path, json=COMPLETION, headers={"Authorization": "Bearer no"}).status_code == 401
    assert server.post(path, COMPLETION).status_code == 200


def test_sigterm_finishes_the_stream_and_leaves_nobody(server):
    """Uses the module's server up: this and the tests above share one start."""
    events: list[dict] = []
    body = {**COMPLETION, "max_tokens": 1500, "stream_options": {"include_usage": True}}  # seconds on any machine
    reader = threading.Thread(target=lambda: events.extend(server.stream("/v1/completions", body)))
    reader.start()
    server.wait_for(lambda: server.metrics().get("vllm:num_requests_running", 0) >= 1, 10, "run the stream")
    server.terminate()
    server.wait_for(lambda: server.status("/v2/health/ready") == 503, 5, "stop being ready")
    assert server.status("/v2/health/live") == 200
    refused = server.post("/v1/completions", COMPLETION)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, 503)
    reader.join(60)
    assert events[-1]["usage"]["completion_tokens"] == 1500
    assert server.wait(45) == 0
    assert server.survivors() == []
    assert "output_handler failed" not in server.log()


def test_sigterm_while_loading_ends_at_once_and_leaves_nobody(model):
    with Server(model, wait=False) as server:
        server.wait_for(lambda: server.status("/v2/health/live") == 200, 60, "listen")
        assert server.status("/v2/health/ready") == 503
        early = server.post("/v1/completions", COMPLETION)
        assert (early.status_code, early.json()["error"]["code"]) == (503, 503)
        server.wait_for(lambda: len(server.children()) >= 2, 60, "start its engine")
        began = time.monotonic()
        server.terminate()
        assert server.wait(15) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 10
        assert server.survivors() == []


def test_death_of_the_engine_fails_the_probes_and_ends_the_server(model):
    with Server(model) as server:
        server.child("EngineCore").kill()
        server.wait_for(lambda: server.status("/v2/health/ready") == 503, 5, "stop being ready")
        server.wait_for(lambda: server.status("/v2/health/live") == 503, 5, "stop being live")
        assert server.wait(20) == 1
        assert server.survivors() == []


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime", *args], cwd=ROOT, capture_output=True, text=True, timeout=90
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model_dir=/nowhere"], "/nowhere does not exist"),
        (["--model_dir", "{model}", "--http_port=eighty"], "http_port"),
        (["--model_dir", "{model}", "--max_model_len=99999999", "--http_port=0"], "max_model_len"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(model, args, words):
    done = run(*[arg.format(model=model) for arg in args])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr
