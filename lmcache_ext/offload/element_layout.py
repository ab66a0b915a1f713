"""Where keys and values lie in a row or a page, for what must know; and where nobody can say, why not.

The connector sees vLLM's configuration of the KV cache, the spec sees the rows: `describe` runs in the
first and hands plain values over in the connector's settings, `row_layout` runs in the second.

On CPU the bytes of a page are an instruction set's own: keys transposed or in pairs for its matrix
tiles. It is a permutation within one head of one block, and which one is asked of the operator that
writes them (`_cpu_places`), so that a new packing is understood, or seen to be none, without a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, SlidingWindowSpec

from lmcache_ext.ops.layout import ELEMENT_BYTES, Int32s, Layout, dense_cells, token_rows
from lmcache_ext.ops.page_shape import PageShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

KV_PAGES = "lmcache_ext.kv_pages"
"""Connector setting: what `describe` found, for the spec."""

_HEADS_FIRST, _TOKENS_FIRST = ("LBHNC", "BLHNC"), ("LBNHC", "BLNHC")
_TENSOR_OF_EACH_LAYER = ("LBHNC", "LBNHC")  # else one tensor, whose page has all layers


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> dict[str, Any]:
    """The pages of one worker in plain values, or ``{"opaque": reason}``."""
    reason = _why_opaque(vllm_config, kv_cache_config)
    if reason is not None:
        return {"opaque": reason}
    (group,) = kv_cache_config.kv_cache_groups
    spec: Any = group.kv_cache_spec
    isa = None
    if current_platform.is_cpu():
        isa = _get_attn_isa(spec.dtype, spec.block_size, spec.head_size, vllm_config.cache_config.cache_dtype)
    return {
        "dtype": str(spec.dtype).removeprefix("torch."),
        "layers": len(group.layer_names),
        "heads": spec.num_kv_heads,
        "tokens": spec.block_size,
        "k_dim": spec.head_size,
        "v_dim": spec.head_size_v,
        "order": kv_cache_config.kv_cache_layout,
        "isa": isa,
    }


def row_layout(
    pages: Mapping[str, Any],
    *,
    row_bytes: int,
    rank_bytes: int,
    ranks: int,
    blocks: int,
    tensors_first: bool = False,
) -> tuple[Layout | None, str]:
    """The layout of rows, `rank_bytes` of each rank side by side; or None and the reason why it is unknown.

    `tensors_first`: a rank's part has all blocks of one tensor and then those of the next, as vLLM's own copier leaves
    it, and not one page of every tensor for each block, as ours do.
    """
    if "opaque" in pages:
        return None, pages["opaque"]
    dims = (pages["k_dim"], pages["v_dim"])
    token_elements = sum(dims)
    element_bytes = ELEMENT_BYTES[pages["dtype"]]
    page_bytes = pages["heads"] * pages["tokens"] * token_elements * element_bytes
    if pages["layers"] * page_bytes * blocks != rank_bytes:
        return None, f"pages of {page_bytes} bytes do not add up to the {rank_bytes} bytes of a rank's part"
    heads_first = pages["order"] in _HEADS_FIRST
    places = _places(pages, heads_first)
    if places is None:
        return None, _no_permutation(pages)
    cells = dense_cells(
        layers=pages["layers"],
        ranks=ranks,
        heads=pages["heads"],
        blocks=blocks,
        rank_bytes=rank_bytes,
        page_bytes=page_bytes,
        head_bytes=token_elements * element_bytes * (pages["tokens"] if heads_first else 1),
        layers_first=tensors_first and pages["order"] in _TENSOR_OF_EACH_LAYER,
    )
    return Layout(row_bytes, pages["dtype"], cells, *places), ""


def page_shape(pages: Mapping[str, Any]) -> tuple[PageShape | None, str]:
    """What of a layer's page are keys and what values, for rows in eight bits; or None and why that is unknown."""
    if "opaque" in pages:
        return None, pages["opaque"]
    heads_first = pages["order"] in _HEADS_FIRST
    if _places(pages, heads_first) is None:
        return None, _no_permutation(pages)
    tokens, k_dim, v_dim = pages["tokens"], pages["k_dim"], pages["v_dim"]
    if pages["isa"] is None:
        return PageShape(pages["dtype"], pages["heads"], tokens, k_dim, v_dim, heads_first), ""
    return PageShape(pages["dtype"], pages["heads"], 1, tokens * k_dim, tokens * v_dim, heads_first), ""


