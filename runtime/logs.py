"""Logging of the model server: kserve's layout, with our logger beside kserve's and uvicorn's."""

from __future__ import annotations

import copy
import logging

from kserve.logging import KSERVE_LOG_CONFIG, configure_logging

from runtime.args import Settings


def configure(settings: Settings) -> None:
    """Apply --configure_logging, --log_config_file and --disable-uvicorn-access-log."""
    own = settings.kserve
    if own.configure_logging:
        configure_logging(own.log_config_file or _default_config())
    if settings.engine.disable_uvicorn_access_log:
        logging.getLogger("uvicorn.access").handlers.clear()


def _default_config() -> dict[str, object]:
    config = copy.deepcopy(KSERVE_LOG_CONFIG)
    config["loggers"]["runtime"] = config["loggers"]["kserve"]
    return dict(config)
