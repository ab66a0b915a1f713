"""infinistore://: our half of it against a fake of its client; the real one where there is RDMA hardware."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError, StoreFull, StoreTimeout, StoreUnavailable
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.infinistore_options import InfinistoreOptions, parse_options
from lmcache_ext.stores.options import store_options
from lmcache_ext.stores.registry import open_store
from tests.contracts.store_contract import StoreContract, get, key_of, views
from tests.infinistore_fake import Server, module
from tests.servers import until
from tests.stopwatch import Stopwatch

URL = "infinistore://127.0.0.1:12345/?device=mlx5_1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setitem(sys.modules, "infinistore", module(server))
    monkeypatch.delitem(sys.modules, "lmcache_ext.stores.infinistore", raising=False)
    yield server
    sys.modules.pop("lmcache_ext.stores.infinistore", None)


def opened(**options: object) -> Store:
    return open_store(URL, options={"request_timeout_s": 5.0, "lookup_timeout_s": 2.0, **options})


def name_of(key: bytes) -> str:
    return f"kv:{key[:16].hex()}:{key[16:].hex()}"


class TestInfinistoreOverAFake(StoreContract):
    @pytest.fixture
    def store(self, server: Server) -> Iterator[Store]:
        self.objects = server.objects
        store = opened()
        yield store
        store.close()

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        self.objects[name_of(key)] = len(data).to_bytes(8, "little") + data

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        data = self.objects.get(name_of(key))
        return None if data is None else data[8:]


@pytest.mark.rdma
class TestInfinistore(StoreContract):
    """A server must be there: INFINISTORE_URL=infinistore://host:port/?device=mlx5_0."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        if not any(Path("/sys/class/infiniband").glob("*")):
            pytest.skip("no RDMA device")
        infinistore = pytest.importorskip("infinistore")
        url = os.environ["INFINISTORE_URL"]
        options = parse_options(url, {})
        config = infinistore.ClientConfig(
            connection_type=infinistore.TYPE_TCP, host_addr=options.host, service_port=options.port
        )
        self.raw = infinistore.InfinityConnection(config)
        self.raw.connect()
        store = open_store(url)
        yield store
        store.close()
        self.raw.close()

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        block = np.frombuffer(len(data).to_bytes(8, "little") + data, np.uint8)
        self.raw.tcp_write_cache(name_of(key), block.ctypes.data, block.nbytes)

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        if not self.raw.check_exist(name_of(key)):
            return None
        return self.raw.tcp_read_cache(name_of(key)).tobytes()[8:]


def test_a_server_without_room_is_full_and_stays_connected(server):
    store = opened()
    server.code = 507
    with pytest.raises(StoreFull, match="the server has no room"):
        store.put(key_of("a"), views(b"x"))
    server.code = 0
    store.put(key_of("a"), views(b"x"))
    assert server.num_connections == 1


@pytest.mark.parametrize("code", [500, 503])
def test_after_a_failure_it_connects_anew(server, code):
    store = opened()
    server.code = code
    with pytest.raises(StoreUnavailable, match=rf"put: failed \({code}\)"):
        store.put(key_of("a"), views(b"x"))
    server.code = 0
    store.put(key_of("a"), views(b"x"))
    assert get(store, key_of("a"), 1) == b"x"
    assert server.num_connections == 2


def test_it_is_found_again_when_it_is_back(server):
    store = opened()
    store.put(key_of("a"), views(b"x"))
    server.is_up = False
    for call in (store.ping, lambda: store.exists([key_of("a")]), lambda: get(store, key_of("a"), 1)):
        with pytest.raises(StoreUnavailable):
            call()
    server.is_up = True
    until(lambda: found(store), "it is found again", 5)


def found(store: Store) -> bool:
    try:
        return get(store, key_of("a"), 1) == b"x"
    except StoreUnavailable:
        return False


def test_a_caller_leaves_a_silent_server_at_the_deadline(server):
    store = opened(request_timeout_s=0.1)
    store.ping()
    server.answers = False
    watch = Stopwatch()
    with pytest.raises(StoreTimeout, match=r"no answer within 0\.100 s"):
        store.put(key_of("a"), views(b"x"))
    assert watch.took_s() < 1


def test_a_lie_about_the_length_is_refused(server):
    store = opened()
    server.objects[name_of(key_of("a"))] = (100).to_bytes(8, "little") + b"short"
    with pytest.raises(StoreUnavailable, match="100 bytes in a block of at most"):
        get(store, key_of("a"), 10)


def test_options_come_from_the_file_and_the_url(tmp_path):
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(f'remote_url: "{URL}"\nextra_config:\n  infinistore_link_type: LINK_IB\n  infinistore_ib_port: 2\n')
    config = load_config(path=str(path), environ={})
    assert config.notes == ()
    assert parse_options(URL, store_options(URL, config)) == InfinistoreOptions(
        "127.0.0.1", 12345, device="mlx5_1", link_type="IB", ib_port=2, timeout_s=10.0, lookup_timeout_s=0.3
    )


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("infinistore://h/", {}, "expected the server as infinistore://host:12345/"),
        ("infinistore://h:1/?dev=x", {}, "unknown option 'dev', known is device"),
        ("infinistore://h:1/", {"link_type": "token ring"}, "is not known: write one of Ethernet, IB"),
        ("infinistore://h:1/", {"colour": 1}, "unknown option 'colour'"),
    ],
)
def test_bad_options_are_refused(url, options, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(url, options)


def test_a_mistyped_option_names_its_key_and_file(tmp_path):
    path = tmp_path / "lmcache_config.yaml"
    path.write_text("extra_config:\n  infinistore_link_type: token ring\n")
    with pytest.raises(ConfigError, match=r"lmcache_config.yaml:2: extra_config.infinistore_link_type: 'token ring'"):
        load_config(path=str(path), environ={})


def test_importing_the_client_leaves_the_environment_alone(server, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    original = importlib.import_module

    def import_module(name: str):
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # as the real one does
        return original(name)

    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(importlib, "import_module", import_module)
    opened()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OPENBLAS_NUM_THREADS" not in os.environ


def test_a_missing_package_is_one_line_that_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "infinistore", None)
    monkeypatch.delitem(sys.modules, "lmcache_ext.stores.infinistore", raising=False)
    with pytest.raises(ConfigError, match=r"^infinistore:// needs a package: pip install infinistore \("):
        opened()
