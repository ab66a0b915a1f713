"""What a page of keys and values holds, as far as quantising it needs to know; csrc/pages_fp8.h draws it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

from lmcache_ext.ops.layout import DTYPES, ELEMENT_BYTES, Dtype
from lmcache_ext.ops.table import PageTable

_ALIGN = 64  # kPartAlign in csrc/pages_fp8.h
_SCALE_BYTES = 4
_MOST_ELEMENTS = 2**31


class Struct(ctypes.Structure):
    """`kvx_page_shape` in csrc/pages_fp8.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("dtype", "heads", "runs", "k_run", "v_run", "heads_first")]


@dataclass(frozen=True)
class PageShape:
    """One layer's page of one block. Raises ValueError for one that cannot be.

    Of each of `heads` heads it has `runs` runs of `k_run` elements of keys, then `v_run` elements of values. A run is
    a token; or all tokens of a head, in an order of the instruction set's own, where keys do not mix with values.
    """

    dtype: Dtype
    heads: int
    runs: int
    k_run: int
    v_run: int
    heads_first: bool  # whether the runs of a head lie side by side; else those of all heads do
    struct: Struct = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype}, expected one of {DTYPES}")
        sizes = (self.heads, self.runs, self.k_run, self.v_run)
        if min(sizes) < 1 or self.elements >= _MOST_ELEMENTS:
            raise ValueError(f"heads, runs, k_run, v_run: {sizes}, expected at least 1 and less than 2^31 elements")
        struct = Struct(DTYPES.index(self.dtype), *sizes, self.heads_first)
        object.__setattr__(self, "struct", struct)

    @property
    def elements(self) -> int:
        return self.heads * self.runs * (self.k_run + self.v_run)

    @property
    def page_bytes(self) -> int:
        return self.elements * ELEMENT_BYTES[self.dtype]

    @property
    def scale_bytes(self) -> int:
        """Of the scales before the codes of a part, padding included."""
        return _aligned(2 * _SCALE_BYTES * self.heads)

    @property
    def part_bytes(self) -> int:
        """Of a row, which this page takes as a byte for each element."""
        return self.scale_bytes + _aligned(self.elements)

    def row_bytes(self, num_bytes: int) -> int:
        """Bytes of a row that so many bytes of pages take. Raises ValueError where they are no whole pages."""
        pages, rest = divmod(num_bytes, self.page_bytes)
        if rest:
            raise ValueError(f"{num_bytes} bytes are no whole number of pages of {self.page_bytes} bytes")
        return pages * self.part_bytes

    def block_bytes(self, table: PageTable) -> int:
        """Bytes that one block takes in a row: its pages in all tensors together."""
        return sum(self.row_bytes(tensor.page_bytes) for tensor in table.tensors)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN
