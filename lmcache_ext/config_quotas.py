"""``extra_config.quotas``: how much of host memory the KV of one tenant may take.

A tenant is a ``cache_salt``. A salt is a secret (who knows it can time what others have asked), so it is known
here by its SHA-256 only, and shown by the name given to it or by the first digits of that:

    quotas:
      "sha256:9f86d081884c7d65...": {host: 2Gi, name: team-a}   # printf %s SALT | sha256sum
      a-salt: 500Mi          # the salt itself: shorter, but it stands in the file
      "*": 200Mi             # every other tenant, each for itself
      unsalted: 1Gi          # the requests without a salt, together; without this line "*" counts for them
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lmcache_ext.config_values import MASK, in_gib, size_bytes, table, text

UNSALTED = "unsalted"
OTHERS = "*"
MAX_QUOTAS = 1000  # each is some time series

_WORDS = (UNSALTED, OTHERS)
_PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")
_SHOWN_DIGITS = 8
_OPTIONS = ("host", "name")
# A chunk is known there by a hash; who shares the place writes and evicts it too, and no engine sees all of that.
_OF_ALL = {
    "disk": "max_local_disk_size is the limit of all tenants there",
    "remote": "its server has the limit of all tenants there",
}
_FORM = 'write a size, such as 500Mi, or {"host": "500Mi", "name": "team-a"}'


@dataclass(frozen=True, slots=True)
class Quota:
    """The most that one tenant may hold."""

    tenant: str  # hex SHA-256 of its salt, UNSALTED or OTHERS
    name: str  # in logs and metrics
    host_bytes: int

    def __str__(self) -> str:
        return f"{self.name}={in_gib(self.host_bytes)}"


def tenant_of_salt(salt: str | None) -> str:
    """How a tenant is known everywhere but in its requests."""
    # a JSON string may hold half of a surrogate pair, which UTF-8 has no place for
    return hashlib.sha256(salt.encode("utf-8", "surrogatepass")).hexdigest() if salt else UNSALTED


def is_salt(key: str) -> bool:
    """Whether a key of the mapping is a salt in clear."""
    return key not in _WORDS and not key.startswith(_PREFIX)


def digest_key(salt: str) -> str:
    """The key that stands for a salt."""
    return _PREFIX + tenant_of_salt(salt)


def tenant_label(key: str) -> str:
    """A key of the mapping as it may be shown."""
    if key in _WORDS:
        return key
    digest = key.lower() if _DIGEST.fullmatch(key) else digest_key(key)
    return digest[: len(_PREFIX) + _SHOWN_DIGITS]


def quotas(value: object) -> tuple[Quota, ...]:
    """A mapping from tenants to sizes; sizes are read as everywhere."""
    found = tuple(_quota(place, *entry) for place, entry in enumerate(table(value).items(), start=1))
    if len(found) > MAX_QUOTAS:
        raise ValueError(f'has {len(found)} tenants, more than {MAX_QUOTAS}: write "*" for all that have the same')
    for what in ("tenant", "name"):
        seen: set[str] = set()
        for quota in found:
            if getattr(quota, what) in seen:
                raise ValueError(f"has two lines for the {what} {quota.name}: remove or rename one of them")
            seen.add(getattr(quota, what))
    return found


def masked_quotas(value: object) -> object:
    """What was written, as it may be shown: without salts."""
    if isinstance(value, Mapping):
        return {tenant_label(str(key)): _masked_options(written) for key, written in value.items()}
    return value if value is None or isinstance(value, Quota | int | float) else MASK


def _masked_options(written: object) -> object:
    if isinstance(written, Mapping):
        return {name: item if name in _OPTIONS else MASK for name, item in written.items()}
    return written if isinstance(written, str | int | float) or written is None else MASK


def _quota(place: int, key: str, written: object) -> Quota:
    """`place` counts the tenants from 1: where a salt may not be shown, it tells which one is meant."""
    label = tenant_label(key)
    try:
        if key.startswith(_PREFIX) and not _DIGEST.fullmatch(key):
            raise ValueError("is no SHA-256 of 64 digits: printf %s SALT | sha256sum gives one")
        options = written if isinstance(written, Mapping) else {"host": written}
        if (far := set(options) & _OF_ALL.keys()) and set(options) <= {*_OPTIONS, *_OF_ALL}:
            tier = min(far)
            raise ValueError(f"has a limit for {tier}, where nothing says whose a chunk is: {_OF_ALL[tier]}")
        if "host" not in options or not set(options) <= set(_OPTIONS):
            raise ValueError(f"is no quota: {_FORM}")
        host_bytes = _size(options["host"])
        name = label if "name" not in options else text(options["name"])
        if name != label and name in _WORDS:
            raise ValueError(f"may not be named {name}: write another name")
    except ValueError as error:
        raise ValueError(f"is not valid: tenant {place}, {label}, {error}") from None
    tenant = key if key in _WORDS else key.removeprefix(_PREFIX).lower() if _DIGEST.fullmatch(key) else None
    return Quota(tenant or tenant_of_salt(key), name, host_bytes)


def _size(value: object) -> int:
    if isinstance(value, Mapping | list | tuple):
        raise ValueError(f"is no quota: {_FORM}")
    try:
        return size_bytes(value)
    except ValueError as error:
        raise ValueError(f"has {value!r}, which {error}") from None
