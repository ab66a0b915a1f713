"""The contract of a place where bytes can rest.

A store keeps opaque objects (frame + payload, see `lmcache_ext.frame`) under opaque keys. It knows
nothing of vLLM, torch, tensors or serdes.

Threads:  every method may be called from several threads at once.
Order:    `put` of a key is visible to a `get_into` that starts after it returned; nothing else is promised.
Owner:    buffers belong to the caller; a store touches them only while the call is running.
Failure:  a miss is a value (`False`, `None`); a failure is a `StoreError` and nothing else.
          A store never retries; `stores.guard` judges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

NAMESPACE_BYTES = 16
"""Every key begins with the namespace (`lmcache_ext.namespace`), so a store can group by it."""

MAX_KEY_BYTES = 128


@dataclass(frozen=True, slots=True)
class Usage:
    """What a store holds now; `None` where the backend does not say."""

    used_bytes: int | None
    capacity_bytes: int | None
    num_objects: int | None


class Store(ABC):
    """A place where objects rest. Keys: NAMESPACE_BYTES < len(key) <= MAX_KEY_BYTES."""

    name: str
    """Short label for logs and metrics, e.g. ``disk``."""

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

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove the objects; those that are not there are not an error."""

    @abstractmethod
    def ping(self) -> float:
        """One cheap round trip that touches the medium; its duration in seconds."""

    @abstractmethod
    def usage(self) -> Usage:
        """What is held now. May be an estimate."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. May be called twice. No other call may follow."""
