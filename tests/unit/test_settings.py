"""From the LMCache file to what vLLM's framework reads, on vLLM's own configuration; and who may share."""

from __future__ import annotations

import copy
import shutil
import uuid
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.math_utils import round_up
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from lmcache_ext.errors import ConfigError
from lmcache_ext.host_memory import HostMemory
from lmcache_ext.offload import identity, settings
from lmcache_ext.offload.rows import rows_path
from lmcache_ext.ops.page_shape import PageShape
from tests.unit.connector_engine import BLOCK, LAYERS, NUM_BLOCKS, PAGE, kv_cache_config, make_vllm_config

BLOCK_BYTES = len(LAYERS) * PAGE
GIB = 1024**3


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return make_vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def resolve(base_config, monkeypatch):
    """Settings and the connector's dictionary for these LMCache keys."""
    monkeypatch.setattr(settings, "read_host_memory", lambda **kw: HostMemory(64 * GIB, 64 * GIB, None))

    def resolve(groups=None, **keys):
        transfer = base_config.kv_transfer_config
        transfer.kv_connector_extra_config = {f"lmcache.{name}": value for name, value in keys.items()}
        transfer.engine_id = f"test-{uuid.uuid4().hex}"
        found = settings.resolve(base_config, groups or kv_cache_config())
        assert settings.resolve(base_config, groups or kv_cache_config()) == found  # the worker's comes first
        return found, transfer.kv_connector_extra_config

    return resolve


class TestChunk:
    def test_of_whole_blocks_is_a_row_of_their_pages(self, resolve):
        found, extra = resolve(chunk_size=64, max_local_cpu_size="1Mi")
        assert (found.tokens_per_chunk, found.blocks_per_chunk, found.row_bytes) == (64, 4, 4 * BLOCK_BYTES)
        assert extra["blocks_per_chunk"] == 4
        assert extra["cpu_bytes_to_use"] == found.host_bytes == 2**20

    def test_between_blocks_names_the_way_out(self, resolve):
        with pytest.raises(ConfigError, match="write 32 or 48, or auto"):
            resolve(chunk_size=40)

    def test_auto_is_the_least_of_a_mebibyte(self, resolve):
        assert resolve(chunk_size="auto")[0].row_bytes == 2**20

    def test_of_a_model_with_windows_is_one_block(self, resolve):
        spec = SlidingWindowSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, sliding_window=64
        )
        groups = KVCacheConfig(NUM_BLOCKS, kv_cache_config().kv_cache_tensors, [KVCacheGroupSpec(LAYERS, spec)])
        assert resolve(groups, chunk_size=64)[0].blocks_per_chunk == 1


class TestDiskBytes:
    ROW = 4 * BLOCK_BYTES
    SMALL = {"chunk_size": 64, "max_local_cpu_size": "1Mi"}

    def test_too_few_for_one_chunk_name_both_numbers(self, resolve):
        with pytest.raises(
            ConfigError, match=rf"max_local_disk_size of {self.ROW} bytes .* takes {self.ROW + 64} bytes"
        ):
            resolve(**self.SMALL, local_disk="/a", max_local_disk_size=f"{self.ROW}B")
        resolve(**self.SMALL, local_disk="/a", max_local_disk_size=f"{self.ROW + 64}B")

    def test_are_shared_by_all_directories(self, resolve):
        with pytest.raises(ConfigError, match=f"in each of 2 directories takes {2 * (self.ROW + 64)} bytes"):
            resolve(**self.SMALL, local_disk="/a,/b", max_local_disk_size=f"{self.ROW + 64}B")

    def test_of_a_serde_that_compresses_are_not_judged(self, resolve):
        resolve(**self.SMALL, local_disk="/a", max_local_disk_size=f"{self.ROW}B", local_disk_serde="lossless")


