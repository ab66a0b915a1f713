"""Several cache servers as one store: each key has one of them.

Rendezvous hashing over the addresses: a server added or removed moves only its own share of the keys. Each
server has a breaker of its own, so that a dead one costs its keys and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import xxhash

from lmcache_ext.errors import StoreError, StoreFull, StoreUnavailable
from lmcache_ext.stores.base import Store, Survey, Usage
from lmcache_ext.stores.guard import Guarded, only_failures

T = TypeVar("T")

_THREADS_PER_STORE = 10
"""As many as callers may be held up by one server that hangs: the pool of an engine has eight, and one looks up."""


class ShardedStore(Store):
    """The union of several stores.

    Threads:  any number; `exists` asks all servers at once, on threads of its own.
    Order:    as the server of the key.
    Owner:    of the stores and their breakers.
    Failure:  a dead server is a miss for its keys; a put to it is dropped, and counted in `num_dropped`. Only
              where all servers are out, `ping`, `put` and `delete` raise StoreUnavailable.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        deadline_s: float,
        lookup_deadline_s: float | None = None,
        name: str = "lm",
    ) -> None:
        self.name = name
        self.num_dropped = 0
        self._names = [str(getattr(store, "address", store.name)).encode() for store in stores]
        self._stores = [
            Guarded(store, deadline_s=deadline_s, lookup_deadline_s=lookup_deadline_s, max_probe_interval_s=10.0)
            for store in stores
        ]
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return self._of_each(keys, lambda store, share: store.exists([keys[index] for index in share]))

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        return self._store_of(key).get_into(key, parts)

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        store = self._store_of(key)
        try:
            store.put(key, parts)
        except StoreFull:
            raise
        except StoreError:
            self._drop(store)

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        """Of all servers at once."""
        objects = [parts for _, parts in zip(keys, parts_per_key, strict=True)]
        return self._of_each(
            keys,
            lambda store, share: store.get_many_into(
                [keys[index] for index in share], [objects[index] for index in share]
            ),
        )

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> list[StoreError | None]:
        """To all servers at once."""
        objects = [parts for _, parts in zip(keys, parts_per_key, strict=True)]

        def put_share(store: Guarded, share: Sequence[int]) -> list[StoreError | None]:
            errors = store.put_many([keys[index] for index in share], [objects[index] for index in share])
            return [error if isinstance(error, StoreFull | None) else self._dropped(store) for error in errors]

        return self._of_each(keys, put_share)

    def delete(self, keys: Sequence[bytes]) -> None:
        for store, share in self._shares(keys).items():
            try:
                store.delete([keys[index] for index in share])
            except StoreError:
                self._drop(store)

    def ping(self) -> float:
        """The slowest of those that answer; raises where none does."""
        started_at = time.monotonic()
        answers = self._at_once([partial(_answers, store) for store in self._stores])
        if not any(answers):
            raise StoreUnavailable(f"{self.name}: none of {len(self._stores)} servers answers")
        return time.monotonic() - started_at

    def usage(self) -> Usage:
        """The sum over those that answer."""
        usages = self._at_once([store.usage for store in self._stores])
        fields = [
            [getattr(usage, field) for usage in usages] for field in ("used_bytes", "capacity_bytes", "num_objects")
        ]
        known = [[number for number in numbers if number is not None] for numbers in fields]
        return Usage(*(sum(numbers) if numbers else None for numbers in known))

    def failures(self) -> Mapping[str, int]:
        """Of all servers together."""
        total: Counter[str] = Counter()
        for store in self._stores:
            total.update(only_failures(store.counters()))
        return total

    def survey(self) -> list[Survey]:
        """Of all servers at once."""
        return [survey for found in self._at_once([store.survey for store in self._stores]) for survey in found]

    def close(self) -> None:
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)
        for store in self._stores:
            store.close()

    def _drop(self, store: Guarded) -> None:
        """Pass over a failure of one server, unless it is all of them."""
        error = self._dropped(store)
        if error is not None:
            raise error

    def _dropped(self, store: Guarded) -> StoreError | None:
        """A failure of one server is None, and counted, unless it is all of them."""
        if all(other.is_open() for other in self._stores):
            return StoreUnavailable(f"{self.name}: none of {len(self._stores)} servers answers")
        with self._lock:
            self.num_dropped += 1
        return None

    def _store_of(self, key: bytes) -> Guarded:
        weights = [xxhash.xxh3_64_intdigest(name + b"\0" + key) for name in self._names]
        return self._stores[weights.index(max(weights))]

    def _shares(self, keys: Sequence[bytes]) -> dict[Guarded, list[int]]:
        """By server, the numbers of its keys."""
        shares: dict[Guarded, list[int]] = {}
        for index, key in enumerate(keys):
            shares.setdefault(self._store_of(key), []).append(index)
        return shares

    def _of_each(self, keys: Sequence[bytes], call: Callable[[Guarded, Sequence[int]], Sequence[T]]) -> list[T]:
        """What `call` answers for the keys of each server, all servers at once, in the order of the keys."""
        shares = self._shares(keys)
        answers = self._at_once([partial(call, store, share) for store, share in shares.items()])
        found: dict[int, T] = {}
        for share, answer in zip(shares.values(), answers, strict=True):
            found.update(zip(share, answer, strict=True))
        return [found[index] for index in range(len(keys))]

    def _at_once(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        if len(calls) < 2:
            return [call() for call in calls]
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(
                    _THREADS_PER_STORE * len(self._stores), thread_name_prefix=f"{self.name}-shard"
                )
            futures = [self._threads.submit(call) for call in calls[1:]]
        return [calls[0](), *(future.result() for future in futures)]


def _answers(store: Store) -> bool:
    try:
        store.ping()
    except StoreError:
        return False
    return True
