"""Checks the codecs' CUDA kernels against their twins on a real GPU, then times them.

Run: ``python benchmarks/gpu/codecs.py [--chunks 16]`` on a machine with an NVIDIA GPU, torch, NumPy, nvcc and this
checkout; nothing else is needed. It builds the library where it is missing. Checked, for every codec: payloads and rows
bit for bit over dtypes and shapes, bytes between the elements, and that damaged payloads are refused as the twin
refuses them. The twins are the codecs of hosts, in C++, which the tests hold against NumPy's; they are built too.

GB/s count raw bytes of KV in the GPU's memory, for one chunk of 256 tokens and for several in one call. Target:
cachegen encodes and decodes at 20 GB/s or more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import device as devices
from lmcache_ext.errors import FrameError
from lmcache_ext.ops import cachegen, cachegen_cuda, fixed, fixed_cuda, fixed_numpy
from lmcache_ext.ops.chunks_cuda import Chunk, Memory
from lmcache_ext.ops.layout import DTYPES, ELEMENT_BYTES, Dtype, Layout, dense_cells, token_rows
from lmcache_ext.serde.cachegen import bins_by_layer

TARGET_GB_S = 20.0
KEY_BINS, VALUE_BINS = (128.0, 48.0, 32.0), (64.0, 16.0, 10.0)  # the defaults of the serde
DAMAGED = 100  # payloads of each codec, some of them decoded to other rows all the same


@dataclass(frozen=True)
class Shape:
    """Of a chunk: `blocks` of `block_tokens`; heads are split in `ranks`, each with `gap` bytes behind its pages."""

    name: str
    layers: int
    heads: int
    k_dim: int
    v_dim: int
    blocks: int
    block_tokens: int = 16
    ranks: int = 1
    gap: int = 0

    def layout(self, dtype: Dtype) -> Layout:
        """Keys of all tokens of a page, then its values, as most attention kernels on GPUs want it."""
        heads, size = self.heads // self.ranks, ELEMENT_BYTES[dtype]
        page = self.block_tokens * heads * (self.k_dim + self.v_dim)
        pages_bytes = self.blocks * self.layers * page * size
        rank_bytes = pages_bytes + self.gap
        values = self.block_tokens * heads * self.k_dim
        same = self.k_dim == self.v_dim
        cells = dense_cells(
            layers=self.layers,
            ranks=self.ranks,
            heads=heads,
            blocks=self.blocks,
            rank_bytes=rank_bytes,
            page_bytes=page * size,
            head_bytes=self.k_dim * size if same else 0,
        )
        if not same:  # one head only: keys and values have no stride in common
            assert heads == 1
        keys = token_rows(self.block_tokens, self.k_dim, token_elements=heads * self.k_dim, first=0)
        index = token_rows(self.block_tokens, self.v_dim, token_elements=heads * self.v_dim, first=values)
        return Layout(self.ranks * rank_bytes, dtype, cells, keys, index)


CHECKED = (
    Shape("a chunk of 256 tokens", layers=2, heads=8, k_dim=128, v_dim=128, blocks=16),
    Shape("a partial chunk", layers=2, heads=4, k_dim=64, v_dim=64, blocks=3),
    Shape("one block", layers=1, heads=1, k_dim=64, v_dim=64, blocks=1),
    Shape("tokens that are no multiple of 32", layers=3, heads=2, k_dim=80, v_dim=80, blocks=5, block_tokens=7),
    Shape("keys and values of other lengths", layers=2, heads=2, k_dim=192, v_dim=128, blocks=4, ranks=2),
    Shape("ranks with a gap between them", layers=2, heads=4, k_dim=96, v_dim=96, blocks=4, ranks=2, gap=64),
)
TINY = (Shape("tiny", layers=2, heads=2, k_dim=8, v_dim=8, blocks=2),)
TIMED = Shape("32 layers, 8 heads of 128, 256 tokens", layers=32, heads=8, k_dim=128, v_dim=128, blocks=16)


def rows_like_kv(layout: Layout, count: int, seed: int = 0) -> list[bytes]:
    """Rows of channels that have means of their own and drift from token to token, a few elements far out."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        row = np.frombuffer(bytearray(rng.bytes(layout.row_bytes)), dtype=np.uint8)
        for cell in layout.cells.reshape(-1).tolist():
            for index in (layout.k_index, layout.v_index):
                x = rng.normal(size=index.shape) + 0.3 * rng.normal(size=index.shape).cumsum(axis=0)
                x += 4 * rng.normal(size=index.shape[1]) + np.where(rng.random(index.shape) < 1e-3, 200, 0)
                fixed_numpy.store_plane(layout, row, cell, index, x.astype(np.float32))
        rows.append(row.tobytes())
    return rows


