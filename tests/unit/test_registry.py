"""Schemes: ours, and those that other installed packages bring."""

from __future__ import annotations

import sys

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.options import store_options
from lmcache_ext.stores.registry import open_store

PLUGIN = """
from lmcache_ext.stores.blackhole import BlackholeStore


class Drawer(BlackholeStore):
    def __init__(self, url, options):
        self.name, self.url, self.options = "drawer", url, options
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package as pip would have installed it: a module, and metadata with an entry point."""
    (tmp_path / "drawer_plugin.py").write_text(PLUGIN)
    info = tmp_path / "drawer_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: drawer-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmcache_ext.stores]\ndrawer = drawer_plugin:Drawer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("drawer_plugin", None)


def test_a_scheme_of_another_package_opens_with_its_options_from_the_file(plugin, tmp_path):
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(
        "remote_url: drawer://upper\nblocking_timeout_secs: 3\nextra_config:\n  drawer.depth: 2\n  drawer.wood: oak\n"
    )
    config = load_config(path=str(path), environ={})
    assert config.notes == ()
    store = open_store("drawer://upper", options=store_options("drawer://upper", config))
    assert (store.name, store.url) == ("drawer", "drawer://upper")
    ours = {"request_timeout_s": 3, "lookup_timeout_s": 0.3, "capacity_bytes": None}
    assert store.options == {**ours, "depth": 2, "wood": "oak"}


def test_it_is_not_imported_before_it_is_asked_for(plugin):
    open_store("blackhole://")
    assert "drawer_plugin" not in sys.modules


def test_a_scheme_that_nobody_brings_is_refused_by_both(tmp_path):
    with pytest.raises(ConfigError, match="no store for scheme 'drawer', known are audit, blackhole"):
        open_store("drawer://upper")
    with pytest.raises(ConfigError, match="unknown scheme 'drawer'"):
        load_config(environ={"LMCACHE_REMOTE_URL": "drawer://upper"})
