"""How vLLM finds us: the ``vllm.general_plugins`` entry point.

vLLM calls `register` in every process before it looks up a connector. After that the JSON of the
KServe guide, ``{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}``, names our connector.
Where the real ``lmcache`` is installed we leave its names alone, unless LMCACHE_EXT_ENABLE=1.
(With VLLM_PLUGINS set, vLLM loads only the plugins it lists: add ``lmcache_ext``.)
"""

from __future__ import annotations

import importlib.util
import os

CONNECTOR_MODULE = "lmcache_ext.connector"
CONNECTOR_NAME = "LMCacheConnectorV1"
CONNECTOR_NAMES = (CONNECTOR_NAME, "LMCacheConnector", "LMCacheMPConnector")
"""Every name under which people ask for an LMCache connector; the first is today's."""

LOAD_FAILURE_POLICY = "lmcache_ext.kv_load_failure_policy"
"""Connector setting for a policy other than recompute: vLLM's default, "fail", looks like a choice."""

EXPLAIN = "lmcache_ext.explain_enabled"
"""Connector setting: true where a request may ask why it found nothing."""


def takes_over() -> bool:
    """Whether the LMCache connector names mean ours in this process."""
    if os.environ.get("LMCACHE_EXT_ENABLE", "").lower() in ("1", "true", "yes", "on"):
        return True
    found = importlib.util.find_spec("lmcache")
    # no origin: not a package but a directory of that name, as /lmcache is, the guide's mount, to a process in /
    return found is None or found.origin is None


def register() -> None:
    """Point the connector names at ours. Idempotent; imports no model code, starts nothing."""
    if not takes_over():
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in CONNECTOR_NAMES:
        # The factory refuses to register a name twice, and vLLM ships entries for these three.
        KVConnectorFactory._registry.pop(name, None)
        KVConnectorFactory.register_connector(name, CONNECTOR_MODULE, name)