class Codec:
    """One codec on the GPU and its twin on the host."""

    def __init__(self, name: str, layout: Layout, device: str, chunks: int) -> None:
        self.name, self.layout, self.device = name, layout, device
        self.bins = bins_by_layer(layout.layers, KEY_BINS, VALUE_BINS)
        self.is_cachegen = name == "cachegen"
        tables = cachegen_cuda.tables(layout, self.bins) if self.is_cachegen else fixed_cuda.tables(layout)
        scratch = [cachegen_cuda.scratch_bytes(layout, encodes=encodes) for encodes in (True, False)]
        self.tables = torch.from_numpy(tables.copy()).to(device)
        self.results = torch.zeros(chunks, dtype=torch.int64, device=device)
        self.scratch = torch.empty(max(scratch) * chunks if self.is_cachegen else 0, dtype=torch.uint8, device=device)
        self.room = cachegen.bound(layout) if self.is_cachegen else fixed.payload_bytes(layout, name)
        self.memory = Memory(
            self.tables.data_ptr(), self.results.data_ptr(), self.scratch.data_ptr(), self.scratch.numel()
        )

    def encode(self, rows: Sequence[torch.Tensor], payloads: Sequence[torch.Tensor]) -> None:
        chunks = [Chunk(row.data_ptr(), out.data_ptr(), self.room) for row, out in zip(rows, payloads, strict=True)]
        if self.is_cachegen:
            cachegen_cuda.encode(self.layout, self.memory, chunks, stream=self.stream)
        else:
            fixed_cuda.encode(self.layout, self.name, self.memory, chunks, stream=self.stream)

    def decode(self, payloads: Sequence[torch.Tensor], lengths: Sequence[int], rows: Sequence[torch.Tensor]) -> None:
        parts = zip(rows, payloads, lengths, strict=True)
        chunks = [Chunk(row.data_ptr(), payload.data_ptr(), length) for row, payload, length in parts]
        if self.is_cachegen:
            cachegen_cuda.decode(self.layout, self.memory, chunks, stream=self.stream)
        else:
            fixed_cuda.decode(self.layout, self.name, self.memory, chunks, stream=self.stream)

    @property
    def stream(self) -> int:
        return devices.stream_of(self.device)

    def refusal(self, result: int, payload_bytes: int) -> FrameError | None:
        if self.is_cachegen:
            return cachegen_cuda.refusal(result, payload_bytes)
        return fixed_cuda.refusal(self.layout, self.name, result, payload_bytes)

    def twin_payload(self, row: bytes) -> bytes:
        if self.is_cachegen:
            return bytes(cachegen.encode(self.layout, self.bins, memoryview(row)))
        return bytes(fixed.encode(self.layout, self.name, memoryview(row)))

    def twin_row(self, payload: bytes, before: bytes) -> bytes | FrameError:
        row = bytearray(before)
        try:
            if self.is_cachegen:
                cachegen.decode(self.layout, memoryview(payload), memoryview(row))
            else:
                fixed.decode(self.layout, self.name, memoryview(payload), memoryview(row))
        except FrameError as error:
            return error
        return bytes(row)


CODECS = ("cachegen", *fixed.SCHEMES)


def on(device: str, content: bytes, *, odd: bool = False) -> torch.Tensor:
    """The bytes on the device; at an odd address if wanted, as payloads may be."""
    held = torch.empty(len(content) + odd, dtype=torch.uint8, device=device)[int(odd) :]
    held.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return held


def check_coding(codec: Codec, rows: list[bytes], before: bytes) -> list[bytes]:
    """Payloads and rows bit for bit, and not a byte beyond; returns the payloads."""
    expected = [codec.twin_payload(row) for row in rows]
    payloads = [on(codec.device, b"\xa5" * codec.room, odd=i % 2 == 1) for i in range(len(rows))]
    codec.encode([on(codec.device, row) for row in rows], payloads)
    lengths = codec.results[: len(rows)].tolist()
    assert lengths == [len(payload) for payload in expected], "lengths of payloads differ from the twin's"
    for payload, twin in zip(payloads, expected, strict=True):
        assert payload.cpu().numpy().tobytes() == twin.ljust(codec.room, b"\xa5"), "a payload differs from the twin's"
    targets = [on(codec.device, before) for _ in rows]
    codec.decode(payloads, lengths, targets)
    assert not codec.results[: len(rows)].any(), "an honest payload was refused"
    for target, twin in zip(targets, expected, strict=True):
        assert target.cpu().numpy().tobytes() == codec.twin_row(twin, before), "a row differs from the twin's"
    return expected


