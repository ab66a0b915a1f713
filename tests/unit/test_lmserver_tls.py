"""`lm://` over TLS: who is believed, and who is not."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lmcache_ext.errors import StoreError, StoreUnavailable
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.lmserver import open_lm
from tests.contracts.store_contract import get, key_of, views
from tests.lm_servers import ServerProcess, serving

SIZES = [0, 1, 100_000, 5 * 1024**2]


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = self._write(f"{name}.pem", self._sign(self._name, self._key.public_key(), None))

    def issue(self, name: str) -> tuple[str, str]:
        """Certificate and key of 127.0.0.1 and localhost, as paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key.public_key(), x509.SubjectAlternativeName(hosts))
        encoded = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return self._write(f"{name}.pem", certificate), self._write(f"{name}.key", encoded)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, names: x509.ExtensionType | None) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(self._name, subject, key, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> str:
        path = self._folder / name
        path.write_bytes(data)
        return str(path)


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
    with pytest.raises(StoreError):
        open_store(tls, connect_timeout_s=1).ping()


def test_mutual_tls_with_a_certificate(mutual: ServerProcess, authority: Authority) -> None:
    certificate, key = authority.issue("client")
    assert "WARNING" not in mutual.log()
    assert_round_trip(open_store(mutual, tls_ca=authority.path, tls_cert=certificate, tls_key=key))


def test_mutual_tls_without_a_certificate(mutual: ServerProcess, authority: Authority) -> None:
    with pytest.raises(StoreUnavailable):
        open_store(mutual, tls_ca=authority.path).ping()


def test_mutual_tls_with_a_certificate_of_another_authority(
    mutual: ServerProcess, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = Authority(tmp_path, "stranger-ca").issue("stranger")
    with pytest.raises(StoreUnavailable):
        open_store(mutual, tls_ca=authority.path, tls_cert=certificate, tls_key=key).ping()
