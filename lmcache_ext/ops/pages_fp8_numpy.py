"""The plain twin of csrc/pages_fp8.cpp: same arguments, same answers, same bytes. For tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lmcache_ext.ops.fixed_numpy import Floats, from_bfloat16, from_e4m3, to_bfloat16, to_e4m3
from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.pages_numpy import first_violation, pool_of
from lmcache_ext.ops.table import Bytes, Int64s, PageTable


def gather_pages(shape: PageShape, table: PageTable, block_ids: Int64s, rows: Bytes, row_offsets: Int64s) -> int:
    """Quantise the pages of each block, tensor after tensor, into its place in ``rows``."""
    block_bytes = shape.block_bytes(table)
    violation = first_violation(table, block_ids, rows, row_offsets, block_bytes=block_bytes)
    if violation:
        return violation
    for page, part in _pairs(shape, table, block_ids, rows, row_offsets):
        part[:] = encode(shape, page)
    return len(block_ids) * block_bytes


def scatter_pages(shape: PageShape, table: PageTable, block_ids: Int64s, rows: Bytes, row_offsets: Int64s) -> int:
    """Restore the pages of each block from its place in ``rows``."""
    block_bytes = shape.block_bytes(table)
    violation = first_violation(table, block_ids, rows, row_offsets, block_bytes=block_bytes)
    if violation:
        return violation
    for page, part in _pairs(shape, table, block_ids, rows, row_offsets):
        page[:] = decode(shape, part)
    return len(block_ids) * block_bytes


def encode(shape: PageShape, page: Bytes) -> Bytes:
    """The part of a row that a page becomes."""
    values = _floats(shape, page)
    scales, codes = np.zeros((shape.heads, 2), dtype="<f4"), np.zeros(shape.elements, dtype=np.uint8)
    for head, column, places in _planes(shape):
        x = values[places]
        scale = np.float32(np.abs(x).max()) / np.float32(448)
        if scale > 2.0**-120:
            scales[head, column] = scale
            codes[places] = to_e4m3(x * (np.float32(1) / scale))
        else:
            codes[places] = to_e4m3(x * np.float32(0))
    part = np.zeros(shape.part_bytes, dtype=np.uint8)
    part[: scales.nbytes] = scales.reshape(-1).view(np.uint8)
    part[shape.scale_bytes :][: shape.elements] = codes
    return part


def decode(shape: PageShape, part: Bytes) -> Bytes:
    """The page that a part of a row becomes."""
    scales = part[: 8 * shape.heads].view("<f4").reshape(shape.heads, 2)
    codes, values = part[shape.scale_bytes :], np.zeros(shape.elements, dtype=np.float32)
    for head, column, places in _planes(shape):
        with np.errstate(over="ignore", invalid="ignore"):
            values[places] = _tame(from_e4m3(codes[places]) * _tame(scales[head, column]))
    return _elements(shape, values)


def _planes(shape: PageShape) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """(head, 0 for keys and 1 for values, places of its elements in the page)."""
    run = shape.k_run + shape.v_run
    order = (shape.heads, shape.runs, run) if shape.heads_first else (shape.runs, shape.heads, run)
    places = np.arange(shape.elements).reshape(order)
    for head in range(shape.heads):
        of_head = places[head] if shape.heads_first else places[:, head]
        yield head, 0, of_head[:, : shape.k_run].reshape(-1)
        yield head, 1, of_head[:, shape.k_run :].reshape(-1)


def _floats(shape: PageShape, page: Bytes) -> Floats:
    if shape.dtype == "bfloat16":
        return _tame(from_bfloat16(page.view("<u2")))
    return _tame(page.view("<f4" if shape.dtype == "float32" else "<f2").astype(np.float32))


def _elements(shape: PageShape, values: Floats) -> Bytes:
    if shape.dtype == "bfloat16":
        return to_bfloat16(values).view(np.uint8)
    if shape.dtype == "float16":
        return np.clip(values, -65504, 65504).astype("<f2").view(np.uint8)
    return values.astype("<f4").view(np.uint8)


def _tame(values: npt.ArrayLike) -> Floats:
    return np.where(np.isfinite(values), values, np.float32(0)).astype(np.float32)


def _pairs(
    shape: PageShape, table: PageTable, block_ids: Int64s, rows: Bytes, row_offsets: Int64s
) -> Iterator[tuple[Bytes, Bytes]]:
    """Each layer's page, and its part of a row."""
    pools = [pool_of(tensor) for tensor in table.tensors]
    for block_id, offset in zip(block_ids.tolist(), row_offsets.tolist(), strict=True):
        for tensor, pool in zip(table.tensors, pools, strict=True):
            first = block_id * tensor.block_stride_bytes
            for start in range(first, first + tensor.page_bytes, shape.page_bytes):
                yield pool[start : start + shape.page_bytes], rows[offset : offset + shape.part_bytes]
                offset += shape.part_bytes
