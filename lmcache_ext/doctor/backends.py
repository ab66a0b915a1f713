"""Whether a backend of `remote_url` could give hits: that it is there, has room, and holds chunks of this namespace.

It is asked from where the doctor runs, which may have another way to it than the server has. Nothing is written, and no
password is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmcache_ext.config_urls import mask_url, remote_url
from lmcache_ext.doctor.findings import NEARLY_FULL, Finding, gib
from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.base import Survey
from lmcache_ext.stores.registry import open_store

SHOWN_NAMESPACES = 3

PATIENCE_S = 5.0
"""For one answer: longer than any engine waits, so that a slow server is told from a dead one."""

# Brings no memory into the pool: who joins to ask a question is gone again at once.
_MOONCAKE = {"global_segment_bytes": 0, "local_buffer_bytes": 16 * 2**20}

_DENIED = ("access denied", "unauthorized", "username-password", "invalid password", "knows no tokens")
_KEEPS = ("noeviction", "volatile-")
"""Policies by which a server refuses what is new, since chunks have no time to live unless `ttl` is set."""


def gather(url: str, options: Mapping[str, Any]) -> list[Survey]:
    """Ask every server behind `url`. Raises ConfigError, which shows no password, where it is not a `remote_url`."""
    shown = mask_url(url)
    patient = {name: PATIENCE_S for name in ("lookup_timeout_s", "request_timeout_s") if name in options}
    asking = {**options, **patient, **(_MOONCAKE if url.startswith("mooncakestore://") else {})}
    try:
        store = open_store(remote_url(url), options=asking)
    except ValueError as error:
        raise ConfigError(f"{shown} {error}") from None
    except ConfigError as error:
        raise ConfigError(str(error).replace(url, shown)) from None
    try:
        surveys = store.survey()
    finally:
        store.close()
    return [survey if survey.server != store.name else _of(shown, survey) for survey in surveys]


def findings(survey: Survey, *, namespace: str, lookup_timeout_s: float) -> Iterator[Finding]:
    """What is to be said of one server of a backend; `namespace` as hex, or empty where nobody knows it."""
    if survey.failure:
        yield _failure(survey)
        return
    yield from _speed(survey, lookup_timeout_s)
    yield from _room(survey)
    yield from _chunks(survey, namespace)


def _of(shown: str, survey: Survey) -> Survey:
    """A survey of a store that has one name for all, as that of its URL."""
    return Survey(shown, survey.failure, survey.ping_s, survey.usage, survey.when_full, survey.objects, survey.is_whole)


def _failure(survey: Survey) -> Finding:
    cause = survey.failure.removeprefix(f"{survey.server}: ")
    if any(word in cause.lower() for word in _DENIED):
        return Finding("problem", f"{survey.server} lets nobody in with this password or token: {cause}")
    way_out = "is it up, is this its address, and may this machine connect to it (NetworkPolicy)?"
    return Finding("problem", f"{survey.server} does not answer: {cause}", way_out)


def _speed(survey: Survey, lookup_timeout_s: float) -> Iterator[Finding]:
    if survey.ping_s is None:
        return
    what = f"{survey.server} answers in {survey.ping_s * 1000:.1f} ms"
    if survey.ping_s >= lookup_timeout_s:
        what += f", and a lookup waits for {lookup_timeout_s * 1000:.0f} ms: every lookup is a miss"
        yield Finding("problem", what, "bring it nearer, or raise lookup_timeout_ms")
    else:
        yield Finding("ok", what)


def _room(survey: Survey) -> Iterator[Finding]:
    used, capacity = survey.usage.used_bytes, survey.usage.capacity_bytes
    policy = f"; when it is full: {survey.when_full}" if survey.when_full else ""
    if used is None:
        yield Finding("note", f"{survey.server} does not say how full it is")
        return
    if not capacity:
        way_out = "set maxmemory, and maxmemory-policy allkeys-lru" if survey.when_full in _REDIS_POLICIES else ""
        yield Finding("note", f"{survey.server} holds {gib(used)} and has no limit", way_out)
        return
    what = f"{survey.server} holds {gib(used)} of {gib(capacity)}{policy}"
    keeps = survey.when_full.startswith(_KEEPS)
    way_out = "set maxmemory-policy allkeys-lru" if keeps else ""
    if used < NEARLY_FULL * capacity:
        yield Finding("note" if keeps else "ok", what, way_out)
    elif keeps:
        yield Finding("problem", f"{what}: it is full, and refuses what is new", way_out)
    else:
        yield Finding("note", f"{what}: it is full, and the oldest chunks make way", "give it more memory")


_REDIS_POLICIES = ("noeviction", *(f"{kind}-{what}" for kind in ("allkeys", "volatile") for what in ("lru", "lfu")))


def _chunks(survey: Survey, namespace: str) -> Iterator[Finding]:
    if survey.objects is None:
        yield Finding("note", f"{survey.server} does not say whose chunks it holds")
        return
    total = sum(survey.objects.values())
    among = "" if survey.is_whole else f" among the first {total} that were looked at"
    own = survey.objects.get(namespace, 0)
    others = {name: count for name, count in survey.objects.items() if name != namespace}
    if not total:
        way_out = "nobody has stored into it, or it was emptied: see lmcache_ext:dropped_chunks and freeze"
        yield Finding("note", f"{survey.server} holds no chunk at all", way_out)
    elif not namespace:
        way_out = (
            "start the server with --enable_lmcache_endpoints, or give --namespace as its log's first lines have it"
        )
        yield Finding(
            "note", f"{survey.server} holds chunks of {_named(others)}{among}; which is ours is not known", way_out
        )
    elif own:
        besides = f", and of {_named(others)}" if others else ""
        yield Finding("ok", f"{survey.server} holds {own} chunks of this namespace{among}{besides}")
    else:
        what = f"{survey.server} holds no chunk of this namespace ({namespace}){among}, only of {_named(others)}"
        yield Finding(
            "problem", what, "they are another model's, or a server's that differs: compare it with --peer URL"
        )


def _named(objects: Mapping[str, int]) -> str:
    """`00ff... (12 chunks)`, the most numerous first."""
    ranked: Sequence[tuple[str, int]] = sorted(objects.items(), key=lambda item: -item[1])
    named = [f"{name or 'another program'} ({count} chunks)" for name, count in ranked[:SHOWN_NAMESPACES]]
    more = [f"{len(ranked) - SHOWN_NAMESPACES} more"] if len(ranked) > SHOWN_NAMESPACES else []
    return ", ".join([*named, *more])
