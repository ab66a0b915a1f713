"""The contract of a place where bytes can rest.

A store keeps opaque objects (frame + payload, see `lmcache_ext.frame`) under opaque keys. It knows
nothing of vLLM, torch, tensors or serdes.

Threads:  every method may be called from several threads at once.
Order:    `put` of a key is visible to a `get_into` that starts after it returned; nothing else is promised.
Owner:    buffers belong to the caller; a store touches them only while the call is running.
Failure:  a miss is a value (`False`, `None`); a failure is a `StoreError` and nothing else. Of a batch
          each object has an outcome of its own, a failure among them being a value too, because a
          part of a batch is worth something. A store never retries; `stores.guard` judges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lmcache_ext.errors import StoreError, StoreTimeout

T = TypeVar("T")

NAMESPACE_BYTES = 16
"""Every key begins with the namespace (`lmcache_ext.namespace`), so a store can group by it."""

MAX_KEY_BYTES = 128


@dataclass(frozen=True, slots=True)
class Usage:
    """What a store holds now; `None` where the backend does not say."""

    used_bytes: int | None
    capacity_bytes: int | None
    num_objects: int | None


UNKNOWN = Usage(None, None, None)


@dataclass(frozen=True, slots=True)
class Survey:
    """What one server of a store says of itself, for people who wonder why they have no hits. Holds no password."""

    server: str
    failure: str = ""
    """Why it could not be asked; the rest is unknown then."""
    ping_s: float | None = None
    usage: Usage = UNKNOWN
    when_full: str = ""
    """What it does then, in its own word, such as ``allkeys-lru``; empty where it does not say."""
    objects: Mapping[str, int] | None = None
    """How many objects it has of each namespace (hex); None where it does not say."""
    is_whole: bool = True
    """Whether `objects` counts all of them; else the first it came upon, in no order."""


class Store(ABC):
    """A place where objects rest. Keys: NAMESPACE_BYTES < len(key) <= MAX_KEY_BYTES."""

    name: str
    """Short label for logs and metrics, e.g. ``disk``."""

    def register(self, memory: memoryview) -> None:  # noqa: B027 - most stores have nothing to do
        """Learn of memory that most parts of objects will lie in; before any other call, and mapped until `close`.

        A store whose transfers need to know (RDMA) tells its client. Reads and writes nothing, raises no StoreError.
        """

    @abstractmethod
    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """For each key, whether an object was there a moment ago. One round trip. Advice only."""

    @abstractmethod
    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        """Scatter the object into `parts`, in order; never past their end.

        Returns the object's whole length in bytes (it may differ from the sum of `parts`, and is
        the caller's to judge), or None on a miss.
        """

    @abstractmethod
    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        """Store the concatenation of `parts`. All of it becomes visible at once, or nothing does.

        Overwrites. Raises StoreFull where no room could be made.
        """

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        """`get_into` of distinct keys: for each what it would return, or the StoreError it would raise.

        Never raises one. A backend that can, sends the requests ahead and receives the objects in turn. The deadline is
        that of one call, for all together; the objects it cuts off are StoreTimeout, those before them stand.
        """
        return _one_by_one(self.get_into, keys, parts_per_key)

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> list[StoreError | None]:
        """`put` of distinct keys: for each None, or the StoreError it would raise. Never raises one.

        Each object becomes visible by itself, in any order. Where the connection is lost, an object whose outcome is an
        error may be there nevertheless, whole. Deadline as in `get_many_into`.
        """
        return _one_by_one(self.put, keys, parts_per_key)

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove the objects; those that are not there are not an error."""

    @abstractmethod
    def ping(self) -> float:
        """One cheap round trip that touches the medium; its duration in seconds."""

    @abstractmethod
    def usage(self) -> Usage:
        """What is held now. May be an estimate."""

    def failures(self) -> Mapping[str, int]:
        """Calls so far, by `<side>.<cause>`, that failed inside and were made up for there: nobody else counts them."""
        return {}

    def survey(self) -> list[Survey]:
        """What each server behind this store says of itself; may take seconds. Raises no StoreError."""

        def ask() -> Survey:
            self.ping()  # connects
            return Survey(self.name, ping_s=self.ping(), usage=self.usage())

        return [surveyed(self.name, ask)]

    @abstractmethod
    def close(self) -> None:
        """Release everything. May be called twice. No other call may follow."""


def surveyed(server: str, ask: Callable[[], Survey]) -> Survey:
    """What `ask` answers, or why it does not."""
    try:
        return ask()
    except StoreError as error:
        return Survey(server, failure=str(error))


def _one_by_one(
    call: Callable[[bytes, Sequence[memoryview]], T],
    keys: Sequence[bytes],
    parts_per_key: Sequence[Sequence[memoryview]],
) -> list[T | StoreError]:
    """The outcomes of a call per key; after a StoreTimeout the time of the batch is spent."""
    outcomes: list[T | StoreError] = []
    for key, parts in zip(keys, parts_per_key, strict=True):
        if outcomes and isinstance(outcomes[-1], StoreTimeout):
            outcomes.append(outcomes[-1])
            continue
        try:
            outcomes.append(call(key, parts))
        except StoreError as error:
            outcomes.append(error)
    return outcomes