class TestHostBytes:
    def test_too_few_for_one_chunk_name_both_numbers(self, resolve):
        with pytest.raises(ConfigError, match=r"10240 bytes .* takes 32768 bytes"):
            resolve(chunk_size=64, max_local_cpu_size="10Ki")

    def test_that_do_not_fit_are_refused(self, resolve):
        with pytest.raises(ConfigError, match="/dev/shm"):
            resolve(max_local_cpu_size="65Gi")

    @pytest.mark.parametrize("size", [{}, {"max_local_cpu_size": 0}])
    def test_without_a_host_tier_stage_two_prompts(self, resolve, size):
        found, _ = resolve(chunk_size=64, local_cpu=False, **size)
        assert found.host_bytes == 2 * (256 // 64) * found.row_bytes

    def test_of_the_default_are_half_of_the_mount_whatever_is_free_by_then(self, resolve, monkeypatch):
        for free in (4 * GIB, 3 * GIB):
            monkeypatch.setattr(settings, "read_host_memory", lambda free=free, **kw: HostMemory(free, 4 * GIB, None))
            assert resolve()[0].host_bytes == 2 * GIB

    def test_count_the_rows_of_the_same_engine_as_free(self, resolve, base_config, monkeypatch):
        asked = []
        memory = HostMemory(GIB, GIB, None)
        monkeypatch.setattr(settings, "read_host_memory", lambda **kw: asked.append(kw) or memory)
        resolve(max_local_cpu_size="1Mi")
        assert asked[0] == {"own_rows": rows_path(base_config.kv_transfer_config.engine_id)}


@pytest.mark.parametrize(
    ("policy", "name", "module"),
    [("LRU", "lru", None), ("ARC", "arc", None), ("LFU", "LFUCachePolicy", "lmcache_ext.offload.policies")],
)
def test_policies_reach_the_framework_by_its_names(resolve, policy, name, module):
    extra = resolve(cache_policy=policy)[1]
    assert (extra["eviction_policy"], extra["cache_policy_module_path"]) == (name, module)


@pytest.mark.parametrize("decode", [True, False])
def test_decoded_tokens_are_kept_only_on_request(resolve, decode):
    assert resolve(save_decode_cache=decode)[1]["offload_prompt_only"] is not decode


def test_every_process_learns_our_spec_by_name(base_config):
    base_config.kv_transfer_config.kv_connector_extra_config = {}
    settings.announce(base_config)
    extra = base_config.kv_transfer_config.kv_connector_extra_config
    assert extra == {"spec_name": "LMCacheOffloadingSpec", "spec_module_path": "lmcache_ext.offload.spec"}


def changed(config, part, **attributes):
    """A shallow copy of vLLM's configuration with some attributes of one part changed."""
    config = copy.copy(config)
    setattr(config, part, copy.copy(getattr(config, part)))
    for name, value in attributes.items():
        setattr(getattr(config, part), name, value)
    return config


def components(config, cache=None, blocks=2, row=2 * BLOCK_BYTES):
    return identity.components(config, cache or kv_cache_config(), blocks_per_chunk=blocks, row_bytes=row)


class TestIdentity:
    def test_of_one_model_at_two_paths_is_the_same(self, base_config, tmp_path):
        shutil.copytree(base_config.model_config.model, tmp_path / "elsewhere")
        assert components(make_vllm_config(tmp_path / "elsewhere")) == components(base_config)

    CHANGES = {
        "dtype": ("model_config", {"dtype": torch.float16}, "kv_dtype"),
        "kv cache dtype": ("cache_config", {"cache_dtype": "float16"}, "kv_dtype"),
        "layout": ("cache_config", {"kv_cache_layout": "LBNHC"}, "kv_layout"),
        "tensor parallel": ("parallel_config", {"tensor_parallel_size": 2}, "parallel"),
        "pipeline parallel": ("parallel_config", {"pipeline_parallel_size": 2}, "parallel"),
        "hash": ("cache_config", {"prefix_caching_hash_algo": "sha256"}, "hash"),
        "quantization": ("model_config", {"quantization": "awq"}, "model"),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_differs_with(self, base_config, change):
        part, attributes, name = self.CHANGES[change]
        assert components(changed(base_config, part, **attributes))[name] != components(base_config)[name]

    def test_differs_with_the_instruction_set(self, base_config, monkeypatch):
        before = components(base_config)
        had = torch.cpu._is_avx512_supported()
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: not had)
        assert components(base_config)["kv_layout"] != before["kv_layout"]

    def test_differs_with_the_chunk_and_with_the_block(self, base_config):
        before = components(base_config)
        assert components(base_config, blocks=4)["chunk"] != before["chunk"]
        cache = kv_cache_config()
        group = cache.kv_cache_groups[0]
        cache.kv_cache_groups = [KVCacheGroupSpec(LAYERS, replace(group.kv_cache_spec, block_size=32))]
        assert components(base_config, cache)["groups"] != before["groups"]

    def test_holds_no_address_of_an_object(self, base_config):
        assert " at 0x" not in str(components(base_config))

    def test_differs_with_the_weights_under_an_unchanged_path(self, tmp_path):
        config = make_vllm_config(tmp_path)
        before = components(config)
        (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + b"tuned")
        assert components(config)["weights"] != before["weights"]

    @pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
    def test_is_shareable_under_hashes_that_mean_the_same_elsewhere(self, base_config, algorithm):
        assert identity.shareable_hash(changed(base_config, "cache_config", prefix_caching_hash_algo=algorithm))
        xxhash = changed(base_config, "cache_config", prefix_caching_hash_algo="xxhash_cbor")
        assert not identity.shareable_hash(xxhash)


class TestWeightsOf:
    LOAD = SimpleNamespace(load_format="auto", download_dir=None)

    def of(self, name, **config):
        model = SimpleNamespace(model=str(name), revision=None, seed=0, hf_config=SimpleNamespace(**config))
        return identity._weights(model, self.LOAD)

    def test_a_directory_without_any_are_never_the_same_twice(self, tmp_path):
        assert self.of(tmp_path) != self.of(tmp_path)

    def test_one_file_are_its_content(self, tmp_path):
        file = tmp_path / "model.gguf"
        file.write_bytes(b"weights")
        first = self.of(file)
        assert first == self.of(file)
        file.write_bytes(b"changed")
        assert self.of(file) != first

    @pytest.mark.parametrize("name", ["s3://bucket/model", "no/such/repository/at/all", "org/not-in-the-cache"])
    def test_a_bare_name_are_never_the_same_twice(self, name):
        assert self.of(name) != self.of(name)

    def test_a_commit_are_that_commit(self):
        first = self.of("org/not-in-the-cache", _commit_hash="abc")
        assert first == self.of("org/not-in-the-cache", _commit_hash="abc")
        assert first != self.of("org/not-in-the-cache", _commit_hash="def")


class TestFp8Rows:
    SHAPE = PageShape("bfloat16", heads=2, runs=BLOCK, k_run=32, v_run=32, heads_first=True)
    ON = {"extra_config": {"host_kv_dtype": "fp8"}}

    def test_take_a_byte_for_each_element_and_hold_twice_as_many_chunks(self, resolve):
        native, _ = resolve(chunk_size=256, max_local_cpu_size="1Mi")
        found, extra = resolve(chunk_size=256, max_local_cpu_size="1Mi", **self.ON)
        assert native.row_bytes == 16 * len(LAYERS) * PAGE
        assert found.row_bytes == round_up(16 * len(LAYERS) * self.SHAPE.part_bytes, 4096)
        assert found.row_bytes == pytest.approx(
            native.row_bytes / 2, rel=0.1
        )  # tiny pages: 64 bytes of scales are much
        assert found.host_bytes == native.host_bytes
        assert settings.host_shape(extra) in (self.SHAPE, replace(self.SHAPE, runs=1, k_run=512, v_run=512))

    def test_automatic_chunks_are_a_mebibyte_of_what_is_kept(self, resolve):
        assert resolve(chunk_size="auto", **self.ON)[0].row_bytes == pytest.approx(2**20, rel=0.05)

    def test_of_pages_that_nobody_understands_stop_the_start(self, resolve):
        with pytest.raises(ConfigError, match=r"host_kv_dtype: fp8 must know .* here pages of MLA.*; or remove it"):
            resolve(
                pages_of(MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)),
                **self.ON,
            )

    def test_of_a_quantised_kv_cache_stop_the_start(self, resolve):
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.uint8)
        with pytest.raises(ConfigError, match=r"host_kv_dtype: fp8 must know .* is quantised already"):
            resolve(pages_of(spec), **self.ON)

    def test_without_the_compiled_copier_stop_the_start(self, resolve, monkeypatch):
        monkeypatch.setattr(settings.pages_fp8, "available", lambda: False)
        with pytest.raises(
            ConfigError, match=r"host_kv_dtype: fp8 needs the compiled page copier: install .* remove it"
        ):
            resolve(**self.ON)

    def test_refusal_names_where_the_setting_was_written(self, resolve):
        with pytest.raises(ConfigError, match=r'^kv_connector_extra_config\["lmcache\.extra_config'):
            resolve(
                pages_of(MLAAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)),
                **self.ON,
            )


def pages_of(spec):
    return KVCacheConfig(NUM_BLOCKS, kv_cache_config().kv_cache_tensors, [KVCacheGroupSpec(LAYERS, spec)])
