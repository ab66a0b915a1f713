"""What the configuration's settings become: the breaker, the threads, the options of a remote store."""

from __future__ import annotations

import socket
import time

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.errors import StoreError, StoreTimeout
from lmcache_ext.offload.far import guarded, num_threads
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.options import store_options
from lmcache_ext.stores.pace import Floor
from lmcache_ext.stores.registry import open_store
from tests.stopwatch import Stopwatch


def config_of(tmp_path, text):
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(text)
    return load_config(path=str(path), environ={})


def fail_reads(guarded, times):
    for _ in range(times):
        guarded.exists([bytes(17)])


@pytest.mark.parametrize(
    ("text", "failures"), [("chunk_size: 256", 5), ("extra_config: {get_blocking_failed_threshold: 2}", 2)]
)
def test_breaker_opens_after_as_many_failures_as_were_written(tmp_path, text, failures):
    (tmp_path / "file").write_text("")
    store = guarded(DiskStore([str(tmp_path / "file")], None), config_of(tmp_path, text))  # a file, not a directory
    fail_reads(store, failures - 1)
    assert not store.is_open()
    fail_reads(store, 1)
    assert store.is_open()
    store.close()


def test_written_number_of_threads_is_used(tmp_path):
    assert num_threads(config_of(tmp_path, "extra_config: {disk_io_threads: 3}")) == 3


def test_remote_store_answers_within_the_blocking_timeout_unless_told_otherwise(tmp_path):
    text = 'remote_url: "redis://h:1"\nblocking_timeout_secs: 4\n'
    assert store_options("redis://h:1", config_of(tmp_path, text))["request_timeout_s"] == 4
    told = config_of(tmp_path, text + "extra_config: {request_timeout: 2}\n")
    assert store_options("redis://h:1", told)["request_timeout_s"] == 2


@pytest.mark.parametrize(("text", "timeout_s"), [("", 0.3), ("lookup_timeout_ms: 100\n", 0.1)])
@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}", "redis-cluster://127.0.0.1:{}", "lm://127.0.0.1:{}"])
def test_lookup_ends_within_its_own_timeout(tmp_path, url, text, timeout_s):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = config_of(tmp_path, f'remote_url: "{url.format(silent.getsockname()[1])}"\n{text}')
        store = open_store(config.live.remote_url, options=store_options(config.live.remote_url, config))
        started_at, watch = time.monotonic(), Stopwatch()
        with pytest.raises(StoreError):
            store.exists([bytes(17)])
        assert watch.took_s() < timeout_s + 0.15
        assert time.monotonic() - started_at > timeout_s * 0.5
        store.close()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}", "valkey-cluster://127.0.0.1:{}", "lm://127.0.0.1:{}"])
def test_fetch_that_stops_ends_within_its_own_timeout(tmp_path, url):
    text = "extra_config: {remote_stall_timeout_ms: 80, remote_min_bytes_per_s: 1000}\n"
    config = config_of(tmp_path, f'remote_url: "{url.format(1)}"\n{text}')
    store = open_store(config.live.remote_url, options=store_options(config.live.remote_url, config))
    assert store._floor == Floor(0.08, 1000)
    store.close()
    assert store_options("mooncakestore://h:1/", config)["stall_timeout_s"] == 0.08
    assert "stall_timeout_s" not in store_options("mock://1/", config)


def test_fetch_from_a_cache_server_ends_within_the_blocking_timeout(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"lm://127.0.0.1:{silent.getsockname()[1]}"
        config = config_of(tmp_path, f'remote_url: "{address}"\nblocking_timeout_secs: 0.1\n')
        store = open_store(config.live.remote_url, options=store_options(config.live.remote_url, config))
        watch = Stopwatch()
        with pytest.raises(StoreTimeout):
            store.get_into(bytes(17), [])
        assert watch.took_s() < 0.5
        store.close()
