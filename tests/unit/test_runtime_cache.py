"""GET /lmcache/v1/config: what it shows, and to whom. ASGI in process, a real file, no engine."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from types import SimpleNamespace

import httpx
import prometheus_client
import pytest
from fastapi import FastAPI

from lmcache_ext.config import load_config
from lmcache_ext.reload import INTERVAL_S
from runtime import cache as runtime_cache
from runtime.cache import CONFIG_PATH, CacheRoutes

TEXT = "chunk_size: 256\nmin_retrieve_tokens: 1\nremote_url: 'redis://u:hunter2@h:1'\nextra_config: {token: hunter2}\n"


class Served:
    """The routes of a server with these settings."""

    def __init__(self, path, *, key=None, open_to_all=False, cache=True):
        transfer = SimpleNamespace(kv_connector_extra_config={"lmcache.freeze": False})
        self.path = path
        path.write_text(TEXT)
        config = load_config(path=str(path), connector_extra=transfer.kv_connector_extra_config) if cache else None
        engine = Namespace(api_key=[key] if key else None, kv_transfer_config=transfer)
        settings = SimpleNamespace(cache=config, engine=engine, lmcache_endpoints=open_to_all)
        self.routes = CacheRoutes(settings)
        self.app = FastAPI(routes=self.routes.routes())

    def get(self, host="127.0.0.1", url="http://localhost:8080", **headers):
        names = {name.replace("_", "-"): value for name, value in headers.items()}

        async def call():
            transport = httpx.ASGITransport(self.app, client=(host, 1234))
            async with httpx.AsyncClient(transport=transport, base_url=url) as client:
                return await client.get(CONFIG_PATH, headers=names)

        return asyncio.run(call())

    def look(self):
        while self.routes._watcher.look() != INTERVAL_S:
            pass


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "lmcache_config.yaml"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return tmp_path / "lmcache_config.yaml"


class TestAnswer:
    def test_has_every_setting_with_its_value_and_origin(self, path):
        answer = Served(path).get().json()
        settings = answer["settings"]
        assert answer["file"] == str(path)
        assert settings["chunk_size"] == {"value": "256", "origin": f"{path}:1", "live": False}
        assert settings["min_retrieve_tokens"] == {"value": "1", "origin": f"{path}:2", "live": True}
        assert settings["freeze"]["origin"] == 'kv_connector_extra_config["lmcache.freeze"]'
        assert settings["cache_policy"] == {"value": "LRU", "origin": "default", "live": False}

    def test_has_no_secret(self, path):
        served = Served(path)
        path.write_text(TEXT + "freeze: hunter2\nchunk_size: 1\n")
        served.look()
        text = served.get().text
        assert "hunter2" not in text
        assert "redis://u:***@h:1" in text

    def test_follows_the_file(self, path):
        served = Served(path)
        served.look()
        first = served.get().json()
        assert (first["generation"], first["in_effect"], first["last_refusal"]) == (1, True, None)
        path.write_text(TEXT.replace("tokens: 1", "tokens: 7"))
        served.look()
        second = served.get().json()
        assert second["generation"] == 2
        assert second["digest"] != first["digest"]
        assert second["settings"]["min_retrieve_tokens"]["value"] == "7"

    def test_has_the_last_refusal(self, path):
        served = Served(path)
        path.write_text(TEXT.replace("256", "128"))
        served.look()
        answer = served.get().json()
        assert answer["in_effect"] is False
        assert answer["last_refusal"]["reasons"] == [f"{path}:1: chunk_size: 256 -> 128 needs a restart"]
        assert answer["last_refusal"]["at"].endswith("+00:00")
        assert answer["settings"]["chunk_size"]["value"] == "256"

    def test_has_what_each_engine_said_last(self, path, monkeypatch):
        registry = prometheus_client.CollectorRegistry()
        monkeypatch.setattr(runtime_cache, "REGISTRY", registry)
        labels = ["model_name", "engine"]
        for name, value in (("lmcache_ext:config_generation", 3), ("lmcache_ext:config_digest", 0x0A1B2C3D)):
            prometheus_client.Gauge(name, "", labels, registry=registry).labels("m", "1").set(value)
        counter = prometheus_client.Counter("lmcache_ext:config_reloads", "", [*labels, "outcome"], registry=registry)
        counter.labels("m", "1", "applied").inc(2)
        counter.labels("m", "1", "invalid")
        assert Served(path).get().json()["engines"] == {
            "1": {"files": {"applied": 2}, "generation": 3, "digest": "0a1b2c3d"}
        }

    def test_is_404_without_a_cache(self, path):
        answer = Served(path, cache=False).get()
        assert answer.status_code == 404
        assert "off" in answer.json()["error"]


class TestIsGiven:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.6", "::1", "::ffff:127.0.0.1"])
    @pytest.mark.parametrize("url", ["http://localhost:8080", "http://127.0.0.1", "http://[::1]:8080"])
    def test_without_a_key_to_this_machine(self, path, host, url):
        assert Served(path).get(host, url).status_code == 200

    @pytest.mark.parametrize("host", ["10.0.0.1", "192.168.1.7", "fe80::1", "::ffff:10.0.0.1", "testclient"])
    def test_without_a_key_to_no_other(self, path, host):
        answer = Served(path).get(host)
        assert answer.status_code == 403
        assert "API key" in answer.json()["error"]

    @pytest.mark.parametrize(
        "headers",
        [
            {"x_forwarded_for": "10.0.0.1"},
            {"x_forwarded_proto": "http"},
            {"forwarded": "for=10.0.0.1"},
            {"x_envoy_attempt_count": "1"},
            {"via": "1.1 proxy"},
        ],
    )
    def test_without_a_key_to_nobody_behind_a_proxy_on_this_machine(self, path, headers):
        assert Served(path).get(**headers).status_code == 403

    def test_without_a_key_to_no_page_that_gave_its_name_our_address(self, path):
        assert Served(path).get(url="http://evil.example:8080").status_code == 403

    def test_to_anybody_where_that_was_asked_for(self, path):
        assert Served(path, open_to_all=True).get("10.0.0.1", x_forwarded_for="10.0.0.2").status_code == 200

    @pytest.mark.parametrize("open_to_all", [False, True])
    def test_with_a_key_to_whoever_has_it(self, path, open_to_all):
        served = Served(path, key="secret", open_to_all=open_to_all)
        assert served.get().status_code == 401
        assert served.get(authorization="Bearer other").status_code == 401
        assert served.get("10.0.0.1", authorization="Bearer secret").status_code == 200

    def test_with_the_key_of_vllms_variable(self, path, monkeypatch):
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        served = Served(path)
        assert served.get().status_code == 401
        assert served.get(authorization="Bearer secret").status_code == 200


class TestLogLevel:
    """Of the cache's code in the server's own process, as in the engine's."""

    @pytest.fixture
    def logger(self):
        logger = logging.getLogger("vllm.lmcache_ext")
        yield logger
        logger.setLevel(logging.NOTSET)

    def test_follows_the_file_and_stays_with_one_that_is_not_valid(self, path, logger):
        served = Served(path)
        served.look()
        levels = []
        for text in ("log_level: DEBUG\n", "log_level: LOUD\n", "log_level: ERROR\n", "chunk_size: 256\n"):
            path.write_text(text)
            served.look()
            levels.append(logger.level)
        assert levels == [logging.DEBUG, logging.DEBUG, logging.ERROR, logging.NOTSET]

    def test_debug_shows_what_else_is_left_to_the_engine_to_say(self, path, logger, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
        served = Served(path)
        for level in ("INFO", "DEBUG"):
            path.write_text(f"log_level: {level}\n")
            served.look()
            path.write_text(f"log_level: {level}\nmin_retrieve_tokens: perhaps-{level}\n")
            served.look()
        said = "\n".join(caplog.messages)
        assert "perhaps-DEBUG" in said
        assert "perhaps-INFO" not in said
