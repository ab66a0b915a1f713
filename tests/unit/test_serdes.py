"""Which serde a name in the configuration opens, for which KV, and where it is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, MLAAttentionSpec
from vllm.v1.kv_offload.cpu.gpu_worker import compute_sub_block_ptrs
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from lmcache_ext.config import load_config
from lmcache_ext.config_keys import SERDES
from lmcache_ext.errors import ConfigError
from lmcache_ext.offload.element_layout import _why_opaque, row_layout
from lmcache_ext.offload.far import FarTiers, open_disk, open_remote
from lmcache_ext.offload.serdes import loss, open_serde, readable_serdes
from lmcache_ext.ops import fixed_numpy, lossless
from lmcache_ext.ops.layout import ELEMENT_BYTES
from lmcache_ext.serde.naive import NaiveSerde

LAYERS, RANKS, HEADS, BLOCKS, TOKENS, DIM = 3, 2, 2, 2, 32, 32


def pages(order="LBHNC", dtype="bfloat16", isa=None, **changed):
    found = {"dtype": dtype, "layers": LAYERS, "heads": HEADS, "tokens": TOKENS, "k_dim": DIM, "v_dim": DIM}
    return {**found, "order": order, "isa": isa, **changed}


def layout_of(found, blocks=BLOCKS, **options):
    page_bytes = found["heads"] * found["tokens"] * (found["k_dim"] + found["v_dim"]) * ELEMENT_BYTES[found["dtype"]]
    rank_bytes = found["layers"] * blocks * page_bytes
    sizes = {"row_bytes": RANKS * rank_bytes + 64, "rank_bytes": rank_bytes}
    return row_layout(found, **sizes, ranks=RANKS, blocks=blocks, **options)


def keys_and_values(dtype):
    """(ranks, blocks, layers, heads, tokens, 2, dim): a different number for each element, exact in every dtype."""
    shape = (RANKS, BLOCKS, LAYERS, HEADS, TOKENS, 2, DIM)
    bits = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.int32).reshape(shape)
    return bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)


def row_of(numbers, order):
    """Rows as the copiers fill them: rank, block, layer, then the page in vLLM's order."""
    packed = numbers.flatten(-2) if order in ("LBHNC", "BLHNC") else numbers.flatten(-2).transpose(3, 4)
    return packed.contiguous().view(torch.uint8).numpy().tobytes() + bytes(64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_every_key_and_value_is_found_in_rows_of_each_layout(order, dtype):
    numbers = keys_and_values(getattr(torch, dtype))
    layout, _ = layout_of(pages(order, dtype))
    assert_found(layout, np.frombuffer(row_of(numbers, order), dtype=np.uint8), numbers)


def row_of_vllms_copier(numbers, order):
    """A row as vLLM's own copier on GPUs fills it, by its own arithmetic: all blocks of a tensor side by side."""
    by_rank = np.frombuffer(row_of(numbers, order)[:-64], dtype=np.uint8).reshape(RANKS, BLOCKS, LAYERS, -1)
    if order.startswith("BL"):
        by_rank = by_rank.reshape(RANKS, BLOCKS, 1, -1)
    row = torch.zeros(by_rank.size + 64, dtype=torch.int8)
    for rank, pages_of_rank in enumerate(by_rank):
        size = pages_of_rank.size
        place = {"rank": rank, "_worker_offset": rank * size, "_worker_area_end": (rank + 1) * size}
        region = SimpleNamespace(**place, _base=row, _row_stride=len(row), num_chunks=1, _views=[])
        for tensor_pages in pages_of_rank.swapaxes(0, 1):
            view = SharedOffloadRegion.create_next_worker_view(region, tensor_pages.size)
            places = np.empty(BLOCKS, dtype=np.uint64)
            compute_sub_block_ptrs(np.zeros(1, dtype=np.int32), BLOCKS, places, view)
            for page, at in zip(tensor_pages, places.astype(np.int64) - row.data_ptr(), strict=True):
                row.numpy()[at : at + page.size] = page.view(np.int8)
    return row.numpy().view(np.uint8)


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_every_key_and_value_is_found_in_rows_of_vllms_own_copier(order):
    numbers = keys_and_values(torch.bfloat16)
    layout, _ = layout_of(pages(order), tensors_first=True)
    assert_found(layout, row_of_vllms_copier(numbers, order), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_key_and_value_is_found_in_pages_that_this_cpu_has_packed(dtype):
    numbers = keys_and_values(dtype)
    isa = _get_attn_isa(dtype, TOKENS, DIM, "auto")
    layout, _ = layout_of(pages(dtype=str(dtype).removeprefix("torch."), isa=isa))
    cells = torch.zeros(RANKS, BLOCKS, LAYERS, HEADS, 2 * TOKENS, DIM, dtype=dtype)
    for place in np.ndindex(RANKS, BLOCKS, LAYERS):
        keys, values = (numbers[place][..., i, :].transpose(0, 1).contiguous() for i in (0, 1))
        k_cache, v_cache = cells[place].unsqueeze(0).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, k_cache, v_cache, torch.arange(TOKENS), isa)
    assert_found(layout, np.frombuffer(cells.view(torch.uint8).numpy().tobytes() + bytes(64), np.uint8), numbers)


def assert_found(layout, row, numbers):
    for layer, head, block in np.ndindex(*layout.cells.shape):
        expected = numbers[head // HEADS, block, layer, head % HEADS].to(torch.float32).numpy()
        for part, index in enumerate((layout.k_index, layout.v_index)):
            found = fixed_numpy.load_plane(layout, row, int(layout.cells[layer, head, block]), index)
            np.testing.assert_array_equal(found, np.where(np.isfinite(expected[:, part]), expected[:, part], 0))


def test_packing_that_is_no_permutation_is_not_understood(monkeypatch):
    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", lambda *_: None)
    layout, reason = layout_of(pages(isa="vec"))
    assert layout is None
    assert "vec" in reason
    assert "no permutation" in reason


def test_pages_that_do_not_fill_a_rank_are_not_understood():
    layout, reason = row_layout(pages(), row_bytes=4096, rank_bytes=4000, ranks=1, blocks=1)
    assert layout is None
    assert "do not add up to the 4000 bytes" in reason


SPEC = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


def engine(spec, groups=1, kv_layout="LBHNC", **parallel):
    sizes = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**(sizes | parallel)), cache_config=SimpleNamespace(cache_dtype="auto")
    )
    group = SimpleNamespace(kv_cache_spec=spec)
    return config, SimpleNamespace(kv_cache_groups=[group] * groups, kv_cache_layout=kv_layout)


