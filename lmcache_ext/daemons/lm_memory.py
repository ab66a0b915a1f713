"""Objects in memory, under one limit that holds at every moment.

    charged = objects + objects being received + objects evicted while they are sent + spare blocks <= capacity

A block is claimed whole before its first byte is received, so that overload refuses objects instead of
growing. Objects of a KV cache nearly all have one size: the block of an evicted object is handed to the
next one as it is, which saves the page faults of fresh memory.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from lmcache_ext.daemons.lm_policy import Policy
from lmcache_ext.wire import lm

OVERHEAD_BYTES = 1024
"""Charged for each object: name, bookkeeping, allocator."""

MAPPED_BYTES = 256 * 1024
"""From here on a block is a mapping of its own: it goes back to the system when it is dropped, whole."""

REUSED_BYTES = 16 * 1024
"""From here on a block that is let go is kept for the next object of its size: fresh memory costs page faults."""

HUGE_BYTES = 4 * 1024**2

MIN_HELD_BYTES = 64


class Block:
    """Room for one object; `charged_bytes` of the limit are its own until it is let go."""

    __slots__ = ("charged_bytes", "is_stored", "meta", "num_bytes", "num_holders", "room", "view")

    def __init__(self, num_bytes: int, charged_bytes: int, room: memoryview) -> None:
        self.num_bytes = num_bytes
        self.charged_bytes = charged_bytes
        self.room = room
        self.view = room[:num_bytes]
        self.num_holders = 1
        self.is_stored = False
        self.meta = lm.NO_META


@dataclass(slots=True)
class Counters:
    """Since the start."""

    num_evicted: int = 0
    evicted_bytes: int = 0
    num_refused: int = 0


class Memory:
    """Blocks by name.

    Threads:  one; others may read and write the views of blocks that somebody holds.
    Order:    a block is visible from `commit` on.
    Owner:    whoever claims or gets a block holds it, and lets it go once; a committed block is held by us too.
    Failure:  `claim` answers None where no room can be made; nothing is raised.
    """

    def __init__(self, capacity_bytes: int, policy: Policy) -> None:
        self.capacity_bytes = capacity_bytes
        self.counters = Counters()
        self.charged_bytes = 0
        self.stored_bytes = 0
        self._policy = policy
        self._blocks: dict[str, Block] = {}
        self._spares: OrderedDict[int, list[Block]] = OrderedDict()
        """By size, that of the last use last."""
        self._spare_bytes = 0
        self._pinned_bytes = 0  # of stored blocks that somebody else holds too: evicting them frees nothing yet

    def __contains__(self, name: str) -> bool:
        return name in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def policy_name(self) -> str:
        return self._policy.name

    def names(self) -> Iterator[str]:
        return iter(self._blocks)

    def claim(self, num_bytes: int) -> Block | None:
        """Room for an object, held by the caller; evicts as needed, but nothing where that would not suffice."""
        charge = _charge(num_bytes)
        busy_bytes = self.charged_bytes - self._spare_bytes - (self.stored_bytes - self._pinned_bytes)
        if busy_bytes + charge > self.capacity_bytes:
            self.counters.num_refused += 1
            return None
        while True:
            if charge in self._spares:
                return self._again(charge, num_bytes)
            if self.charged_bytes + charge <= self.capacity_bytes:
                return self._fresh(num_bytes, charge)
            if not self._drop_spare() and not self._evict():
                self.counters.num_refused += 1
                return None

    def commit(self, name: str, block: Block, meta: lm.Meta) -> None:
        """Make a filled block the object of that name; the caller holds it still."""
        self.delete(name)
        block.meta = meta
        block.is_stored = True
        self._blocks[name] = block
        self.stored_bytes += block.charged_bytes
        self._hold(block)
        self._policy.added(name, block.charged_bytes)

    def get(self, name: str) -> Block | None:
        """The object, held by the caller."""
        block = self._blocks.get(name)
        if block is not None:
            self._hold(block)
            self._policy.used(name)
        return block

    def delete(self, name: str) -> bool:
        """Whether it was there."""
        block = self._blocks.pop(name, None)
        if block is None:
            return False
        self._policy.removed(name)
        self._forget(block)
        return True

    def let_go(self, block: Block) -> None:
        """The caller holds it no longer."""
        block.num_holders -= 1
        if block.num_holders:
            if block.is_stored and block.num_holders == 1:
                self._pinned_bytes -= block.charged_bytes
            return
        if block.charged_bytes < REUSED_BYTES:
            self.charged_bytes -= block.charged_bytes
            return
        self._spares.setdefault(block.charged_bytes, []).append(block)
        self._spares.move_to_end(block.charged_bytes)
        self._spare_bytes += block.charged_bytes
        while self._spare_bytes > max(self.capacity_bytes // 8, block.charged_bytes) and self._drop_spare():
            pass

    def _again(self, charge: int, num_bytes: int) -> Block:
        """A spare block of that size, which is there."""
        blocks = self._spares[charge]
        block = blocks.pop()
        self._spares.move_to_end(charge)
        if not blocks:
            del self._spares[charge]
        self._spare_bytes -= charge
        return Block(num_bytes, charge, block.room)

    def _fresh(self, num_bytes: int, charge: int) -> Block | None:
        try:
            room = _allocate(charge - OVERHEAD_BYTES)
        except (MemoryError, OSError):  # the system has less than our limit, or no more mappings
            self.counters.num_refused += 1
            return None
        self.charged_bytes += charge
        return Block(num_bytes, charge, room)

    def _hold(self, block: Block) -> None:
        block.num_holders += 1
        if block.is_stored and block.num_holders == 2:
            self._pinned_bytes += block.charged_bytes

    def _evict(self) -> bool:
        name = self._policy.victim()
        if name is None:
            return False
        block = self._blocks.pop(name)
        self.counters.num_evicted += 1
        self.counters.evicted_bytes += block.num_bytes
        self._forget(block)
        return True

    def _forget(self, block: Block) -> None:
        self.stored_bytes -= block.charged_bytes
        if block.num_holders > 1:
            self._pinned_bytes -= block.charged_bytes
        block.is_stored = False
        self.let_go(block)

    def _drop_spare(self) -> bool:
        """Give a spare block back to the system, of the size that was not used for the longest."""
        if not self._spares:
            return False
        charge, blocks = next(iter(self._spares.items()))
        blocks.pop()
        if not blocks:
            del self._spares[charge]
        self._spare_bytes -= charge
        self.charged_bytes -= charge
        return True


def _charge(num_bytes: int) -> int:
    """What a block of that many bytes is charged: whole pages where it is a mapping."""
    if num_bytes >= MAPPED_BYTES:
        return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE + OVERHEAD_BYTES
    return max(num_bytes, MIN_HELD_BYTES) + OVERHEAD_BYTES


def _allocate(num_bytes: int) -> memoryview:
    if num_bytes < MAPPED_BYTES:
        return memoryview(bytearray(num_bytes))
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)