def _no_permutation(pages: Mapping[str, Any]) -> str:
    return f"the CPU's attention ({pages['isa']}) packs pages in a way that is no permutation"


def _why_opaque(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    parallel, groups = vllm_config.parallel_config, kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"this model has {len(groups)} kinds of KV pages, and a row may hold any of them"
    spec = groups[0].kv_cache_spec
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
        return f"pages of {type(spec).__name__} are not keys and values of heads"
    if spec.kv_quant_mode != KVQuantMode.NONE or str(spec.dtype).removeprefix("torch.") not in ELEMENT_BYTES:
        return f"the KV cache is quantised already ({vllm_config.cache_config.cache_dtype})"
    if spec.page_size_padded is not None or spec.num_head_slots is not None or spec.state_content_bytes is not None:
        return "pages are padded or hold more than keys and values"
    if parallel.pipeline_parallel_size != 1:
        return "with pipeline parallelism the ranks' layers differ"
    if parallel.decode_context_parallel_size != 1 or parallel.prefill_context_parallel_size != 1:
        return "with context parallelism the ranks' tokens differ"
    if kv_cache_config.kv_cache_layout not in (*_HEADS_FIRST, *_TOKENS_FIRST):
        return f"pages of layout {kv_cache_config.kv_cache_layout} are scattered"
    return None


def _places(pages: Mapping[str, Any], heads_first: bool) -> tuple[Int32s, Int32s] | None:
    tokens, k_dim, v_dim = pages["tokens"], pages["k_dim"], pages["v_dim"]
    if pages["isa"] is not None:
        return _cpu_places(getattr(torch, pages["dtype"]), tokens, k_dim, pages["isa"]) if k_dim == v_dim else None
    stride = (k_dim + v_dim) * (1 if heads_first else pages["heads"])
    keys = token_rows(tokens, k_dim, token_elements=stride, first=0)
    return keys, token_rows(tokens, v_dim, token_elements=stride, first=k_dim)


def _cpu_places(dtype: torch.dtype, tokens: int, dim: int, isa: str) -> tuple[Int32s, Int32s] | None:
    """Where vLLM's operator puts each element of a block's head, found by writing its coordinates there."""
    coordinates = np.ogrid[0:tokens, 0:dim]
    token_of, dim_of = (_packed(dtype, np.broadcast_to(axis + 1, (tokens, dim)), isa) for axis in coordinates)
    places = []
    for part in (0, 1):  # keys, values: each in its half of the cell
        target = (token_of[part].astype(np.int64) - 1) * dim + dim_of[part] - 1
        if not np.array_equal(np.sort(target), np.arange(tokens * dim)):
            return None
        places.append(part * tokens * dim + np.argsort(target))
    k_index, v_index = (np.ascontiguousarray(place.reshape(tokens, dim), dtype=np.int32) for place in places)
    return k_index, v_index


def _packed(dtype: torch.dtype, values: np.ndarray[Any, Any], isa: str) -> np.ndarray[Any, Any]:
    """`values` (tokens, dim) as bit patterns of `dtype`, as the operator packs them: (2, tokens * dim)."""
    tokens, dim = values.shape
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    vectors = (
        torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(bits).view(dtype).reshape(tokens, 1, dim)
    )
    cell = torch.zeros(1, 1, 2 * tokens, dim, dtype=dtype)
    keys, cached_values = cell.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(vectors, vectors.clone(), keys, cached_values, torch.arange(tokens), isa)
    found: np.ndarray[Any, Any] = cell.view(bits).reshape(2, -1).numpy()
    return found
