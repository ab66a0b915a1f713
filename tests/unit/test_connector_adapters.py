"""Which adapter a request really uses is what is in its files, never what a client says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.lora.request import LoRARequest

from lmcache_ext.offload import adapters as adapters_module
from lmcache_ext.offload.adapters import Adapters
from lmcache_ext.offload.lookups import ADAPTER_PARAM


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


def labelled(known, path=None, *, lora_id=1, params=None):
    lora = None if path is None else LoRARequest("name", lora_id, str(path))
    request = SimpleNamespace(lora_request=lora, kv_transfer_params=params)
    assert known.label(request)
    return request.kv_transfer_params


def test_an_adapter_is_told_by_its_content(adapter, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    first, second = labelled(Adapters(), adapter), labelled(Adapters(), other)
    assert first == second
    assert len(bytes.fromhex(first[ADAPTER_PARAM])) == 16


def test_a_client_cannot_name_one(adapter):
    honest = labelled(Adapters(), adapter)
    assert labelled(Adapters(), adapter, params={ADAPTER_PARAM: "ff" * 16, "kept": 1}) == {**honest, "kept": 1}
    assert labelled(Adapters(), params={ADAPTER_PARAM: "ff" * 16, "kept": 1}) == {"kept": 1}


def test_a_request_without_one_is_left_alone():
    assert labelled(Adapters()) is None


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.bin"])
def test_one_that_is_incomplete_is_unknown(adapter, missing):
    (adapter / missing).unlink()
    assert labelled(Adapters(), adapter) == {ADAPTER_PARAM: ""}


def test_one_that_is_not_there_is_unknown(adapter):
    assert labelled(Adapters(), adapter / "gone") == {ADAPTER_PARAM: ""}


def test_one_whose_files_change_while_it_is_loaded_is_unknown_until_it_is_loaded_anew(adapter):
    known = Adapters()
    before = labelled(known, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"other weights")
    assert labelled(known, adapter) == {ADAPTER_PARAM: ""}
    assert labelled(known, adapter) == {ADAPTER_PARAM: ""}
    reloaded = labelled(known, adapter, lora_id=2)
    assert reloaded not in (before, {ADAPTER_PARAM: ""})


def test_a_name_of_the_hub_is_resolved_once(adapter, monkeypatch):
    asked = []
    monkeypatch.setattr(adapters_module, "get_adapter_absolute_path", lambda path: asked.append(path) or str(adapter))
    known = Adapters()
    assert labelled(known, "org/adapter") == labelled(known, "org/adapter")
    assert asked == ["org/adapter"]
