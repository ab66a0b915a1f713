"""The traps, one rule each."""

from lmcache_ext.manifests.findings import Rule
from lmcache_ext.manifests.rules import (
    disk,
    engine,
    helm,
    lifecycle,
    memory,
    mounts,
    quotas,
    remote,
    requests,
    schema,
    servers,
    settings,
)

RULES: tuple[Rule, ...] = (
    *schema.RULES,
    *settings.RULES,
    *quotas.RULES,
    *mounts.RULES,
    *engine.RULES,
    *lifecycle.RULES,
    *memory.RULES,
    *disk.RULES,
    *remote.RULES,
    *servers.RULES,
    *helm.RULES,
    *requests.RULES,
)
