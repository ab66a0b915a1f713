"""Readiness and liveness that ask the engine.

| engine | /v2/health/ready, /health | /v2/health/live, / |
|---|---|---|
| loading | 503 | 200 |
| serving | 200 | 200 |
| draining | 503 | 200 |
| dead | 503 | 503 |
"""

from __future__ import annotations

from kserve.errors import ServerNotLive
from kserve.protocol.dataplane import DataPlane

from runtime.model import EngineModel


class EngineDataPlane(DataPlane):
    """KServe's data plane; kserve's own answers "alive" and "ready" whatever happened to the engine (kserve#6259)."""

    async def live(self) -> dict[str, str]:
        """`{"status": "alive"}`; raises ServerNotLive (503) once an engine has died."""
        if any(model.dead for model in self._engines()):
            raise ServerNotLive("The engine has died.")
        return {"status": "alive"}

    async def ready(self) -> bool:
        """True when there is a model and every model's engine takes requests."""
        engines = self._engines()
        return bool(engines) and all([await model.healthy() for model in engines])

    def _engines(self) -> list[EngineModel]:
        return [model for model in self.model_registry.get_models().values() if isinstance(model, EngineModel)]
