"""mock:// and blackhole://: backends for experiments."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from lmcache_ext.errors import ConfigError, StoreFull, StoreTimeout
from lmcache_ext.stores.base import Store, Usage
from lmcache_ext.stores.registry import open_store
from tests.contracts.store_contract import StoreContract, get, key_of, views

FAST = "read_throughput=inf&write_throughput=inf&peeking_latency=0"
MIB = 1024**2


class TestMock(StoreContract):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        store = open_store(f"mock://1/?{FAST}")
        yield store
        store.close()

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        store._objects[key] = data
        store._used_bytes += len(data)

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        return store._objects.get(key)


def test_the_object_not_asked_for_longest_goes_first():
    store = open_store(f"mock://0.001/?{FAST}")  # 1.02 MiB
    for name in ("a", "b"):
        store.put(key_of(name), views(bytes(MIB // 2)))
    get(store, key_of("a"), MIB // 2)
    store.put(key_of("c"), views(bytes(MIB // 2)))
    assert store.exists([key_of("a"), key_of("b"), key_of("c")]) == [True, False, True]
    assert store.usage().num_objects == 2


def test_an_object_over_the_capacity_is_refused():
    with pytest.raises(StoreFull, match="an object of 2097152 bytes, capacity is 1073741"):
        open_store(f"mock://0.001/?{FAST}").put(key_of("a"), views(bytes(2 * MIB)))


def test_calls_take_the_time_of_the_medium():
    store = open_store("mock://1/?peeking_latency=20&read_throughput=0.02&write_throughput=0.04")
    taken = []
    for call in (
        lambda: store.exists([key_of("a")] * 64),  # one round trip
        lambda: store.put(key_of("a"), views(bytes(MIB))),
        lambda: get(store, key_of("a"), MIB),
    ):
        started_at = time.monotonic()
        call()
        taken.append(time.monotonic() - started_at)
    least = [0.020, 1 / 1024 / 0.04, 1 / 1024 / 0.02]
    assert [took >= floor for took, floor in zip(taken, least, strict=True)] == [True] * 3
    assert store.ping() >= 0.020


def test_what_would_take_longer_than_the_deadline_is_a_timeout():
    store = open_store("mock://1/?write_throughput=0.001", options={"request_timeout_s": 0.05})
    with pytest.raises(StoreTimeout, match=r"would take 0\.9\d+ s, deadline is 0\.050 s"):
        store.put(key_of("a"), views(bytes(MIB)))
    assert store.exists([key_of("a")]) == [False]
    slow = open_store("mock://1/?peeking_latency=500", options={"lookup_timeout_s": 0.01})
    with pytest.raises(StoreTimeout, match=r"deadline is 0\.010 s"):
        slow.exists([key_of("a")])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mock://", r"capacity: '' is not a number"),
        ("mock://ten/", "capacity: 'ten' is not a number"),
        ("mock://1/?read_throughput=0", "read_throughput: '0' is out of range"),
        ("mock://1/?latency=1", "unknown parameter 'latency', expected mock://GIB/"),
    ],
)
def test_bad_urls_are_refused(url, message):
    with pytest.raises(ConfigError, match=message):
        open_store(url)


def test_a_black_hole_takes_everything_and_has_nothing():
    store = open_store("blackhole://")
    keys = [key_of(name) for name in ("a", "b")]
    assert store.put_many(keys, [views(b"x")] * 2) == [None, None]
    assert store.exists(keys) == [False, False]
    assert store.get_many_into(keys, [[memoryview(bytearray(1))]] * 2) == [None, None]
    store.delete(keys)
    assert (store.ping(), store.usage()) == (0.0, Usage(0, None, 0))
    for _ in itertools.repeat(None, 2):
        store.close()
