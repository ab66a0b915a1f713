"""Quotas of tenants: salts in clear, limits that limit nothing, promises of more than there is."""

from __future__ import annotations

from collections.abc import Iterator

from lmcache_ext.config_quotas import OTHERS, Quota, digest_key, is_salt, quotas
from lmcache_ext.config_settle import DEFAULT_HOST_BYTES
from lmcache_ext.config_values import in_gib, size_bytes
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.bundle import Bundle
from lmcache_ext.manifests.findings import Found, Rule
from lmcache_ext.manifests.nodes import Node, rename


def _mappings(bundle: Bundle) -> Iterator[tuple[Node, Node]]:
    """Each file with quotas, and they; those that cannot be read are `setting-value`'s to find."""
    for document in bundle.settings:
        written = document.node.at("extra_config", "quotas")
        if written is not None and written.is_mapping:
            yield document.node, written


def _read(node: Node) -> tuple[Quota, ...]:
    try:
        return quotas(node.value())
    except (ManifestError, ValueError):
        return ()


def _host_bytes(settings: Node) -> int:
    """What they share; 0 where nobody can tell."""
    size = settings.at("max_local_cpu_size")
    try:
        return DEFAULT_HOST_BYTES if size is None else size_bytes(size.value())
    except (ManifestError, ValueError):
        return 0


def _salts(bundle: Bundle) -> Iterator[Found]:
    for _, written in _mappings(bundle):
        for pair in written.pairs():
            if is_salt(pair.name):
                fix = "write its SHA-256: printf %s SALT | sha256sum"
                yield Found(pair, "a salt stands here in clear", fix, rename(pair, digest_key(pair.name)))


def _large(bundle: Bundle) -> Iterator[Found]:
    for settings, written in _mappings(bundle):
        host_bytes = _host_bytes(settings)
        for pair, quota in zip(written.pairs(), _read(written), strict=False):
            if host_bytes and quota.host_bytes >= host_bytes:
                message = f"{quota} is not less than max_local_cpu_size of {in_gib(host_bytes)}"
                yield Found(pair, message, "write less, or remove it", at_value=True)


def _sum(bundle: Bundle) -> Iterator[Found]:
    for settings, written in _mappings(bundle):
        host_bytes = _host_bytes(settings)
        total_bytes = sum(quota.host_bytes for quota in _read(written) if quota.tenant != OTHERS)
        if 0 < host_bytes < total_bytes:
            message = f"{in_gib(total_bytes)} for all named tenants, of max_local_cpu_size of {in_gib(host_bytes)}"
            yield Found(written, message, "lower them, or raise max_local_cpu_size")


RULES = (
    Rule(
        "quota-salt",
        "warning",
        "who can read a ConfigMap could time what a tenant has asked: a salt is its secret",
        _salts,
    ),
    Rule("quota-large", "warning", "a quota is a limit, and this one limits nothing", _large),
    Rule("quota-sum", "note", "a quota reserves nothing: tenants within theirs may still evict each other", _sum),
)
