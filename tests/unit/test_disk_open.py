"""URLs of directories, and the way to stores of other schemes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.stores import registry
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.registry import open_store


def roots(store: Store) -> list[str]:
    assert isinstance(store, DiskStore)
    return [space.root for space in store._spaces]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///mnt/a", ["/mnt/a"]),
        ("file:///mnt/a/", ["/mnt/a"]),
        ("/mnt/a", ["/mnt/a"]),
        ("/mnt/a,/mnt/b", ["/mnt/a", "/mnt/b"]),
        ("file:///mnt/a, /mnt/b", ["/mnt/a", "/mnt/b"]),
        ("file:///mnt/a,file:///mnt/b,/mnt/a/", ["/mnt/a", "/mnt/b"]),
        ("file:///mnt/with space/100%25", ["/mnt/with space/100%25"]),
        ("fs://localhost:8000/mnt/a", ["/mnt/a"]),
        ("fs://host:0/mnt/a,/mnt/b", ["/mnt/a", "/mnt/b"]),
        ("fs://host:0/mnt/a,fs://host:0/mnt/b", ["/mnt/a", "/mnt/b"]),
        ("fs:///mnt/a", ["/mnt/a"]),
        ("file://localhost/mnt/a,/mnt/b", ["/mnt/a", "/mnt/b"]),
    ],
)
def test_directories(url: str, expected: list[str]) -> None:
    assert roots(open_store(url)) == expected


def test_a_relative_directory_is_taken_from_where_we_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert roots(open_store("file://cache")) == [str(tmp_path / "cache")]


def test_capacity_and_name_reach_the_store(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}", capacity_bytes=1000, options={"name": "nfs"})
    assert (store.name, store.usage().capacity_bytes) == ("nfs", 1000)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://", "a directory is missing"),
        ("file:///a,,/b", "a directory is missing"),
        ("fs://host:80", "no directory after the host in 'host:80'"),
        ("fs://host:80/", "no directory after the host"),
        ("fil:///a", "known are file, fs.*did you mean file://"),
        ("rediss://h", "no store for scheme 'rediss', known are file, fs"),
        ("relative/path", "no store for scheme"),
        ("", "no store for scheme ''"),
    ],
)
def test_what_cannot_be_opened_is_told_with_what_can(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: ())
    with pytest.raises(ConfigError, match=message):
        open_store(url)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown option 'nmae'"):
        open_store("file:///a", options={"nmae": "x"})


def open_dummy(url: str, options: Mapping[str, Any]) -> Store:
    return DiskStore([f"/dummy/{url}"], options["capacity_bytes"], name=options["label"])


def test_other_schemes_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="dummy", group=registry.GROUP, value=f"{__name__}:open_dummy")
    monkeypatch.setattr(registry, "entry_points", lambda group: (point,) if group == registry.GROUP else ())
    store = open_store("dummy://there", capacity_bytes=5, options={"label": "plugged"})
    assert (store.name, store.usage().capacity_bytes, Path("/dummy").exists()) == ("plugged", 5, False)
    with pytest.raises(ConfigError, match="did you mean dummy://"):
        open_store("dumy://there")
