"""What each serde costs and saves, on the KV of a small model trained for it: bytes, time and the model's answers.

Run: ``python benchmarks/serde.py [--serdes "fp8;cachegen"] [--curve] [--speeds]``, or ``lmcache-ext serde bench``.
The first run trains the model (`benchmarks/tiny_llama.py`). ``--speeds`` measures speeds alone, which wants a machine
with nothing else to do, and takes the rest from what an earlier run wrote to ``serde.json``.

A document of held-out text is computed once; the KV of its first CONTEXT tokens goes through a serde in chunks of
CHUNK tokens, in bfloat16, and the model reads the CONTINUATION tokens that follow it with what came back. Its
distributions over the next token are held against those with the exact KV (`naive`, the same bfloat16): the mean
Kullback-Leibler divergence in nats, and how often the likeliest token is the same. The yardstick is `fp8`, which is
what people store KV in when they do not think of a cache at all. Blocks have 16 tokens, as on GPUs; what has scales of
its own in each block is measured with the 128 tokens that vLLM's blocks have on CPUs, too. `host fp8` are rows of eight
bits (`host_kv_dtype`), by their copier. Speeds are of one core and count raw bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tiny_llama import trained
from lmcache_ext.config import Config
from lmcache_ext.ops import pages_fp8
from lmcache_ext.ops.layout import Layout, dense_cells, token_rows
from lmcache_ext.ops.page_shape import PageShape
from lmcache_ext.ops.table import PageTable
from lmcache_ext.serde.base import Serde
from lmcache_ext.serde.cachegen import CacheGenSerde
from lmcache_ext.serde.fixed import TAGS, FixedSerde
from lmcache_ext.serde.lossless import LosslessSerde
from lmcache_ext.serde.naive import NaiveSerde

CHUNK = 256
BLOCK = 16  # tokens, as on GPUs
CPU_BLOCK = 128
CONTEXT = 4 * CHUNK
CONTINUATION = 128
DOCUMENTS = 40
REPEATS = 5  # of each timing; the best counts


@dataclass
class Documents:
    """Token ids (documents, CONTEXT + CONTINUATION), their exact KV and what the model says after it."""

    tokens: torch.Tensor
    kv: torch.Tensor  # (documents, layers, 2, heads, CONTEXT, dim) bfloat16
    log_probs: torch.Tensor  # (documents, CONTINUATION, vocabulary)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    ratio: float
    encode_mb_s: float
    decode_mb_s: float
    l2_keys: list[float]  # relative, by layer
    l2_values: list[float]
    kl: float  # nats
    top1: float


def load_model() -> tuple[LlamaForCausalLM, Path]:
    directory = trained()
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), directory


@torch.inference_mode()
def read_documents(model: LlamaForCausalLM, directory: Path, count: int) -> Documents:
    """Compute the held-out documents once, with KV rounded to bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer((directory / "held_out.txt").read_text())["input_ids"]
    length = CONTEXT + CONTINUATION
    starts = [i * (len(ids) - length) // max(1, count - 1) for i in range(count)]
    tokens = torch.tensor([ids[start : start + length] for start in starts])
    kv = []
    for document in tokens:
        cache = model(document[None, :CONTEXT], use_cache=True).past_key_values
        layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
        kv.append(torch.stack(layers).to(torch.bfloat16))
    exact = torch.stack(kv)
    log_probs = torch.stack([continue_with(model, row, document) for row, document in zip(exact, tokens, strict=True)])
    return Documents(tokens, exact, log_probs)


@torch.inference_mode()
def continue_with(model: LlamaForCausalLM, kv: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    """Log probabilities (CONTINUATION, vocabulary) of what follows a context whose KV is `kv`."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kv.float()):
        cache.update(keys[None], values[None], layer)
    logits = model(document[None, CONTEXT:], past_key_values=cache, use_cache=True).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def layout_of(kv: torch.Tensor, block: int) -> Layout:
    """Rows of CHUNK tokens of this model, heads before tokens: vLLM's LBHNC on one rank."""
    layers, _, heads, _, dim = kv.shape[1:]
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


Coder = Serde | HostRows


@dataclass(frozen=True)
class Way:
    """One way to write chunks of blocks of so many tokens."""

    coder: Coder
    block: int = BLOCK


def through(coder: Coder, row: bytearray) -> tuple[int, bytearray]:
    """Bytes stored, and the row that comes back."""
    back = bytearray(len(row))
    payload = memoryview(b"".join(coder.encode(memoryview(row))))
    coder.decode((payload,), payload.nbytes, memoryview(back))
    return payload.nbytes, back


def measure(name: str, way: Way, model: LlamaForCausalLM, documents: Documents) -> Result:
    stored, raw, kls, agreements = 0, 0, [], []
    restored = torch.empty_like(documents.kv)
    for i, kv in enumerate(documents.kv):
        pieces = []
        for chunk in kv.split(CHUNK, dim=3):
            row = to_row(chunk, way.block)
            num_bytes, back = through(way.coder, row)
            stored, raw = stored + num_bytes, raw + len(row)
            pieces.append(from_row(back, chunk, way.block))
        restored[i] = torch.cat(pieces, dim=3)
        theirs = continue_with(model, restored[i], documents.tokens[i])
        kls.append((documents.log_probs[i].exp() * (documents.log_probs[i] - theirs)).sum(-1).mean().item())
        agreements.append((theirs.argmax(-1) == documents.log_probs[i].argmax(-1)).float().mean().item())
    l2 = relative_l2(documents.kv, restored)
    return Result(name, raw / stored, 0.0, 0.0, *l2, statistics.mean(kls), statistics.mean(agreements))


def relative_l2(exact: torch.Tensor, restored: torch.Tensor) -> tuple[list[float], list[float]]:
    """Root of the squared error's share, of keys and of values, by layer."""
    error = (restored.double() - exact.double()).square().sum(dim=(0, 3, 4, 5))
    share = (error / exact.double().square().sum(dim=(0, 3, 4, 5))).sqrt()
    return share[:, 0].tolist(), share[:, 1].tolist()


def timed(result: Result, way: Way, chunk: torch.Tensor) -> Result:
    """With MB/s of raw bytes, encoding and decoding, in this thread."""
    row = to_row(chunk, way.block)
    view, back, coder = memoryview(row), memoryview(bytearray(len(row))), way.coder
    payload = memoryview(b"".join(coder.encode(view)))
    best = [float("inf")] * 2
    for _ in range(REPEATS):
        for i, work in enumerate((lambda: coder.encode(view), lambda: coder.decode((payload,), payload.nbytes, back))):
            begin = time.perf_counter()
            for _ in range(4):
                work()
            best[i] = min(best[i], (time.perf_counter() - begin) / 4)
    encode_mb_s, decode_mb_s = (len(row) / seconds / 1e6 for seconds in best)
    return replace(result, encode_mb_s=encode_mb_s, decode_mb_s=decode_mb_s)


CURVE = ((16, 8), (24, 8), (32, 10), (48, 14), (64, 20), (96, 32))


def ways(kv: torch.Tensor, *, curve: bool = False) -> Mapping[str, Way]:
    """By name, in the order of the table; `kv` as of Documents."""
    layout, cpu_layout = layout_of(kv, BLOCK), layout_of(kv, CPU_BLOCK)
    fixed = [FixedSerde(scheme, layout) for scheme in TAGS]
    cachegen = CacheGenSerde(layout, Config().cachegen_key_bins, Config().cachegen_value_bins)
    found = {serde.name: Way(serde) for serde in (NaiveSerde(), LosslessSerde(2), *fixed, cachegen)}
    if curve:
        found |= {f"cachegen {keys}/{values}": Way(CacheGenSerde(layout, (keys,), (values,))) for keys, values in CURVE}
    found["host fp8"] = Way(HostRows(layout))
    for scheme in TAGS:
        found[f"{scheme}, blocks of {CPU_BLOCK}"] = Way(FixedSerde(scheme, cpu_layout), CPU_BLOCK)
    found[f"host fp8, blocks of {CPU_BLOCK}"] = Way(HostRows(cpu_layout), CPU_BLOCK)
    return found


def table(results: list[Result]) -> str:
    lines = [
        "| serde | ratio | encode MB/s | decode MB/s | relative L2 of keys / values | KL, nats | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        keys, values = statistics.mean(result.l2_keys), statistics.mean(result.l2_values)
        lines.append(
            f"| {result.name} | {result.ratio:.2f} | {result.encode_mb_s:,.0f} | {result.decode_mb_s:,.0f} "
            f"| {keys:.4f} / {values:.4f} | {result.kl:.2e} | {result.top1:.2%} |"
        )
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Loss over size: each serde with a loss as a point, the yardstick and twice it as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for result in results:
        if result.kl > 0:
            axes.plot(16 / result.ratio, result.kl, "o" if result.name != "fp8" else "s", color="tab:blue")
            axes.annotate(result.name, (16 / result.ratio, result.kl), textcoords="offset points", xytext=(6, 4))
    yardstick = next((result.kl for result in results if result.name == "fp8"), None)
    if yardstick is not None:
        axes.axhline(yardstick, color="grey", linewidth=0.8)
        axes.axhline(2 * yardstick, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("bits stored for each element of bfloat16 KV")
    axes.set_ylabel("KL divergence of the next token, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def read_results(path: Path) -> dict[str, Result]:
    """What an earlier run wrote, by name."""
    return {line["name"]: Result(**line) for line in json.loads(path.read_text())["results"]}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serdes", default="", help="names, semicolons between them; all of them if empty")
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="run on this core alone")
    parser.add_argument("--curve", action="store_true", help="cachegen with other bins too")
    parser.add_argument("--speeds", action="store_true", help="only speeds, all else as it was")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, directory = load_model()
    os.sched_setaffinity(0, {options.core})
    documents = read_documents(model, directory, 1 if options.speeds else options.documents)
    known = ways(documents.kv, curve=options.curve)
    if options.speeds:
        results = [result for name, result in read_results(options.out / "serde.json").items() if name in known]
    else:
        names = options.serdes.split(";") if options.serdes else list(known)
        results = [measure(name, known[name], model, documents) for name in names]
    chunk = documents.kv[0][..., :CHUNK, :]
    results = [timed(result, known[result.name], chunk) for result in results]
    print(table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "results": [asdict(result) for result in results]}
    (options.out / "serde.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(results, options.out / "serde.png")


if __name__ == "__main__":
    main()
