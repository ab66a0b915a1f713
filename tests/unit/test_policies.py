"""Which row goes first under each policy; what is pinned or protected never goes."""

from __future__ import annotations

import pytest
from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory

from lmcache_ext.offload.settings import _POLICIES

REQ = ReqContext("r")
OURS = ["LRU", "FIFO", "LFU", "MRU"]


def key(name):
    return OffloadKey(name.encode())


def names(evicted):
    return None if evicted is None else "".join(key.decode() for key, _ in evicted)


def policy_of(name, chunks="abcd"):
    """A policy with these chunks, inserted in order and all evictable."""
    policy = CachePolicyFactory.get_cache_policy_cls(*_POLICIES[name])(16)
    for i, chunk in enumerate(chunks):
        add(policy, chunk, i)
    return policy


def add(policy, name, chunk_id=0):
    status = ChunkStatus(chunk_id)
    policy.insert(key(name), status)
    status.ref_cnt = 0
    policy.mark_evictable(key(name))


def use(policy, *chunks):
    for chunk in chunks:
        policy.touch([key(chunk)], REQ)


ORDERS = {
    "LRU": ("cdab", ["a", "b"]),
    "FIFO": ("abcd", ["a", "b"]),
    "MRU": ("badc", ["a", "b"]),
    "LFU": ("dcba", ["a", "a", "a", "b", "b", "c"]),
}


@pytest.mark.parametrize("name", OURS)
def test_order_of_eviction_follows_the_uses(name):
    expected, uses = ORDERS[name]
    policy = policy_of(name)
    use(policy, *uses)
    assert names(policy.evict(4, set())) == expected


@pytest.mark.parametrize(("name", "expected"), [("LRU", "abcd"), ("FIFO", "abcd"), ("LFU", "abcd"), ("MRU", "dcba")])
def test_order_of_eviction_without_uses_follows_the_insertions(name, expected):
    assert names(policy_of(name).evict(4, set())) == expected


@pytest.mark.parametrize("name", OURS)
class TestEveryPolicy:
    def test_never_evicts_what_is_pinned(self, name):
        policy = policy_of(name)
        policy.get(key("b")).ref_cnt = 1
        policy.mark_non_evictable(key("b"))
        use(policy, "a", "b", "c")
        assert policy.evict(4, set()) is None
        assert sorted(names(policy.evict(3, set()))) == ["a", "c", "d"]
        assert policy.get(key("b")) is not None

    def test_evicts_it_again_once_it_is_let_go(self, name):
        policy = policy_of(name, "ab")
        policy.get(key("a")).ref_cnt = 1
        policy.mark_non_evictable(key("a"))
        policy.get(key("a")).ref_cnt = 0
        policy.mark_evictable(key("a"))
        assert sorted(names(policy.evict(2, set()))) == ["a", "b"]

    def test_respects_the_protected(self, name):
        policy = policy_of(name)
        assert sorted(names(policy.evict(2, {key("a"), key("d")}))) == ["b", "c"]
        assert policy.evict(1, {key("a"), key("d")}) is None
        assert policy.get(key("a")) is not None

    def test_an_eviction_that_cannot_be_changes_nothing(self, name):
        policy = policy_of(name)
        assert policy.evict(5, set()) is None
        assert sorted(names(policy.evict(4, set()))) == ["a", "b", "c", "d"]

    def test_forgets_what_was_removed_or_cleared(self, name):
        policy = policy_of(name)
        use(policy, "a", "a", "a")
        policy.remove(key("a"))
        add(policy, "a")  # a new chunk under an old name has no history
        policy.clear()
        add(policy, "e")
        assert names(policy.evict(1, set())) == "e"
        assert policy.evict(1, set()) is None

    def test_holds_many_touches_without_growing(self, name):
        policy = policy_of(name)
        for _ in range(1000):
            use(policy, "a", "b", "c", "d")
        assert len(policy._heap) < 200
        assert sorted(names(policy.evict(4, set()))) == ["a", "b", "c", "d"]


def test_lfu_counts_an_evicted_and_returned_chunk_from_one():
    policy = policy_of("LFU", "ab")
    use(policy, "a", "a", "a")
    use(policy, "b", "b", "b", "b")
    assert names(policy.evict(1, set())) == "a"
    add(policy, "a")
    use(policy, "a")
    assert names(policy.evict(1, set())) == "a"


def test_lfu_breaks_ties_by_recency():
    policy = policy_of("LFU")
    use(policy, "a", "b", "c", "d")
    use(policy, "b")
    assert names(policy.evict(4, set())) == "acdb"


def test_fifo_does_not_hear_of_finished_requests():
    policy = policy_of("FIFO")
    policy.on_request_finished(((key("a"),),), set(), {key("a")}, REQ)
    assert names(policy.evict(4, set())) == "abcd"


def test_every_policy_of_the_configuration_resolves():
    for name, where in _POLICIES.items():
        assert CachePolicyFactory.get_cache_policy_cls(*where)(4) is not None, name
