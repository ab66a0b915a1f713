"""audit://: every call is written down, and what comes back is held against what was put."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError, StoreFull
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.options import store_options
from lmcache_ext.stores.registry import open_store
from tests.contracts.store_contract import Landing, StoreContract, get, key_of, views

ACTUAL = {"actual_url": "mock://0.1/?read_throughput=inf&write_throughput=inf&peeking_latency=0"}


def audited(url: str = "audit://") -> Store:
    return open_store(url, options=ACTUAL)


class TestAudit(StoreContract):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        store = audited()
        yield store
        store.close()

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        store._store.put(key, views(data))

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        return store._store._objects.get(key)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "vllm.lmcache_ext.stores.audit")
    return caplog


def errors(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in log.records if record.levelno == logging.ERROR]


def spoil(store: Store, key: bytes) -> None:
    data = store._store._objects[key]
    store._store._objects[key] = data[:-1] + bytes([data[-1] ^ 1])


def test_a_flipped_bit_is_a_miss_and_an_error(log):
    store = audited()
    store.put_many([key_of("a"), key_of("b")], [views(os.urandom(100)), views(b"good")])
    spoil(store, key_of("a"))
    assert get(store, key_of("a"), 100) is None
    landings = [Landing([64, 100]), Landing([4])]
    assert store.get_many_into([key_of("a"), key_of("b")], [each.parts() for each in landings]) == [None, 4]
    assert len(errors(log)) == 2
    assert key_of("a").hex() in errors(log)[0]


def test_without_verification_it_only_writes_down(log):
    store = audited("audit://localhost:1?verify=false")
    store.put(key_of("a"), views(b"data"))
    spoil(store, key_of("a"))
    assert get(store, key_of("a"), 4) == b"dat`"
    assert errors(log) == []


def test_each_call_is_a_line(log):
    store = audited()
    store.put(key_of("a"), views(b"da", b"ta"))
    get(store, key_of("a"), 9)
    get(store, key_of("b"), 9)
    store.exists([key_of("a"), key_of("b")])
    with pytest.raises(StoreFull):
        store.put(key_of("c"), views(bytes(200 * 1024**2)))
    name = key_of("a").hex()
    assert [line.rpartition(",")[0] for line in log.messages[:4]] == [
        f"audit: put {name}: 4 bytes",
        f"audit: get {name}: 4 bytes",
        f"audit: get {key_of('b').hex()}: a miss",
        "audit: exists: 1 of 2 are there",
    ]
    assert "StoreFull: mock: an object of 209715200 bytes" in log.messages[4]


def test_it_wraps_the_store_that_the_file_names_with_the_options_of_that(tmp_path):
    path = tmp_path / "lmcache_config.yaml"
    actual = "mock://1/?write_throughput=0.0001"
    path.write_text(f"remote_url: audit://\naudit_actual_remote_url: {actual}\nblocking_timeout_secs: 0.01\n")
    config = load_config(path=str(path), environ={})
    store = open_store("audit://", options=store_options("audit://", config))
    assert store.name == "mock"
    assert store._store._timeout_s == 0.01


@pytest.mark.parametrize(
    ("url", "actual", "message"),
    [
        ("audit://", None, "name it as audit_actual_remote_url"),
        ("audit://", "audit://x", "this store itself"),
        ("audit://?verify=maybe", "blackhole://", "verify is not a yes or a no"),
    ],
)
def test_a_bad_audit_is_refused(url, actual, message):
    with pytest.raises(ConfigError, match=message):
        open_store(url, options={"actual_url": actual})