OPAQUE = {
    "2 kinds of KV pages": engine(FullAttentionSpec(**SPEC), groups=2),
    "MLAAttentionSpec": engine(MLAAttentionSpec(**SPEC)),
    "quantised already": engine(FullAttentionSpec(**SPEC | {"dtype": torch.uint8})),
    "quantised already ": engine(FullAttentionSpec(**SPEC, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)),
    "padded": engine(FullAttentionSpec(**SPEC, page_size_padded=1 << 20)),
    "pipeline": engine(FullAttentionSpec(**SPEC), pipeline_parallel_size=2),
    "context": engine(FullAttentionSpec(**SPEC), decode_context_parallel_size=2),
    "scattered": engine(FullAttentionSpec(**SPEC), kv_layout="LHBNC"),
}


@pytest.mark.parametrize("reason", OPAQUE)
def test_pages_without_a_layout_say_why(reason):
    assert reason.strip() in (_why_opaque(*OPAQUE[reason]) or "")
    assert _why_opaque(*engine(FullAttentionSpec(**SPEC))) is None


LOSSY = ["cachegen", "fp8", "int8", "kivi", "kivi2"]
BINS = {"key_bins": (64, 48), "value_bins": (12,)}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_serde_of_opaque_pages_stops_the_start_and_offers_lossless(name):
    with pytest.raises(ConfigError, match=rf"a\.yaml:1: remote_serde: {name} must know .* here pages are sealed.*loss"):
        open_serde(name, "a.yaml:1: remote_serde", kv_dtype="bfloat16", layout=None, opaque="pages are sealed")


