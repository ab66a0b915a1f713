"""Chunks of a model's KV as rows, as the serdes of `benchmarks/serde.py` take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.serde_documents import CHUNK
from lmcache_ext.ops import pages_fp8
from lmcache_ext.ops.layout import Layout, dense_cells, token_rows
from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.table import PageTable


def layout_of(config: LlamaConfig, block: int) -> Layout:
    """Rows of CHUNK tokens of such a model, heads before tokens: vLLM's LBHNC on one rank."""
    layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    head_bytes = block * 2 * dim * 2
    blocks, page_bytes = CHUNK // block, heads * head_bytes
    row_bytes = layers * blocks * page_bytes
    cells = dense_cells(
        layers=layers,
        ranks=1,
        heads=heads,
        blocks=blocks,
        rank_bytes=row_bytes,
        page_bytes=page_bytes,
        head_bytes=head_bytes,
    )
    keys, values = (token_rows(block, dim, token_elements=2 * dim, first=first) for first in (0, dim))
    return Layout(row_bytes, "bfloat16", cells, keys, values)


def to_row(kv: torch.Tensor, block: int) -> bytearray:
    """A chunk (layers, 2, heads, CHUNK, dim) as a row: block, layer, head, token, key then value."""
    layers, _, heads, _, dim = kv.shape
    blocks = kv.reshape(layers, 2, heads, CHUNK // block, block, dim).permute(3, 0, 2, 4, 1, 5)
    return bytearray(blocks.contiguous().view(torch.uint8).numpy().tobytes())


def from_row(row: bytearray, like: torch.Tensor, block: int) -> torch.Tensor:
    layers, _, heads, _, dim = like.shape
    blocks = torch.frombuffer(row, dtype=torch.bfloat16).reshape(CHUNK // block, layers, heads, block, 2, dim)
    return blocks.permute(1, 4, 2, 0, 3, 5).reshape(like.shape)


class HostRows:
    """Rows of eight bits, in the shape of a serde: what the copier makes of the pages of a chunk."""

    def __init__(self, layout: Layout) -> None:
        k_dim, v_dim = layout.dims
        self._shape = PageShape("bfloat16", layout.heads, layout.tokens, k_dim, v_dim, heads_first=True)
        self._layers, self._blocks = layout.layers, layout.blocks
        self._ids = np.arange(layout.blocks, dtype=np.int64)
        self._part_bytes = layout.layers * self._shape.part_bytes

    def encode(self, row: memoryview) -> list[memoryview]:
        out = np.empty(self._blocks * self._part_bytes, dtype=np.uint8)
        pages_fp8.gather_pages(self._shape, self._pages(row), self._ids, out, self._ids * self._part_bytes)
        return [out.data]

    def decode(self, received: Sequence[memoryview], stored_bytes: int, row: memoryview) -> None:
        (rows,) = received
        parts = self._ids * self._part_bytes
        pages_fp8.scatter_pages(self._shape, self._pages(row), self._ids, rows[:stored_bytes], parts)

    def _pages(self, row: memoryview) -> PageTable:
        """The layers of a row as paged tensors, whose blocks are those of the row."""
        begin, page = np.frombuffer(row, dtype=np.uint8).ctypes.data, self._shape.page_bytes
        layers = range(self._layers)
        return PageTable.of((begin + layer * page, self._blocks, self._layers * page, page) for layer in layers)
