"""`blackhole://`: takes everything and has nothing. What the cache costs without a backend's share of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_ext.stores.base import Store, Usage


class BlackholeStore(Store):
    """Every read is a miss, every write is swallowed.

    Threads:  any number; there is no state.
    Order:    nothing put is ever seen.
    Owner:    never touches a buffer.
    Failure:  never fails.
    """

    name = "blackhole"

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return [False] * len(keys)

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        return None

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        pass

    def delete(self, keys: Sequence[bytes]) -> None:
        pass

    def ping(self) -> float:
        return 0.0

    def usage(self) -> Usage:
        return Usage(0, None, 0)

    def close(self) -> None:
        pass


def open_blackhole(url: str, options: Mapping[str, Any]) -> BlackholeStore:
    """The entry point of `blackhole://`; whatever follows the scheme is ignored, as LMCache does."""
    return BlackholeStore()
