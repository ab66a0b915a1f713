"""Which object goes when room is needed. Pure: names and sizes in, a name out.

LRU       the one not asked for longest.
S3-FIFO   new ones wait in a small queue; only those asked for again there reach the main one, so that a
          burst of one-off prompts washes nothing out.
ARC       recent and frequent objects share the room; hits among the names of evicted ones move the border.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable


class Policy(ABC):
    """The order in which objects go.

    Threads:  one.
    Order:    `added` of a name comes before its `used` and `removed`; what `victim` returns is removed by it.
    Owner:    remembers names and sizes, at most as many evicted names as there are objects (and GHOSTS).
    Failure:  raises nothing: unknown names are passed over.
    """

    name: str

    @abstractmethod
    def added(self, name: str, num_bytes: int) -> None:
        """A new object, or a new size of an old one."""

    @abstractmethod
    def used(self, name: str) -> None:
        """The object was asked for."""

    @abstractmethod
    def removed(self, name: str) -> None:
        """The object is gone, and not because of its age."""

    @abstractmethod
    def victim(self) -> str | None:
        """The one to go now; None where there is none left."""


class _Queue:
    """Names in order with their sizes, and the sum of these."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[str, int] = OrderedDict()
        self.num_bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def push(self, name: str, num_bytes: int) -> None:
        self.pop(name)
        self.sizes[name] = num_bytes
        self.num_bytes += num_bytes

    def pop(self, name: str) -> int | None:
        num_bytes = self.sizes.pop(name, None)
        self.num_bytes -= num_bytes or 0
        return num_bytes

    def pop_oldest(self) -> tuple[str, int]:
        name, num_bytes = self.sizes.popitem(last=False)
        self.num_bytes -= num_bytes
        return name, num_bytes

    def trim(self, max_bytes: int, max_names: int) -> None:
        while self.sizes and (self.num_bytes > max_bytes or len(self.sizes) > max_names):
            self.pop_oldest()


class LRU(Policy):
    """The least recently used goes first."""

    name = "lru"

    def __init__(self, capacity_bytes: int) -> None:
        self._queue = _Queue()

    def added(self, name: str, num_bytes: int) -> None:
        self._queue.push(name, num_bytes)

    def used(self, name: str) -> None:
        if name in self._queue:
            self._queue.sizes.move_to_end(name)

    def removed(self, name: str) -> None:
        self._queue.pop(name)

    def victim(self) -> str | None:
        return self._queue.pop_oldest()[0] if self._queue else None


GHOSTS = 100_000
"""Names of evicted objects that are remembered at most: some 20 MB."""


class S3FIFO(Policy):
    """Yang et al., SOSP 2023: a small queue of a tenth of the room, a main one, and names of the evicted."""

    name = "s3-fifo"

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._small, self._main, self._ghost = _Queue(), _Queue(), _Queue()
        self._uses: dict[str, int] = {}

    def added(self, name: str, num_bytes: int) -> None:
        known = name in self._main or self._ghost.pop(name) is not None
        uses = self._uses.get(name, 0)
        self.removed(name)
        (self._main if known else self._small).push(name, num_bytes)
        self._uses[name] = uses

    def used(self, name: str) -> None:
        if name in self._uses:
            self._uses[name] = min(self._uses[name] + 1, 3)

    def removed(self, name: str) -> None:
        self._small.pop(name)
        self._main.pop(name)
        self._uses.pop(name, None)

    def victim(self) -> str | None:
        while self._small or self._main:
            from_small = self._small and (self._small.num_bytes > self._capacity // 10 or not self._main)
            name = self._out_of_small() if from_small else self._out_of_main()
            if name is not None:
                del self._uses[name]
                return name
        return None

    def _out_of_small(self) -> str | None:
        name, num_bytes = self._small.pop_oldest()
        if self._uses[name]:
            self._uses[name] = 0
            self._main.push(name, num_bytes)
            return None
        self._ghost.push(name, num_bytes)
        self._ghost.trim(self._capacity, GHOSTS)
        return name

    def _out_of_main(self) -> str | None:
        name, num_bytes = self._main.pop_oldest()
        if self._uses[name]:
            self._uses[name] -= 1
            self._main.push(name, num_bytes)
            return None
        return name


class ARC(Policy):
    """Megiddo and Modha, FAST 2003, weighed in bytes: `_recent_bytes` is the border between the two."""

    name = "arc"

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._recent_bytes = 0
        self._recent, self._frequent = _Queue(), _Queue()
        self._recent_ghost, self._frequent_ghost = _Queue(), _Queue()

    def added(self, name: str, num_bytes: int) -> None:
        known = name in self._recent or name in self._frequent
        if self._recent_ghost.pop(name) is not None:
            self._recent_bytes = min(self._recent_bytes + num_bytes, self._capacity)
            known = True
        elif self._frequent_ghost.pop(name) is not None:
            self._recent_bytes = max(self._recent_bytes - num_bytes, 0)
            known = True
        self.removed(name)
        (self._frequent if known else self._recent).push(name, num_bytes)

    def used(self, name: str) -> None:
        num_bytes = self._recent.pop(name)
        if num_bytes is not None:
            self._frequent.push(name, num_bytes)
        elif name in self._frequent:
            self._frequent.sizes.move_to_end(name)

    def removed(self, name: str) -> None:
        self._recent.pop(name)
        self._frequent.pop(name)

    def victim(self) -> str | None:
        from_recent = self._recent and (self._recent.num_bytes > self._recent_bytes or not self._frequent)
        queue, ghost = (self._recent, self._recent_ghost) if from_recent else (self._frequent, self._frequent_ghost)
        if not queue:
            return None
        name, num_bytes = queue.pop_oldest()
        ghost.push(name, num_bytes)
        ghost.trim(self._capacity, GHOSTS)
        return name


POLICIES: dict[str, Callable[[int], Policy]] = {policy.name: policy for policy in (LRU, S3FIFO, ARC)}
