"""GET /lmcache/v1/config: every setting of the cache, where its value came from, and what became of the file.

This process watches the file as the engine's processes do; what the engine has taken on, it says in its
statistics (`engines` in the answer). The answer holds no secrets, but it is nobody's business either: it
needs the server's API key; without one it is given to callers on this machine only, and not through a
proxy (a mesh's sidecar calls from this machine too), unless --enable_lmcache_endpoints says otherwise.
"""

from __future__ import annotations

import datetime
import ipaddress
from typing import Any

from prometheus_client import REGISTRY
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from lmcache_ext.config import Config, load_config
from lmcache_ext.config_diff import is_live
from lmcache_ext.reload import ConfigWatcher, Refusal
from runtime.args import Settings
from runtime.openai import api_keys

CONFIG_PATH = "/lmcache/v1/config"
GENERATION, DIGEST = "lmcache_ext:config_generation", "lmcache_ext:config_digest"
RELOADS = "lmcache_ext:config_reloads_total"
# Headers that a proxy adds, and `curl` through `kubectl port-forward` does not.
PROXY_HEADERS = ("forwarded", "x-forwarded-", "x-real-ip", "x-envoy-", "x-request-id", "via")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class CacheRoutes:
    """The cache's routes. `open` before the server serves, `close` after; on the event loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self._connector_extra: dict[str, Any] = {}
        if settings.cache is not None:
            self._connector_extra = settings.engine.kv_transfer_config.kv_connector_extra_config
        self._watcher = None if settings.cache is None else ConfigWatcher(settings.cache, self._load, quiet=True)
        self._keys = api_keys(settings.engine)
        self._guard = AuthenticationMiddleware(_nothing, self._keys)  # for its comparison of keys
        self._for_all = settings.lmcache_endpoints

    def open(self) -> None:
        """Watch the file."""
        if self._watcher is not None:
            self._watcher.open()

    def close(self) -> None:
        """Stop watching; may be called twice."""
        if self._watcher is not None:
            self._watcher.close()

    def routes(self) -> list[Route]:
        """For the server's app, outside the gate: answered while the model loads, too."""
        return [Route(CONFIG_PATH, self._config_route, methods=["GET"])]

    def _load(self) -> Config:
        return load_config(connector_extra=self._connector_extra)

    async def _config_route(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        if self._watcher is None:
            return _error(404, "the KV cache is off: there is no --kv-transfer-config that names LMCacheConnectorV1")
        return JSONResponse(self._answer(self._watcher))

    def _refused(self, request: Request) -> Response | None:
        if self._keys:
            return None if self._guard.verify_token(request.headers) else _error(401, "Unauthorized")
        if self._for_all or is_local(request):
            return None
        return _error(
            403, f"{request.url.path} is answered on this machine only: set an API key, or --enable_lmcache_endpoints"
        )

    def _answer(self, watcher: ConfigWatcher) -> dict[str, Any]:
        status = watcher.status
        rows = status.config.describe()
        return {
            "file": status.config.path,
            "digest": status.digest or None,
            "generation": status.generation,
            "in_effect": status.whole,
            "last_refusal": _shown(status.refusal),
            "settings": {key: {"value": value, "origin": origin, "live": is_live(key)} for key, value, origin in rows},
            "notes": list(status.config.notes),
            "engines": engines(),
        }


def is_local(request: Request) -> bool:
    """Whether the caller is on this machine, asked for this machine by name, and is no proxy that we can tell."""
    if request.client is None or not _is_loopback(request.client.host):
        return False
    if request.url.hostname not in LOCAL_NAMES:  # a browser that was sent here by a name of another's
        return False
    return not any(name.startswith(PROXY_HEADERS) for name in request.headers)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def engines() -> dict[str, dict[str, Any]]:
    """What each engine said last, by its number; one without requests says nothing new."""
    found: dict[str, dict[str, Any]] = {}
    registry: Any = REGISTRY.restricted_registry([GENERATION, DIGEST, RELOADS])
    for metric in registry.collect():
        for sample in metric.samples:
            engine = found.setdefault(sample.labels.get("engine", "0"), {"files": {}})
            if sample.name == GENERATION:
                engine["generation"] = int(sample.value)
            elif sample.name == DIGEST:
                engine["digest"] = f"{int(sample.value):08x}"
            elif sample.value:
                engine["files"][sample.labels["outcome"]] = int(sample.value)
    return found


def _shown(refusal: Refusal | None) -> dict[str, Any] | None:
    if refusal is None:
        return None
    at = datetime.datetime.fromtimestamp(refusal.at, datetime.UTC).isoformat(timespec="seconds")
    return {"at": at, "digest": refusal.digest, "reasons": list(refusal.reasons)}


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The app behind a middleware that is only asked."""


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)
