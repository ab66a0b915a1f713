"""`lm://` over TLS: who is believed, and who is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_ext.errors import StoreError, StoreUnavailable
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.lmserver import open_lm
from tests.certificates import Authority
from tests.contracts.store_contract import get, key_of, views
from tests.lm_servers import ServerProcess, serving

SIZES = [0, 1, 100_000, 5 * 1024**2]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Iterator[ServerProcess]:
    certificate, key = authority.issue("server")
    with serving("--tls-cert", certificate, "--tls-key", key) as server:
        yield server


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[ServerProcess]:
    certificate, key = authority.issue("mutual-server")
    options = ["--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", authority.path]
    with serving(*options) as server:
        yield server


def open_store(server: ServerProcess, **options: object) -> Store:
    patient = {"connect_timeout_s": 10, "lookup_timeout_s": 10, "timeout_s": 20}
    return open_lm(f"lm://localhost:{server.port}", {**patient, **options})


def assert_round_trip(store: Store) -> None:
    for size in SIZES:
        data = os.urandom(size)
        middle = size // 2
        store.put(key_of(str(size)), views(data[:middle], b"", data[middle:]))
        assert get(store, key_of(str(size)), size) == data
    assert store.exists([key_of("1"), key_of("2")]) == [True, False]
    store.delete([key_of("1")])
    assert store.ping() >= 0
    store.close()


def test_a_server_with_a_certificate_of_our_authority(tls: ServerProcess, authority: Authority) -> None:
    assert_round_trip(open_store(tls, tls_ca=authority.path))


def test_an_idle_tls_connection_is_used_again(tls: ServerProcess, authority: Authority) -> None:
    """TLS 1.3 sends session tickets after the handshake; they are no stray bytes."""
    store = open_store(tls, tls_ca=authority.path)
    before = store.usage()
    for _ in range(5):
        store.ping()
    with store._pool.link(5.0) as link:  # type: ignore[attr-defined]
        connections = link.stats()["num_connections"]
    assert before.capacity_bytes
    assert connections == 1
    store.close()


def test_a_server_of_an_authority_nobody_knows(tls: ServerProcess) -> None:
    with pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        open_store(tls, tls=True).ping()


def test_a_server_with_the_name_of_another(tls: ServerProcess, authority: Authority) -> None:
    store = open_lm(f"lm://127.0.0.2:{tls.port}", {"tls_ca": authority.path, "lookup_timeout_s": 5})
    with pytest.raises(StoreUnavailable):  # it listens on 127.0.0.1 only, or is told by its name
        store.ping()


def test_a_client_without_tls_is_unavailable_and_no_hang(tls: ServerProcess) -> None:
    with pytest.raises(StoreUnavailable, match=r"it may want TLS \(tls_ca\)"):
        open_store(tls, connect_timeout_s=1).ping()


def test_handshakes_that_fail_leave_no_traceback_in_the_servers_log(tls: ServerProcess, authority: Authority) -> None:
    for options in ({"tls": True}, {}):
        with pytest.raises(StoreError):
            open_store(tls, connect_timeout_s=1, **options).ping()
    assert_round_trip(open_store(tls, tls_ca=authority.path))
    assert "Traceback" not in tls.log()


def test_mutual_tls_with_a_certificate(mutual: ServerProcess, authority: Authority) -> None:
    certificate, key = authority.issue("client")
    assert "WARNING" not in mutual.log()
    assert_round_trip(open_store(mutual, tls_ca=authority.path, tls_cert=certificate, tls_key=key))


def test_mutual_tls_without_a_certificate(mutual: ServerProcess, authority: Authority) -> None:
    with pytest.raises(StoreUnavailable, match=r"it may want a certificate \(tls_cert\)"):
        open_store(mutual, tls_ca=authority.path).ping()
    assert "Traceback" not in mutual.log()


def test_mutual_tls_with_a_certificate_of_another_authority(
    mutual: ServerProcess, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = Authority(tmp_path, "stranger-ca").issue("stranger")
    with pytest.raises(StoreUnavailable):
        open_store(mutual, tls_ca=authority.path, tls_cert=certificate, tls_key=key).ping()
