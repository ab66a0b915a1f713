"""Where the blocks of a copy lie: in vLLM's tensors, and in rows.

A row's part that one worker owns holds, block after block, one page of every tensor of the group, as it is or as eight
bits for each element (`ops.page_shape`)::

    row r  | worker 0                          | worker 1 ...
           | block 0: t0 t1 .. | block 1: ...  |
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from vllm.v1.kv_offload.base import BlockIDsLoadStoreSpec, CanonicalKVCaches, GPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.table import Bytes, PageTable, Part


class Parts:
    """The tables of one worker's tensors. Owner: whoever has the tensors and the region keeps them alive.

    `shape` None means that rows hold pages as they are.
    """

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        region: SharedOffloadRegion,
        *,
        blocks_per_chunk: int,
        shape: PageShape | None,
    ) -> None:
        self.shape = shape
        self.row_bytes = region._row_stride
        self.begin = region._worker_offset
        self.worker_bytes = region._worker_area_end - region._worker_offset
        self.tables = [_table(kv_caches, group) for group in range(len(kv_caches.group_data_refs))]
        self._blocks_per_chunk = blocks_per_chunk

    def block_bytes(self, table: PageTable) -> int:
        """What a block takes in a row."""
        return table.block_bytes if self.shape is None else self.shape.block_bytes(table)

    def chunk_bytes(self, table: PageTable) -> int:
        """What the blocks of a chunk take in a row."""
        return self.block_bytes(table) * self._blocks_per_chunk

    def of(self, paged: GPULoadStoreSpec, rows: BlockIDsLoadStoreSpec) -> Iterator[Part]:
        """Each cache group's table, its block ids, and the byte offsets of the same blocks in rows."""
        block, row = 0, 0
        for table, size, first in zip(self.tables, paged.group_sizes, paged.block_indices, strict=True):
            if size == 0:
                continue
            skipped = first % self._blocks_per_chunk  # blocks of the first row that this job leaves alone
            places = np.arange(skipped, skipped + size, dtype=np.int64)
            row_of_place = row + places // self._blocks_per_chunk
            row_ids = rows.block_ids[row_of_place].astype(np.int64)
            in_row = self.begin + places % self._blocks_per_chunk * self.block_bytes(table)
            yield Part(table, paged.block_ids[block : block + size].astype(np.int64), row_ids * self.row_bytes + in_row)
            block += size
            row = int(row_of_place[-1]) + 1

    def clear_rest(self, part: Part, rows: Bytes) -> None:
        """Zero what a smaller cache group leaves of its rows: stored bytes must not hold a stranger's KV."""
        used = self.chunk_bytes(part.table)
        if used >= self.worker_bytes:
            return
        for row in np.unique(part.offsets // self.row_bytes).tolist():
            begin = row * self.row_bytes + self.begin
            rows[begin + used : begin + self.worker_bytes] = 0


def _table(kv_caches: CanonicalKVCaches, group: int) -> PageTable:
    tensors = []
    for ref in kv_caches.group_data_refs[group]:
        tensor = kv_caches.tensors[ref.tensor_idx].tensor
        tensors.append((tensor.data_ptr(), tensor.shape[0], tensor.stride(0), ref.page_size_bytes))
    return PageTable.of(tensors)
