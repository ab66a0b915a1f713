"""What the bytes of a row are: where each key and each value lies, and of which dtype."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lmcache_ext.ops.table import Int64s

Int32s = npt.NDArray[np.int32]
Dtype = Literal["float32", "float16", "bfloat16"]

DTYPES: tuple[Dtype, ...] = get_args(Dtype)  # in the order of kvx::Dtype
ELEMENT_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class Struct(ctypes.Structure):
    """`kvx_layout` in csrc/elements.h."""

    _fields_ = [
        ("row_bytes", ctypes.c_int64),
        ("cells", ctypes.c_void_p),
        ("k_index", ctypes.c_void_p),
        ("v_index", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("dtype", "layers", "heads", "blocks", "tokens", "k_dim", "v_dim")),
    ]


@dataclass(frozen=True, eq=False)
class Layout:
    """Cells of keys and values in a row; see csrc/elements.h. Raises ValueError for one that leaves the row.

    `cells`: int64 (layers, heads, blocks), bytes from the row's beginning; heads of all ranks.
    `k_index`: int32 (tokens, k_dim), elements from the cell's beginning; `v_index` likewise.
    """

    row_bytes: int
    dtype: Dtype
    cells: Int64s
    k_index: Int32s
    v_index: Int32s
    struct: Struct = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype}, expected one of {DTYPES}")
        for name, array, axes in (("cells", self.cells, 3), ("k_index", self.k_index, 2), ("v_index", self.v_index, 2)):
            if array.ndim != axes or not array.size or not array.flags.c_contiguous:
                raise ValueError(f"{name}: shape {array.shape}, expected {axes} contiguous axes of at least 1")
        if self.k_index.shape[0] != self.v_index.shape[0]:
            raise ValueError(f"v_index: {self.v_index.shape[0]} tokens, k_index has {self.k_index.shape[0]}")
        size = ELEMENT_BYTES[self.dtype]
        last = max(int(self.k_index.max()), int(self.v_index.max())) * size + size + int(self.cells.max())
        first = min(int(self.k_index.min()), int(self.v_index.min())) * size + int(self.cells.min())
        if first < 0 or last > self.row_bytes:
            raise ValueError(f"elements in bytes [{first}, {last}), outside the row of [0, {self.row_bytes})")
        object.__setattr__(self, "struct", self._struct())

    @property
    def layers(self) -> int:
        return int(self.cells.shape[0])

    @property
    def heads(self) -> int:
        return int(self.cells.shape[1])

    @property
    def blocks(self) -> int:
        return int(self.cells.shape[2])

    @property
    def tokens(self) -> int:
        """Of one block."""
        return int(self.k_index.shape[0])

    @property
    def dims(self) -> tuple[int, int]:
        """Elements of a key and of a value."""
        return int(self.k_index.shape[1]), int(self.v_index.shape[1])

    def _struct(self) -> Struct:
        for array in (self.cells, self.k_index, self.v_index):
            array.setflags(write=False)
        return Struct(
            self.row_bytes,
            self.cells.ctypes.data,
            self.k_index.ctypes.data,
            self.v_index.ctypes.data,
            DTYPES.index(self.dtype),
            *self.cells.shape,
            self.tokens,
            *self.dims,
        )


def dense_cells(
    *,
    layers: int,
    ranks: int,
    heads: int,
    blocks: int,
    rank_bytes: int,
    page_bytes: int,
    head_bytes: int,
    layers_first: bool = False,
) -> Int64s:
    """Cells of rows as the copiers fill them: of each rank, block after block, one page of every layer.

    Or, `layers_first`, layer after layer, one page of every block. `heads` are those of one rank; `head_bytes` is the
    way from one head to the next within a page.
    """
    layer_bytes, block_bytes = (blocks * page_bytes, page_bytes) if layers_first else (page_bytes, layers * page_bytes)
    layer, rank, head, block = np.ogrid[0:layers, 0:ranks, 0:heads, 0:blocks]
    cells = rank * rank_bytes + block * block_bytes + layer * layer_bytes + head * head_bytes
    return np.ascontiguousarray(cells.reshape(layers, ranks * heads, blocks), dtype=np.int64)


def token_rows(tokens: int, dim: int, *, token_elements: int, first: int) -> Int32s:
    """The index of vectors that lie in one piece, `token_elements` from each other."""
    return (first + np.arange(tokens)[:, None] * token_elements + np.arange(dim)[None, :]).astype(np.int32)