def damaged(honest: bytes, count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        payload = bytearray(honest)
        at = int(rng.integers(0, len(payload) if rng.random() < 0.5 else min(200, len(payload))))
        kind = rng.integers(0, 4)
        if kind == 0:
            payload[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            payload[at] = int(rng.integers(0, 256))
        elif kind == 2:
            del payload[at + 1 :]
        else:
            payload.insert(at, int(rng.integers(0, 256)))
        yield bytes(payload)


def check_hostile(codec: Codec, honest: bytes, before: bytes) -> int:
    """Damaged payloads, all in one call, with an honest one last; how many were refused."""
    payloads = [*damaged(honest, DAMAGED), honest]
    targets = [on(codec.device, before) for _ in payloads]
    held = [on(codec.device, payload) for payload in payloads]
    codec.decode(held, [len(payload) for payload in payloads], targets)
    refused = 0
    for payload, target, result in zip(payloads, targets, codec.results.tolist(), strict=True):
        answer, row = codec.refusal(result, len(payload)), target.cpu().numpy().tobytes()
        twin = codec.twin_row(payload, before)
        assert type(answer) is type(twin) if isinstance(twin, FrameError) else answer is None, "another refusal"
        assert row == (before if isinstance(twin, FrameError) else twin), "another row than the twin's"
        refused += answer is not None
    return refused


def check(shape: Shape, dtype: Dtype, device: str) -> str:
    layout = shape.layout(dtype)
    rows, before = rows_like_kv(layout, 3), np.random.default_rng(2).bytes(layout.row_bytes)
    refused = []
    for name in CODECS:
        codec = Codec(name, layout, device, DAMAGED + 1)
        payloads = check_coding(codec, rows, before)
        refused.append(check_hostile(codec, payloads[0], before))
    return f"{shape.name}, {dtype}; of {DAMAGED} damaged payloads refused: {', '.join(map(str, refused))}"


def time_codec(name: str, shape: Shape, chunks: int, device: str) -> bool:
    """Print one row of the table; whether it reaches the target, where it has one."""
    layout = shape.layout("bfloat16")
    codec = Codec(name, layout, device, chunks)
    (row,) = rows_like_kv(layout, 1)
    rows = [on(device, row) for _ in range(chunks)]
    payloads = [torch.empty(codec.room, dtype=torch.uint8, device=device) for _ in rows]
    raw = chunks * layout.row_bytes
    encode = raw / devices.seconds(lambda: codec.encode(rows, payloads), device) / 1e9
    lengths = codec.results.tolist()
    decode = raw / devices.seconds(lambda: codec.decode(payloads, lengths, rows), device) / 1e9
    assert not codec.results.any(), "a payload was refused"
    print(f"| {name} | {chunks} | {layout.row_bytes / lengths[0]:.2f} | {encode:.1f} | {decode:.1f} |", flush=True)
    return name != "cachegen" or min(encode, decode) >= TARGET_GB_S


def ready(device: str) -> str | None:
    """Why nothing can be run here, or None. Builds the twins, too, where they were not built yet."""
    reason = devices.ready(device, [cachegen_cuda, fixed_cuda])
    if reason is None and not (cachegen.available() and fixed.available()):
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=devices.ROOT, check=False)
        cachegen._library.cache_clear(), fixed._library.cache_clear()
        if not (cachegen.available() and fixed.available()):
            return "the codecs of hosts, which are the twins, were not built: no C++ compiler, or no setuptools?"
    return reason


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=16, help="in the larger calls that are timed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (reason := ready(options.device)) is not None:
        print(reason, file=sys.stderr)
        return 2
    cuda = options.device == "cuda"
    print(devices.describe(options.device))
    with devices.on_a_stream(options.device):
        for shape in CHECKED if cuda else TINY:
            for dtype in DTYPES:
                print(f"  as the twin: {check(shape, dtype, options.device)}", flush=True)
        shape = TIMED if cuda else TINY[0]
        print(f"\n{shape.name}, bfloat16\n")
        print("| codec | chunks in a call | ratio | encode, GB/s | decode, GB/s |")
        print("|---|---|---|---|---|")
        counts = sorted({1, options.chunks})
        reached = [time_codec(name, shape, chunks, options.device) for name in CODECS for chunks in counts]
    print()
    calls = " and ".join(map(str, counts))
    target = f"cachegen writes and reads {TARGET_GB_S:.0f} GB/s of KV in calls of {calls} chunks"
    return 0 if devices.judged(target, all(reached)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
