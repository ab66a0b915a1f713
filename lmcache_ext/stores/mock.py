"""`mock://10/?peeking_latency=1&read_throughput=2&write_throughput=2`: a backend of a given speed, in memory.

What would a faster network bring, what does a slow one cost: objects are kept for real, and each call takes
as long as it would on a medium with this latency and these rates. Objects are this process's own.

    mock://10/             capacity in GiB; the object not asked for longest goes first
    peeking_latency=1      milliseconds of every exists, delete and ping
    read_throughput=2      GiB/s of all reads together
    write_throughput=2     GiB/s of all writes together; inf is possible
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from lmcache_ext.config_values import GIB, number
from lmcache_ext.errors import ConfigError, StoreFull, StoreTimeout
from lmcache_ext.stores.base import Store, Usage

_FORM = "mock://GIB/?peeking_latency=MS&read_throughput=GIB_PER_S&write_throughput=GIB_PER_S"
_PARAMETERS = {"peeking_latency": 1.0, "read_throughput": 2.0, "write_throughput": 2.0}


class Pipe:
    """One direction of a medium: transfers go through it one after the other."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def reserve(self, num_bytes: int) -> float:
        """Queue a transfer; the seconds from now at which its last byte has passed."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + num_bytes / self._bytes_per_s
            return self._free_at - now


class MockStore(Store):
    """Objects in this process's memory, behind a modelled medium.

    Threads:  any number; the lock is held while objects are copied, the medium's time passes outside it.
    Order:    a put is visible when its last byte has passed.
    Owner:    keeps copies.
    Failure:  StoreTimeout where the medium would take longer than the deadline (a put then leaves what was there),
              StoreFull for an object over the capacity.
    """

    name = "mock"

    def __init__(
        self,
        capacity_bytes: int,
        *,
        latency_s: float,
        read_bytes_per_s: float,
        write_bytes_per_s: float,
        timeout_s: float,
        lookup_timeout_s: float,
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._latency_s = latency_s
        self._reads = Pipe(read_bytes_per_s)
        self._writes = Pipe(write_bytes_per_s)
        self._timeout_s = timeout_s
        self._lookup_timeout_s = lookup_timeout_s
        self._objects: OrderedDict[bytes, bytes] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        self._pass(self._latency_s, self._lookup_timeout_s)
        with self._lock:
            return [key in self._objects for key in keys]

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        with self._lock:
            data = self._objects.get(key)
            if data is None:
                return None
            self._objects.move_to_end(key)
        self._pass(self._reads.reserve(len(data)), self._timeout_s)
        rest = memoryview(data)
        for part in parts:
            piece, rest = rest[: part.nbytes], rest[part.nbytes :]
            part.cast("B")[: piece.nbytes] = piece
        return len(data)

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        data = b"".join(parts)
        if len(data) > self._capacity_bytes:
            raise StoreFull(f"mock: an object of {len(data)} bytes, capacity is {self._capacity_bytes}")
        self._pass(self._writes.reserve(len(data)), self._timeout_s)
        with self._lock:
            self._drop(key)
            while self._used_bytes + len(data) > self._capacity_bytes:
                self._drop(next(iter(self._objects)))
            self._objects[key] = data
            self._used_bytes += len(data)

    def delete(self, keys: Sequence[bytes]) -> None:
        self._pass(self._latency_s, self._lookup_timeout_s)
        with self._lock:
            for key in keys:
                self._drop(key)

    def ping(self) -> float:
        started_at = time.monotonic()
        self._pass(self._latency_s, self._lookup_timeout_s)
        return time.monotonic() - started_at

    def usage(self) -> Usage:
        with self._lock:
            return Usage(self._used_bytes, self._capacity_bytes, len(self._objects))

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._objects.clear()
            self._used_bytes = 0

    def _drop(self, key: bytes) -> None:
        self._used_bytes -= len(self._objects.pop(key, b""))

    def _pass(self, duration_s: float, timeout_s: float) -> None:
        """Let the medium's time pass, up to the deadline."""
        self._closed.wait(min(duration_s, timeout_s))
        if duration_s > timeout_s:
            raise StoreTimeout(f"mock: would take {duration_s:.3f} s, deadline is {timeout_s:.3f} s")


def open_mock(url: str, options: Mapping[str, Any]) -> MockStore:
    """The entry point of `mock://`. Raises ConfigError."""
    capacity, _, query = url.partition("://")[2].partition("?")
    written = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(written) - set(_PARAMETERS))
    if unknown:
        raise ConfigError(f"{url}: unknown parameter {unknown[0]!r}, expected {_FORM}")
    known = {name: _number(url, name, written.get(name, default)) for name, default in _PARAMETERS.items()}
    return MockStore(
        int(_number(url, "capacity", capacity.rstrip("/")) * GIB),
        latency_s=known["peeking_latency"] / 1000,
        read_bytes_per_s=known["read_throughput"] * GIB,
        write_bytes_per_s=known["write_throughput"] * GIB,
        timeout_s=options.get("request_timeout_s", 10.0),
        lookup_timeout_s=options.get("lookup_timeout_s", 0.3),
    )


def _number(url: str, name: str, written: str | float) -> float:
    try:
        found: float = number(0.0, above=name != "peeking_latency")(written)
    except ValueError as error:
        raise ConfigError(f"{url}: {name}: {written!r} {error}, expected {_FORM}") from None
    return found
