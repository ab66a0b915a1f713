"""Waiting for a tier's lookup thread."""

from __future__ import annotations

from lmcache_ext.offload.tier import StoredTier

WAIT_S = 10.0


def await_answers(tier: StoredTier) -> None:
    """Return once what the tier asked its store in the last step can be taken; at once where it asked nothing."""
    lookups = tier._backing.lookups
    if lookups.num_unanswered:
        lookups._arrived.put(lookups._arrived.get(timeout=WAIT_S))
    assert tier._pool.drain(WAIT_S)  # what it reads ahead
