"""Where the KV pages of one cache group lie in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class PageTensor(NamedTuple):
    """One paged KV tensor: block ``i`` has its page at ``data_ptr + i * block_stride_bytes``."""

    data_ptr: int
    num_blocks: int
    block_stride_bytes: int
    page_bytes: int


@dataclass(frozen=True, eq=False)
class PageTable:
    """The KV tensors of one cache group on this worker, in the order their pages take in a row.

    The table holds addresses, not references: whoever owns the tensors keeps them
    alive for as long as copies run. Raises ``ValueError`` for a tensor that cannot be.
    """

    tensors: tuple[PageTensor, ...]
    # (num_tensors, 4) int64, rows laid out as `kvx_tensor` in csrc/pages.cpp
    layout: Int64s = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("tensors: 0 given, a page table needs at least 1")
        for index, tensor in enumerate(self.tensors):
            _check_tensor(index, tensor)
        layout = np.array(self.tensors, dtype=np.int64).reshape(len(self.tensors), 4)
        layout.setflags(write=False)
        object.__setattr__(self, "layout", layout)

    @classmethod
    def of(cls, tensors: Iterable[tuple[int, int, int, int]]) -> PageTable:
        """Build from (data_ptr, num_blocks, block_stride_bytes, page_bytes) of each tensor."""
        return cls(tuple(PageTensor(*map(int, tensor)) for tensor in tensors))

    @property
    def block_bytes(self) -> int:
        """Bytes one block takes in a row: its pages in all tensors together."""
        return sum(tensor.page_bytes for tensor in self.tensors)

    @property
    def num_blocks(self) -> int:
        """Block ids every tensor has: ``[0, num_blocks)``."""
        return min(tensor.num_blocks for tensor in self.tensors)


class Part(NamedTuple):
    """Blocks of one cache group, and where in the rows they lie (bytes)."""

    table: PageTable
    block_ids: Int64s
    offsets: Int64s


def _check_tensor(index: int, tensor: PageTensor) -> None:
    name = f"tensor {index}"
    if tensor.data_ptr <= 0:
        raise ValueError(f"{name}: data_ptr is {tensor.data_ptr}, expected an address")
    if tensor.num_blocks <= 0 or tensor.page_bytes <= 0:
        raise ValueError(f"{name}: {tensor.num_blocks} blocks of {tensor.page_bytes} bytes, expected at least 1 of 1")
    if not 0 <= tensor.num_blocks * tensor.block_stride_bytes < 2**63:
        raise ValueError(
            f"{name}: {tensor.num_blocks} blocks with a stride of {tensor.block_stride_bytes} bytes"
            " span more than memory, or less than none"
        )
    if tensor.num_blocks > 1 and tensor.page_bytes > tensor.block_stride_bytes:
        raise ValueError(
            f"{name}: a page of {tensor.page_bytes} bytes does not fit the block stride"
            f" of {tensor.block_stride_bytes} bytes"
        )
