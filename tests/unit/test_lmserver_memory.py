"""The memory of the cache server: its limit under any sequence of calls, and which object goes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.daemons.lm_args import memory_limit, size
from lmcache_ext.daemons.lm_memory import MAPPED_BYTES, Block, Memory
from lmcache_ext.daemons.lm_policy import ARC, LRU, POLICIES, S3FIFO, Policy
from lmcache_ext.wire import lm

CAPACITY = 4 * 1024**2
KIB = 1024


def put(memory: Memory, name: str, num_bytes: int) -> bool:
    block = memory.claim(num_bytes)
    if block is None:
        return False
    memory.commit(name, block, lm.binary(num_bytes))
    memory.let_go(block)
    return True


def is_hit(memory: Memory, name: str) -> bool:
    block = memory.get(name)
    if block is not None:
        memory.let_go(block)
    return block is not None


steps = st.lists(
    st.tuples(
        st.sampled_from(["claim", "commit", "drop", "get", "let go", "delete"]),
        st.integers(0, 20),
        st.sampled_from(
            [0, 1, 100, 5000, MAPPED_BYTES, 300 * KIB, 300 * KIB + 1, 1024 * KIB, 3 * 1024 * KIB, CAPACITY]
        ),
    ),
    max_size=80,
)


@settings(deadline=None)
@given(st.sampled_from(sorted(POLICIES)), steps)
def test_no_sequence_of_calls_exceeds_the_limit_or_loses_a_byte(policy: str, steps: list[tuple[str, int, int]]) -> None:
    memory = Memory(CAPACITY, POLICIES[policy](CAPACITY))
    claimed: list[Block] = []
    held: list[Block] = []
    for what, index, num_bytes in steps:
        if what == "claim":
            block = memory.claim(num_bytes)
            if block is not None:
                assert len(block.view) == num_bytes
                claimed.append(block)
        elif what == "commit" and claimed:
            block = claimed.pop()
            memory.commit(str(index), block, lm.NO_META)
            memory.let_go(block)
        elif what == "drop" and claimed:
            memory.let_go(claimed.pop(0))
        elif what == "get":
            found = memory.get(str(index))
            held += [found] if found is not None else []
        elif what == "let go" and held:
            memory.let_go(held.pop(0))
        elif what == "delete":
            memory.delete(str(index))
        assert memory.charged_bytes <= CAPACITY
        assert memory.stored_bytes == sum(memory._blocks[name].charged_bytes for name in memory.names())
        busy = {id(block): block for block in [*claimed, *held, *memory._blocks.values()]}
        assert memory.charged_bytes - memory._spare_bytes == sum(block.charged_bytes for block in busy.values())
        pinned = {id(block): block for block in held if block.is_stored}
        assert memory._pinned_bytes == sum(block.charged_bytes for block in pinned.values())
    for block in [*claimed, *held]:
        memory.let_go(block)
    for name in list(memory.names()):
        memory.delete(name)
    assert (memory.stored_bytes, memory._pinned_bytes, len(memory)) == (0, 0, 0)
    assert memory.charged_bytes == memory._spare_bytes
    assert memory.claim(CAPACITY - 4 * KIB) is not None


def test_what_cannot_fit_evicts_nothing() -> None:
    memory = Memory(CAPACITY, LRU(CAPACITY))
    assert put(memory, "a", 1024 * KIB)
    assert memory.claim(CAPACITY) is None
    held = memory.get("a")
    assert held is not None
    assert memory.claim(CAPACITY - 512 * KIB) is None
    assert "a" in memory
    memory.let_go(held)
    assert memory.claim(CAPACITY - 512 * KIB) is not None
    assert "a" not in memory


def test_an_object_that_is_being_sent_is_charged_until_it_has_gone() -> None:
    memory = Memory(CAPACITY, LRU(CAPACITY))
    assert put(memory, "a", 1024 * KIB)
    held = memory.get("a")
    assert held is not None
    held.view[:5] = b"whole"
    for index in range(20):
        assert put(memory, str(index), 1024 * KIB)
    assert bytes(held.view[:5]) == b"whole"
    assert memory.charged_bytes <= CAPACITY
    memory.let_go(held)


def test_blocks_of_one_size_are_used_again() -> None:
    memory = Memory(CAPACITY, LRU(CAPACITY))
    rooms = set()
    for index in range(50):
        block = memory.claim(1024 * KIB)
        assert block is not None
        rooms.add(id(block.room.obj))
        memory.commit(str(index), block, lm.NO_META)
        memory.let_go(block)
    assert len(rooms) <= 4


@pytest.mark.parametrize("policy", [S3FIFO, ARC])
def test_a_burst_of_one_off_objects_washes_nothing_out_that_is_used(policy: type[Policy]) -> None:
    memory = Memory(CAPACITY, policy(CAPACITY))  # type: ignore[call-arg]
    for _ in range(3):
        for name in ("hot1", "hot2"):
            if not is_hit(memory, name):
                put(memory, name, 600 * KIB)
    for index in range(100):
        put(memory, f"once{index}", 600 * KIB)
    assert is_hit(memory, "hot1")
    assert is_hit(memory, "hot2")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_policy_gives_every_name_once_and_forgets_the_removed(policy: str) -> None:
    chosen = POLICIES[policy](1000)
    for index in range(20):
        chosen.added(str(index), 10)
    for index in (3, 5, 3):
        chosen.used(str(index))
    chosen.used("unknown")
    chosen.removed("7")
    chosen.removed("unknown")
    chosen.added("4", 20)
    victims = []
    while (victim := chosen.victim()) is not None:
        victims.append(victim)
    assert sorted(victims) == sorted({str(index) for index in range(20)} - {"7"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("1000", 1000),
        ("2k", 2000),
        ("1.5Ki", 1536),
        ("512Mi", 2**29),
        ("20GiB", 20 * 2**30),
        ("1 tb", 10**12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "1x", "Gi", "1e9", "1i"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        size(text)


def test_the_limit_of_the_container_counts(tmp_path: Path) -> None:
    unlimited, limited = tmp_path / "max", tmp_path / "limit"
    unlimited.write_text("max\n")
    limited.write_text("104857600\n")
    assert memory_limit([str(unlimited), str(limited), str(tmp_path / "none")]) == 100 * 1024**2
    assert memory_limit([str(unlimited)]) > 100 * 1024**2