@pytest.mark.parametrize("name", ["lossless", *LOSSY])
def test_serde_that_is_not_compiled_stops_the_start(name, monkeypatch):
    monkeypatch.setattr(lossless, "available", lambda: False)
    with pytest.raises(ConfigError, match=rf"a\.yaml:1: remote_serde: {name} needs the compiled .*write naive"):
        open_serde(name, "a.yaml:1: remote_serde", kv_dtype="bfloat16", layout=None)


@pytest.mark.skipif(not lossless.available(), reason="no compiler was there when the package was installed")
def test_every_serde_brings_back_a_row_and_has_a_tag_of_its_own():
    layout, _ = layout_of(pages())
    serdes = [open_serde(name, "", kv_dtype="bfloat16", layout=layout, **BINS) for name in SERDES]
    row = np.random.default_rng(0).normal(size=layout.row_bytes // 4).astype("<f4").view(np.uint16)[1::2].tobytes()
    row += bytes(layout.row_bytes - len(row))
    for serde in serdes:
        payload, back = memoryview(b"".join(serde.encode(memoryview(row)))), memoryview(bytearray(len(row)))
        received = serde.receive(back)
        received[0][: payload.nbytes] = payload
        serde.decode(received, payload.nbytes, back)
        assert (back == row) is serde.lossless
        assert serde.lossless or any(back)
    assert len({serde.tag for serde in serdes}) == len(serdes)
    assert {serde.tag for serde in readable_serdes()} == {serde.tag for serde in serdes if serde.lossless}


def config_of(tmp_path, text):
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(text)
    return load_config(path=str(path), environ={})


DISK, REMOTE = "local_disk: /kv\nlocal_disk_serde: {}\n", "remote_url: lm://h:1\nremote_serde: {}\n"
ENGINES = {
    "": [DISK.format("lossless"), DISK.format("naive") + REMOTE.format("lossless"), "remote_serde: fp8\n"],
    "fp8": [DISK.format("fp8"), DISK.format("naive") + REMOTE.format("fp8"), REMOTE.format("fp8")],
    "host fp8": ["extra_config: {host_kv_dtype: fp8}\n" + DISK.format("lossless")],
    "fp8+int8": [DISK.format("fp8") + REMOTE.format("int8")],
    "cachegen (128.0, 48.0, 32.0) (64.0, 16.0, 10.0)": [REMOTE.format("cachegen")],
    "cachegen (128.0, 48.0, 32.0) (9.0,)": [REMOTE.format("cachegen") + "extra_config: {cachegen_value_bins: 9}\n"],
}


@pytest.mark.parametrize("expected", ENGINES)
def test_loss_of_an_engine_is_that_of_all_its_tiers(tmp_path, expected):
    assert {loss(config_of(tmp_path, text)) for text in ENGINES[expected]} == {expected}


@pytest.mark.parametrize(("before", "after"), [("naive", "fp8"), ("fp8", "lossless"), ("fp8", "int8")])
def test_running_engine_does_not_change_its_loss(tmp_path, before, after):
    changed = [config_of(tmp_path, REMOTE.format(name)) for name in (before, after)]
    far = FarTiers(
        config_of(tmp_path, "chunk_size: 256"),
        memoryview(b""),
        serde_of=None,
        num_rows=1,
        flush_timeout_s=1.0,
        make_tier=None,
        pool=None,
    )
    with pytest.raises(ConfigError, match=rf"remote_serde: {after}: a remote store with another loss.*needs a restart"):
        far.prepare(*changed)


def test_tiers_are_opened_with_the_serdes_they_were_told(tmp_path):
    config = config_of(tmp_path, f"local_disk: {tmp_path}\nlocal_disk_serde: lossless\nremote_url: lm://127.0.0.1:1\n")
    opened = []

    def serde_of(name, origin):
        opened.append((name, origin))
        return NaiveSerde()

    open_disk(config, serde_of)
    open_remote(config, serde_of)
    path = tmp_path / "lmcache_config.yaml"
    assert opened == [("lossless", f"{path}:2: local_disk_serde"), ("naive", "default: remote_serde")]
