"""Readiness and liveness by the engine's state. A stand-in engine, kserve's own data plane."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from types import SimpleNamespace

import pytest
from kserve.errors import ServerNotLive
from kserve.model_repository import ModelRepository

from runtime.health import EngineDataPlane
from runtime.model import EngineModel, State


def plane(state: State, *, errored: bool = False) -> EngineDataPlane:
    model = EngineModel("m", Namespace(shutdown_timeout=0))
    model.state = state
    model.client = SimpleNamespace(errored=errored)
    registry = ModelRepository()
    registry.update(model)
    return EngineDataPlane(model_registry=registry)


@pytest.mark.parametrize(
    ("state", "errored", "ready", "live"),
    [
        (State.LOADING, False, False, True),
        (State.SERVING, False, True, True),
        (State.SERVING, True, False, False),  # before the watchdog noticed
        (State.DRAINING, False, False, True),
        (State.DRAINING, True, False, True),  # its process ended because we asked
        (State.STOPPED, True, False, True),
        (State.DEAD, True, False, False),
    ],
)
def test_probes_follow_the_engine(state, errored, ready, live):
    probes = plane(state, errored=errored)
    assert asyncio.run(probes.ready()) is ready
    if live:
        assert asyncio.run(probes.live()) == {"status": "alive"}
    else:
        with pytest.raises(ServerNotLive):
            asyncio.run(probes.live())


def test_without_a_model_nothing_is_ready():
    assert asyncio.run(EngineDataPlane(model_registry=ModelRepository()).ready()) is False


def test_kserves_load_does_not_wake_a_stopped_model():
    model = EngineModel("m", Namespace(shutdown_timeout=0))
    assert model.load() is False
    assert asyncio.run(model.healthy()) is False
