"""A failure of ours costs one request its cache, is told once and counted, and never ends the engine."""

from __future__ import annotations

import logging

import pytest

from lmcache_ext.offload import hooks
from lmcache_ext.offload.hooks import Hooks


def fail():
    raise RuntimeError("a bug")


@pytest.fixture
def told(monkeypatch):
    """Messages of our logger; vLLM's loggers do not propagate."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage(), record.exc_info))
    hooks.logger.addHandler(handler)
    yield messages
    hooks.logger.removeHandler(handler)


def test_a_body_that_returns_is_left_alone():
    found = Hooks()
    assert found.run("x", lambda: 3, 0, req_id="r") == 3
    assert not found.bypassed("r")
    assert not found.take_failures()


def test_a_failure_bypasses_its_request_only(told):
    found = Hooks()
    assert found.run("x", fail, "neutral", req_id="r") == "neutral"
    assert found.bypassed("r")
    assert not found.bypassed("other")
    assert not found.off


def test_a_request_that_is_gone_is_forgotten(told):
    found = Hooks()
    found.run("x", fail, None, req_id="r")
    found.forget("r")
    assert not found.bypassed("r")


def test_a_failure_of_nobody_turns_the_cache_off(told):
    found = Hooks()
    found.run("x", fail, None)
    assert found.off
    assert found.bypassed("anybody")
    assert [level for level, _, _ in told] == ["ERROR", "ERROR"]


def test_failures_are_counted_by_hook_and_taken_once(told):
    found = Hooks()
    for hook in ("x", "x", "y"):
        found.run(hook, fail, None, req_id="r")
    assert found.take_failures() == {"x": 2, "y": 1}
    assert not found.take_failures()


def test_a_traceback_is_logged_once_per_hook(told):
    found = Hooks()
    for hook in ("x", "x", "y"):
        found.run(hook, fail, None, req_id="r")
    assert len(told) == 2
    assert all(exc_info is not None for _, _, exc_info in told)


def test_too_many_failures_turn_the_cache_off_although_they_are_taken_each_step(told):
    found = Hooks()
    for i in range(hooks._MAX_FAILURES):
        assert not found.off
        found.run("x", fail, None, req_id=f"r{i}")
        found.take_failures()
    assert found.off


def test_what_asks_the_process_to_end_passes():
    def leave():
        raise SystemExit

    with pytest.raises(SystemExit):
        Hooks().run("x", leave, None, req_id="r")
