"""What a Redis or Valkey URL and its options say."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from pydantic import SecretStr

from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.redis_options import Address, RespOptions, parse_options, remote_options
from lmcache_ext.stores.registry import open_store


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", {"addresses": (Address("h", 6379),), "library": "redis", "kind": "standalone", "tls": False}),
        ("resp://h:1", {"addresses": (Address("h", 1),), "library": "redis", "kind": "standalone"}),
        ("rediss://h/3", {"tls": True, "database": 3}),
        ("redis://user:p%40ss%2Fw%3A@h:6380/1", {"username": "user", "password": "p@ss/w:", "database": 1}),
        ("redis://:password@h", {"username": None, "password": "password"}),
        ("redis://[::1]:7", {"addresses": (Address("::1", 7),)}),
        ("redis://h?db=2&socket_timeout=3&max_connections=4", {"database": 2, "request_timeout_s": 3.0}),
        ("redis://h?password=x&ssl_cert_reqs=none", {"password": "x", "ssl": {"ssl_cert_reqs": "none"}}),
        ("unix:///tmp/a.sock?db=1", {"addresses": (Address("/tmp/a.sock"),), "database": 1}),
        ("unix://user:pw@/tmp/a.sock", {"addresses": (Address("/tmp/a.sock"),), "username": "user"}),
        ("redis-sentinel://a,b:1", {"kind": "sentinel", "addresses": (Address("a", 26379), Address("b", 1))}),
        ("redis-sentinel://a/mymaster", {"sentinel_service": "mymaster", "database": 0}),
        ("redis-sentinel://u:p@a/mymaster/2", {"sentinel_service": "mymaster", "database": 2, "password": "p"}),
        ("redis-sentinel://a/2", {"sentinel_service": "redismaster", "database": 2}),
        ("redis-cluster://a:1,b", {"kind": "cluster", "addresses": (Address("a", 1), Address("b", 6379))}),
        ("valkey://h:6379", {"library": "valkey", "kind": "standalone", "name": "valkey"}),
        ("valkey-cluster://a,b", {"library": "valkey", "kind": "cluster"}),
        ("valkeys://h", {"tls": True}),
    ],
)
def test_a_url_says(url: str, expected: dict[str, Any]) -> None:
    options = parse_options(url, {})
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://", "no host"),
        ("redis://h:0", "not host:port"),
        ("redis://h:99999", "not host:port"),
        ("redis://a,b", "2 hosts"),
        ("redis://h/x", "'database' has the bad value 'x'"),
        ("redis://h/-1", "expected 0 to 65536"),
        ("redis://user@h", "a username without a password"),
        ("redis-cluster://h/1", "only database 0"),
        ("redis://h?sokcet_timeout=1", "did you mean 'socket_timeout'"),
        ("redis://h?socket_timeout=0", "expected seconds, more than 0"),
        ("redis://h?socket_timeout=nan", "expected seconds, more than 0"),
        ("redis://h?ssl_cert_reqs=maybe", "expected required or optional or none"),
        ("unix://relative", "not an absolute path"),
        ("http://h", "no Redis or Valkey scheme"),
    ],
)
def test_a_bad_url_says_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(url, {})


def test_the_url_wins_over_the_options() -> None:
    options = parse_options("redis://me:mine@h/1", {"username": "you", "password": "yours", "database": 2, "tls": True})
    assert (options.username, options.password, options.database, options.tls) == ("me", "mine", 1, True)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown option 'pasword'; did you mean 'password'"):
        parse_options("redis://h", {"pasword": "x"})


def test_valkey_mode_makes_a_cluster() -> None:
    assert parse_options("valkey://a,b", {"mode": "cluster"}).kind == "cluster"


def test_no_password_is_ever_shown() -> None:
    options = parse_options("redis://u:hunter2@h", {"sentinel_password": "hunter2", "ssl_password": "hunter2"})
    assert "hunter2" not in repr(options)
    with pytest.raises(ConfigError) as caught:
        parse_options("redis://u:hunter2@h:0", {})
    assert "hunter2" not in str(caught.value)


def test_options_come_from_a_configuration() -> None:
    remote = {
        **{"username": None, "password": SecretStr("pw"), "database": 1, "mode": "cluster", "tls": False},
        **{"ttl_enabled": False, "ttl_s": 60.0, "num_connections": 8, "something_else": 1},
    }
    assert remote_options(remote, {"ssl_ca_certs": "/ca.pem", "num_connections": "4", "other": 1}) == {
        **{"password": remote["password"], "database": 1, "mode": "cluster", "tls": False},
        **{"num_connections": "4", "ssl_ca_certs": "/ca.pem"},
    }
    assert remote_options({"ttl_enabled": True, "ttl_s": 60.0}) == {"ttl_s": 60.0}
    options = parse_options("valkey://h", remote_options(remote, {"database": 0}))
    assert (options.password, options.kind, options.num_connections) == ("pw", "cluster", 8)


def test_every_option_has_a_default_and_none_is_required() -> None:
    assert parse_options("redis://h", {"capacity_bytes": None}) == RespOptions(
        "redis", "standalone", (Address("h", 6379),)
    )


def test_a_missing_package_is_one_line_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'valkey'", name="valkey")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ConfigError, match=r"^valkey:// needs a package that is not installed: pip install valkey$"):
        open_store("valkey://h:1")


@pytest.mark.parametrize("name", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_certificate_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"redis: {name}: /none/a.pem cannot be read .No such file or directory.:"):
        open_store("rediss://h", options={name: "/none/a.pem"})


@pytest.mark.parametrize("url", ["redis://h", "redis-cluster://h", "unix:///tmp/a.sock"])
def test_a_certificate_for_a_connection_in_the_clear_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="ssl_ca_certs is set, and the connection is not TLS: write rediss://"):
        open_store(url, options={"ssl_ca_certs": __file__})
    if not url.startswith("unix"):
        open_store(url, options={"ssl_ca_certs": __file__, "tls": True}).close()
