"""Why a request found what it found: said with its answer, to a request that asked.

A request asks by ``kv_transfer_params: {"lmcache_ext.explain": true}``, and is told in the same field of its
answer. Only where the server has been started so (`ENABLED`): what others have stored is nobody's business.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_offload.base import OffloadKey, make_offload_key

from lmcache_ext.config_quotas import tenant_of_salt
from lmcache_ext.offload.lookups import ADAPTER_PARAM
from lmcache_ext.offload.manager import BoundedTieringManager
from lmcache_ext.offload.recent import Recent

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
    from vllm.v1.request import Request

    from lmcache_ext.config import Live

ENABLED = "lmcache_ext.explain_enabled"
"""Connector setting: true where requests may ask; the same text as in `plugin`."""
ASK = "lmcache_ext.explain"
ANSWER = "lmcache_ext.explanation"

_SHOWN_CHARS = 16_384  # of a component: a model's whole config.json, so that two can be compared key by key

# reason -> what it means and what to do; {names} are facts of the explanation
TEXTS = {
    "off": "the cache has turned itself off after failures in its own code; see the log, and restart",
    "bypass": "bypass is true: nothing is looked up or stored; set it to false",
    "short": "the prompt has {prompt_tokens} tokens, and the last one is always computed: no whole chunk of "
    "{chunk_tokens} is left to reuse; lower chunk_size, or put what prompts share at their beginning",
    "all": "every whole chunk was found: {gpu_tokens} tokens in vLLM's own prefix cache, {cache_tokens} in this one",
    "too few": "{cache_tokens} tokens were found, and min_retrieve_tokens is {min_retrieve_tokens}: they are computed",
    "tier off": "tokens from {first_missing_token} on were not found, while the circuit breaker of {names} is open: "
    "it answers nothing until its store is back",
    "slow": "tokens from {first_missing_token} on were not found: {names} did not answer within lookup_timeout_ms",
    "over quota": "tokens from {first_missing_token} on were not found: the quota of {tenant} in host memory holds "
    "{quota_chunks} chunks of {chunk_tokens} tokens, and its own newer ones made it full; see extra_config.quotas",
    "evicted": "tokens from {first_missing_token} on were stored by this server before and are gone: evicted, expired, "
    "or not written to a far tier; see its capacity and lmcache_ext:dropped_chunks",
    "frozen": "tokens from {first_missing_token} on were not found, and freeze is true: what is new is not stored",
    "differs": "tokens up to {first_missing_token} are known; in the {chunk_tokens} that follow this prompt differs "
    "from every one that was stored, or nobody has stored so long a prompt",
    "apart": "not even the first chunk is known {marks}, and its tokens came before with another or with "
    "none: cache_salt and LoRA adapter are part of every key; send the same",
    "new": "not even the first chunk is known: the prompt differs from every stored one within its first "
    "{chunk_tokens} tokens, or it was stored by a server of another namespace, salt or adapter",
}


class Explainer:
    """Explanations of the requests that asked, from their lookup until their end. In the scheduler's thread."""

    def __init__(
        self, scheduler: OffloadingConnectorScheduler, namespace: str | None, components: Mapping[str, str]
    ) -> None:
        assert isinstance(scheduler.manager, BoundedTieringManager)
        self._scheduler = scheduler
        self._manager = scheduler.manager
        self._manager.stored = Recent()
        self._manager.host.tenants.lost = Recent()
        self._server = {
            "namespace": namespace,
            "components": {name: _shortened(text) for name, text in components.items()},
        }
        self._told: dict[str, dict[str, Any]] = {}
        self._marked = Recent()
        """First chunks that came with a salt or an adapter, by the keys they would have without."""

    def note(self, request: Request, gpu_tokens: int, cache_tokens: int, live: Live, *, off: bool = False) -> None:
        """Remember why the lookup of a request ended so, if it asked. Token counts before min_retrieve_tokens."""
        if not (request.kv_transfer_params or {}).get(ASK):
            if _marks(request) and (bare := self._bare_key(request)) is not None:
                self._marked.add([bare])
            return
        chunk_tokens = self._scheduler.config.kv_group_configs[0].tokens_per_chunk
        facts: dict[str, Any] = {
            **self._server,
            "chunk_tokens": chunk_tokens,
            "prompt_tokens": request.num_tokens,
            "gpu_tokens": gpu_tokens,
            "cache_tokens": cache_tokens,
            "salted": bool(request.cache_salt),
            "adapter": (request.kv_transfer_params or {}).get(ADAPTER_PARAM),
            "min_retrieve_tokens": live.min_retrieve_tokens,
        }
        reason, names = self._reason(request, facts, live, off)
        text = TEXTS[reason].format(names=" and ".join(names), marks=_under(request), **facts)
        self._told[request.request_id] = {**facts, "reason": reason, "text": text}

    def take(self, req_id: str) -> dict[str, Any] | None:
        """The explanation for a request that has ended; None where it did not ask."""
        explanation = self._told.pop(req_id, None)
        return None if explanation is None else {ANSWER: explanation}

    def _reason(self, request: Request, facts: dict[str, Any], live: Live, off: bool) -> tuple[str, list[str]]:
        """The reason, and the tiers it is about; adds `first_missing_token` and `tiers` to the facts."""
        chunk_tokens = facts["chunk_tokens"]
        if off or live.bypass:
            return ("off" if off else "bypass"), []
        if request.num_tokens - 1 < chunk_tokens:
            return "short", []
        if 0 < facts["cache_tokens"] < live.min_retrieve_tokens:
            return "too few", []
        first = (facts["gpu_tokens"] + facts["cache_tokens"]) // chunk_tokens
        if first >= (request.num_tokens - 1) // chunk_tokens:
            return "all", []
        facts["first_missing_token"] = first * chunk_tokens
        key = self._key(request, first)
        verdicts = {} if key is None else self._verdicts(key)
        facts["tiers"] = verdicts
        for reason, verdict in (("tier off", "off"), ("slow", "slow")):
            names = [name for name, said in verdicts.items() if said == verdict]
            if names:
                return reason, names
        if key is not None and self._is_over_quota(request, key, facts):
            return "over quota", []
        if key is not None and self._manager.stored is not None and key in self._manager.stored:
            return "evicted", []
        if live.freeze:
            return "frozen", []
        return ("differs" if first else "apart" if self._is_known_apart(request) else "new"), []

    def _is_over_quota(self, request: Request, key: OffloadKey, facts: dict[str, Any]) -> bool:
        """Whether a quota has cost the request's tenant this chunk; adds whose it is, and how much, to the facts."""
        tenants, tenant = self._manager.host.tenants, tenant_of_salt(request.cache_salt)
        quota = tenants.quota(tenant)
        if quota is None or tenants.lost is None or key not in tenants.lost:
            return False
        facts |= {"tenant": quota.name, "quota_bytes": quota.host_bytes, "quota_chunks": tenants.limit(tenant)}
        return True

    def _is_known_apart(self, request: Request) -> bool:
        """Whether the first chunk's tokens came before, kept apart from this request by nothing but its key."""
        bare = self._bare_key(request)
        if bare is None or self._manager.stored is None:
            return False
        return bare in self._marked or (bool(_marks(request)) and bare in self._manager.stored)

    def _bare_key(self, request: Request) -> OffloadKey | None:
        """The key of the first chunk as it would be without salt and adapter; None where it has no whole chunk.

        Hashes the prompt once more: only where the server explains, and only for requests that ask or have such a mark.
        """
        group = self._scheduler.config.kv_group_configs[0]
        if request._block_hasher is None or request.num_tokens < group.tokens_per_chunk:
            return None
        bare = copy.copy(request)
        bare.cache_salt, bare.lora_request, bare.block_hashes = None, None, []
        hashes = request._block_hasher(bare)
        return make_offload_key(hashes[group.hashes_per_chunk - 1], group.group_idx)

    def _key(self, request: Request, chunk: int) -> OffloadKey | None:
        status = self._scheduler._req_status.get(request.request_id)
        keys = status.group_states[0].offload_keys if status is not None else []
        return keys[chunk] if chunk < len(keys) else None

    def _verdicts(self, key: OffloadKey) -> dict[str, str]:
        """What each tier said of a chunk: has, miss, slow, off, not asked."""
        policy = self._manager.host._policy
        verdicts = {"host": "miss" if policy.get(key) is None else "has"}
        verdicts |= {tier.tier_type: tier.verdict(key) for tier in self._manager.far_tiers}
        return verdicts


def _marks(request: Request) -> str:
    """What keeps a request's chunks apart from those of others with the same tokens; empty where nothing does."""
    return " and ".join(
        name for name, value in (("cache_salt", request.cache_salt), ("adapter", request.lora_request)) if value
    )


def _under(request: Request) -> str:
    marks = _marks(request)
    return f"under this {marks}" if marks else "without a cache_salt or adapter"


def _shortened(text: str) -> str:
    """A component as it can be shown and compared."""
    if len(text) <= _SHOWN_CHARS:
        return text
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]} ({len(text)} characters)"
