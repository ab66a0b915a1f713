"""Logging of the model server: kserve's layout, with our logger beside kserve's and uvicorn's."""

from __future__ import annotations

import copy
import logging

from kserve.logging import KSERVE_LOG_CONFIG, configure_logging
from vllm.logging_utils import UvicornAccessLogFilter

from lmcache_ext.reload import set_log_level
from runtime.args import Settings

PROBE_PATHS = ("/", "/health", "/metrics", "/v2/health/live", "/v2/health/ready")  # one line every few seconds each


def configure(settings: Settings) -> None:
    """Apply the flags on logging, and the cache's `log_level`, which its watcher then keeps to the file.

    Without --disable-access-log-for-endpoints, probes leave no access lines.
    """
    own, engine = settings.kserve, settings.engine
    if settings.cache is not None:
        set_log_level(settings.cache)
    if own.configure_logging:
        configure_logging(own.log_config_file or _default_config())
    logging.getLogger("uvicorn").setLevel(engine.uvicorn_log_level.replace("trace", "debug").upper())
    access = logging.getLogger("uvicorn.access")
    if engine.disable_uvicorn_access_log:
        access.handlers.clear()
        return
    chosen = engine.disable_access_log_for_endpoints
    paths = PROBE_PATHS if chosen is None else tuple(path.strip() for path in chosen.split(",") if path.strip())
    access.addFilter(UvicornAccessLogFilter(excluded_paths=list(paths)))


def _default_config() -> dict[str, object]:
    config = copy.deepcopy(KSERVE_LOG_CONFIG)
    config["loggers"]["runtime"] = config["loggers"]["kserve"]
    return dict(config)
