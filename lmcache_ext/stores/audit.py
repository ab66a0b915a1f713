"""`audit://`: another store, with every call written down and every object held against what was put.

    remote_url: "audit://?verify=true"
    audit_actual_remote_url: "redis://redis:6379"

With `verify` (the default) an object that is none of the last few that this process put under its key is
an error in the log and a miss. What other processes put is not known here and passes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

import xxhash

from lmcache_ext.config_values import boolean
from lmcache_ext.errors import ConfigError, StoreError
from lmcache_ext.stores.base import Store, Survey, Usage
from lmcache_ext.stores.registry import open_store

logger = logging.getLogger("vllm.lmcache_ext.stores.audit")

MAX_KEYS = 2**18  # checksums of so many keys are remembered, the latest: some 60 MB
_PUTS_PER_KEY = 8  # a get may see any put that was under way while it ran


class Checksums:
    """What was put under each key lately.

    Threads:  any number.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: bytes, checksum: str) -> None:
        with self._lock:
            self._of[key] = (checksum, *self._of.pop(key, ()))[:_PUTS_PER_KEY]
            if len(self._of) > MAX_KEYS:
                self._of.popitem(last=False)

    def of(self, key: bytes) -> tuple[str, ...]:
        """The latest first; empty where this process put nothing."""
        with self._lock:
            return self._of.get(key, ())


class AuditStore(Store):
    """Any store, with a line in the log for each object and call.

    Threads:  as the store.
    Order:    as the store.
    Owner:    of the store: `close` closes it.
    Failure:  as the store; logged, and raised on. An object that differs is a miss.
    """

    def __init__(self, store: Store, *, verify: bool) -> None:
        self.name = store.name
        self._store = store
        self._checksums = Checksums() if verify else None

    def register(self, memory: memoryview) -> None:
        self._store.register(memory)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        with _Line("exists") as line:
            found = self._store.exists(keys)
            line.outcome = f"{sum(found)} of {len(keys)} are there"
            return found

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        with _Line("get", key) as line:
            length = self._store.get_into(key, parts)
            if length is not None and not self._is_as_put(key, parts, length):
                line.outcome = f"{length} bytes that differ from those put: a miss"
                return None
            line.outcome = "a miss" if length is None else f"{length} bytes"
            return length

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        with _Line("put", key) as line:
            if self._checksums is not None:
                self._checksums.add(key, _checksum(parts))
            self._store.put(key, parts)
            line.outcome = f"{sum(part.nbytes for part in parts)} bytes"

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        with _Line("get_many") as line:
            lengths = self._store.get_many_into(keys, parts_per_key)
            for index, (key, parts) in enumerate(zip(keys, parts_per_key, strict=True)):
                length = lengths[index]
                if isinstance(length, int) and not self._is_as_put(key, parts, length):
                    lengths[index] = None
            line.outcome = _counted(lengths)
            return lengths

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> list[StoreError | None]:
        with _Line("put_many") as line:
            if self._checksums is not None:
                for key, parts in zip(keys, parts_per_key, strict=True):
                    self._checksums.add(key, _checksum(parts))
            outcomes = self._store.put_many(keys, parts_per_key)
            line.outcome = _counted([outcome or 0 for outcome in outcomes])
            return outcomes

    def delete(self, keys: Sequence[bytes]) -> None:
        with _Line("delete") as line:
            self._store.delete(keys)
            line.outcome = f"{len(keys)} keys"

    def ping(self) -> float:
        with _Line("ping"):
            return self._store.ping()

    def usage(self) -> Usage:
        with _Line("usage") as line:
            usage = self._store.usage()
            line.outcome = str(usage)
            return usage

    def survey(self) -> list[Survey]:
        return self._store.survey()

    def close(self) -> None:
        self._store.close()

    def _is_as_put(self, key: bytes, parts: Sequence[memoryview], length: int) -> bool:
        """Whether the object is one that was put; true where nobody can tell."""
        if self._checksums is None or length > sum(part.nbytes for part in parts):
            return True
        known = self._checksums.of(key)
        found = _checksum(_first(parts, length))
        if not known or found in known:
            return True
        logger.error("%s: %s has checksum %s, put was %s", self.name, key.hex(), found, known[0])
        return False


class _Line:
    """One line in the log: what was asked, what came of it, how long it took."""

    def __init__(self, call: str, key: bytes | None = None) -> None:
        self.outcome = "done"
        self._what = call if key is None else f"{call} {key.hex()}"
        self._started_at = 0.0

    def __enter__(self) -> _Line:
        self._started_at = time.monotonic()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        outcome = self.outcome if error is None else f"{type(error).__name__}: {error}"
        logger.info("audit: %s: %s, %.3f ms", self._what, outcome, (time.monotonic() - self._started_at) * 1000)


def _counted(outcomes: Sequence[int | StoreError | None]) -> str:
    missing = sum(outcome is None for outcome in outcomes)
    failed = [outcome for outcome in outcomes if isinstance(outcome, StoreError)]
    first = f" ({type(failed[0]).__name__}: {failed[0]})" if failed else ""
    return f"{len(outcomes) - missing - len(failed)} done, {missing} missing, {len(failed)} failed{first}"


def _checksum(parts: Sequence[memoryview]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _first(parts: Sequence[memoryview], length: int) -> list[memoryview]:
    """The parts cut to their first `length` bytes."""
    found = []
    for part in parts:
        found.append(part.cast("B")[:length])
        length -= found[-1].nbytes
    return found


def open_audit(url: str, options: Mapping[str, Any]) -> AuditStore:
    """The entry point of `audit://`. Options: `actual_url`, and `actual_options` for the store behind it."""
    actual_url = options.get("actual_url")
    if not actual_url:
        raise ConfigError(f"{url}: no store to audit: name it as audit_actual_remote_url")
    if str(actual_url).startswith("audit://"):
        raise ConfigError(f"{url}: audit_actual_remote_url: {actual_url} is this store itself: name the one behind it")
    query = dict(parse_qsl(url.partition("?")[2]))
    try:
        verify = boolean(query.get("verify", True))
    except ValueError as error:
        raise ConfigError(f"{url}: verify {error}") from None
    return AuditStore(open_store(actual_url, options=options.get("actual_options", {})), verify=verify)
