"""Access lines: requests leave one, probes do not."""

from __future__ import annotations

import logging
from argparse import Namespace
from types import SimpleNamespace

import pytest

from lmcache_ext.config import Config, load_config
from runtime import logs


def record(path: str) -> logging.LogRecord:
    args = ("127.0.0.1:1", "GET", path, "1.1", 200)
    return logging.LogRecord("uvicorn.access", logging.INFO, __file__, 1, '%s - "%s %s HTTP/%s" %d', args, None)


@pytest.fixture
def access_logger():
    logger = logging.getLogger("uvicorn.access")
    before = list(logger.filters)
    yield logger
    logger.filters[:] = before


def configure(endpoints: str | None, cache: Config | None = None) -> None:
    engine = Namespace(
        disable_uvicorn_access_log=False, disable_access_log_for_endpoints=endpoints, uvicorn_log_level="info"
    )
    logs.configure(SimpleNamespace(kserve=Namespace(configure_logging=False), engine=engine, cache=cache))


def test_probes_leave_no_access_lines(access_logger):
    configure(None)
    assert not access_logger.filter(record("/v2/health/ready"))
    assert not access_logger.filter(record("/metrics"))
    assert access_logger.filter(record("/openai/v1/completions"))


def test_the_users_list_replaces_ours(access_logger):
    configure("/v1/models, /metrics")
    assert access_logger.filter(record("/v2/health/ready"))
    assert not access_logger.filter(record("/v1/models"))


def test_the_caches_log_level_counts_in_the_servers_process_too(tmp_path, access_logger):
    path = tmp_path / "lmcache_config.yaml"
    path.write_text("log_level: WARNING\n")
    logger = logging.getLogger("vllm.lmcache_ext")
    try:
        configure(None, load_config(path=str(path), environ={}))
        assert logger.level == logging.WARNING
    finally:
        logger.setLevel(logging.NOTSET)
