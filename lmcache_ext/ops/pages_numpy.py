"""The plain twin of csrc/pages.cpp: same arguments, same answers, same bytes.

It runs where the compiled library is missing, and the tests hold the two against
each other bit for bit. Addresses come from a ``PageTable``; both functions check
everything before the first byte moves and return bytes copied, ``-(1 + i)`` for
the first bad block ``i`` or ``-(1 + n + j)`` for the first bad tensor ``j``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np

from lmcache_ext.ops.table import Bytes, Int64s, PageTable, PageTensor


def gather_pages(table: PageTable, block_ids: Int64s, rows: Bytes, row_offsets: Int64s) -> int:
    """Copy the pages of each block, tensor after tensor, to its offset in ``rows``."""
    violation = first_violation(table, block_ids, rows, row_offsets, block_bytes=table.block_bytes)
    if violation:
        return violation
    for page, in_row in _pairs(table, block_ids, rows, row_offsets):
        in_row[:] = page
    return len(block_ids) * table.block_bytes


def scatter_pages(table: PageTable, block_ids: Int64s, rows: Bytes, row_offsets: Int64s) -> int:
    """Copy the other way: from each offset in ``rows`` to the pages of its block."""
    violation = first_violation(table, block_ids, rows, row_offsets, block_bytes=table.block_bytes)
    if violation:
        return violation
    for page, in_row in _pairs(table, block_ids, rows, row_offsets):
        page[:] = in_row
    return len(block_ids) * table.block_bytes


def _pairs(table: PageTable, block_ids: Int64s, rows: Bytes, row_offsets: Int64s) -> Iterator[tuple[Bytes, Bytes]]:
    pools = [pool_of(tensor) for tensor in table.tensors]
    for block_id, offset in zip(block_ids.tolist(), row_offsets.tolist(), strict=True):
        for tensor, pool in zip(table.tensors, pools, strict=True):
            start = block_id * tensor.block_stride_bytes
            yield pool[start : start + tensor.page_bytes], rows[offset : offset + tensor.page_bytes]
            offset += tensor.page_bytes


def pool_of(tensor: PageTensor) -> Bytes:
    """All bytes of a tensor, from its first page to its last."""
    size_bytes = (tensor.num_blocks - 1) * tensor.block_stride_bytes + tensor.page_bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(tensor.data_ptr))


def first_violation(table: PageTable, block_ids: Int64s, rows: Bytes, row_offsets: Int64s, *, block_bytes: int) -> int:
    """0, or the answer for the first block that is outside its tensors or, with so many bytes, the rows."""
    # A PageTable has checked its tensors, so only blocks can be bad here.
    outside = (
        (block_ids < 0) | (block_ids >= table.num_blocks) | (row_offsets < 0) | (row_offsets > rows.size - block_bytes)
    )
    return -(1 + int(outside.argmax())) if outside.any() else 0
