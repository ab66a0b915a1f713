"""Two engines share chunks exactly when everything that decides a page's bytes is equal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lmcache_ext import namespace

TENSORS = {"embed": b"\x01" * 9000, "layers.0.q": b"\x02" * 9000, "norm": b"\x03" * 64}


def write_safetensors(path: Path, tensors: dict[str, bytes], dtype: str = "U8") -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, content in tensors.items():
        header[name] = {"dtype": dtype, "shape": [len(content)], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def identity_of(directory: Path) -> str:
    found = namespace.weights_identity(directory)
    assert found is not None
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    write_safetensors(directory / "model-1.safetensors", TENSORS)
    write_safetensors(directory / "model-2.safetensors", {"head": b"\x04" * 5000})
    return directory


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint counts as a large one."""
    monkeypatch.setattr(namespace, "_WHOLE_BYTES", 0)


class TestDigest:
    PARTS = {"model": "a", "weights": "b", "chunk": "blocks=2"}

    def test_is_sixteen_bytes_that_never_change(self):
        assert namespace.digest(self.PARTS).hex() == "3681edcea1ec974fffd5989664607db4"

    def test_does_not_depend_on_the_order_of_components(self):
        assert namespace.digest(dict(reversed(self.PARTS.items()))) == namespace.digest(self.PARTS)

    @pytest.mark.parametrize("name", PARTS)
    def test_differs_with_each_component(self, name):
        assert namespace.digest({**self.PARTS, name: "other"}) != namespace.digest(self.PARTS)

    def test_text_cannot_move_from_one_component_to_the_next(self):
        assert namespace.digest({"a": "1", "b": "2"}) != namespace.digest({"a": '1", "b": "2'})


@pytest.mark.parametrize("size", ["whole", "sampled"])
class TestWeights:
    @pytest.fixture(autouse=True)
    def _size(self, size, request):
        if size == "sampled":
            request.getfixturevalue("sampled")

    def test_are_the_same_at_another_path_and_at_another_time(self, model, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(model, copy)
        os.utime(copy / "model-1.safetensors", (1, 1))
        assert identity_of(copy) == identity_of(model)

    def test_are_the_same_behind_symbolic_links(self, model, tmp_path):
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        for file in model.iterdir():
            (snapshot / file.name).symlink_to(file)
        assert identity_of(snapshot) == identity_of(model)

    def test_do_not_depend_on_other_files(self, model):
        before = identity_of(model)
        (model / "README.md").write_text("hello")
        assert identity_of(model) == before

    @pytest.mark.parametrize("name", TENSORS)
    def test_differ_with_any_changed_tensor(self, model, name):
        before = identity_of(model)
        write_safetensors(model / "model-1.safetensors", {**TENSORS, name: b"\x09" * len(TENSORS[name])})
        assert identity_of(model) != before

    def test_differ_with_another_dtype_over_the_same_bytes(self, model):
        before = identity_of(model)
        write_safetensors(model / "model-1.safetensors", TENSORS, dtype="I8")
        assert identity_of(model) != before

    def test_differ_with_a_renamed_file(self, model):
        before = identity_of(model)
        (model / "model-2.safetensors").rename(model / "model-3.safetensors")
        assert identity_of(model) != before

    def test_differ_with_another_file_more(self, model):
        before = identity_of(model)
        (model / "extra.bin").write_bytes(b"x")
        assert identity_of(model) != before

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".gguf"])
    def test_of_other_formats_differ_too(self, model, suffix):
        file = model / f"weights{suffix}"
        file.write_bytes(b"\x00" * 9000)
        before = identity_of(model)
        file.write_bytes(b"\x01" * 9000)
        assert identity_of(model) != before

    def test_of_one_file_need_no_directory(self, tmp_path):
        file = tmp_path / "model.gguf"
        file.write_bytes(b"\x00" * 9000)
        before = identity_of(file)
        file.write_bytes(b"\x01" * 9000)
        assert identity_of(file) != before

    def test_of_a_directory_without_any_have_no_identity(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert namespace.weights_identity(tmp_path) is None


def test_one_changed_byte_of_a_small_checkpoint_is_seen(model):
    before = identity_of(model)
    file = model / "model-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)
    assert identity_of(model) != before


HOSTILE_HEADERS = {
    "empty file": b"",
    "shorter than a length": b"\x01\x02",
    "length beyond the file": (2**40).to_bytes(8, "little") + b"{}",
    "not JSON": (4).to_bytes(8, "little") + b"!!!!" + b"x" * 100,
    "not UTF-8": (2).to_bytes(8, "little") + b"\xff\xfe" + b"x" * 100,
    "a list": (2).to_bytes(8, "little") + b"[]" + b"x" * 100,
    "deeply nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
}
HOSTILE_ENTRIES = [
    {"t": {}},
    {"t": 3},
    {"t": {"data_offsets": "ab"}},
    {"t": {"data_offsets": [1]}},
    {"t": {"data_offsets": [-(2**70), 4]}},
    {"t": {"data_offsets": [5, 2]}},
    {"t": {"data_offsets": [0, 2**63]}},
    {"t": {"data_offsets": [float("inf"), 4]}},
]


@pytest.mark.usefixtures("sampled")
class TestHostileHeaders:
    @pytest.mark.parametrize("name", HOSTILE_HEADERS)
    def test_are_sampled_like_any_bytes(self, tmp_path, name):
        (tmp_path / "model.safetensors").write_bytes(HOSTILE_HEADERS[name])
        assert identity_of(tmp_path) == identity_of(tmp_path)

    @pytest.mark.parametrize("entries", HOSTILE_ENTRIES, ids=lambda entries: str(entries)[:40])
    def test_do_not_hide_the_data_behind_them(self, tmp_path, entries):
        text = json.dumps(entries).encode()
        found = []
        for content in (b"\x00", b"\x01"):
            (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content * 5000)
            found.append(identity_of(tmp_path))
        assert found[0] != found[1]


class TestAdapter:
    @pytest.fixture
    def adapter(self, tmp_path) -> Path:
        directory = tmp_path / "adapter"
        directory.mkdir()
        write_safetensors(directory / "adapter_model.safetensors", {"lora_A": b"\x05" * 100})
        (directory / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
        return directory

    def test_is_the_same_at_another_path(self, adapter, tmp_path):
        shutil.copytree(adapter, tmp_path / "copy")
        first = namespace.adapter_identity(str(adapter))
        assert first is not None
        assert len(first) == 16
        assert namespace.adapter_identity(str(tmp_path / "copy")) == first

    def test_differs_with_its_scale_alone(self, adapter):
        before = namespace.adapter_identity(str(adapter))
        (adapter / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 32}')
        assert namespace.adapter_identity(str(adapter)) != before

    def test_differs_with_its_weights(self, adapter):
        before = namespace.adapter_identity(str(adapter))
        write_safetensors(adapter / "adapter_model.safetensors", {"lora_A": b"\x06" * 100})
        assert namespace.adapter_identity(str(adapter)) != before

    @pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
    def test_that_is_incomplete_has_none(self, adapter, missing):
        (adapter / missing).unlink()
        assert namespace.adapter_identity(str(adapter)) is None

    def test_that_is_not_there_has_none(self, tmp_path):
        assert namespace.adapter_identity(str(tmp_path / "gone")) is None
