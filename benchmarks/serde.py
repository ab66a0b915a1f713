"""What each serde costs and saves, on the KV of a small model trained for it: bytes, time and the model's answers.

Run: ``lmcache-ext serde bench``, or ``python benchmarks/serde.py [--serdes "fp8;cachegen"] [--model second] [--curve]
[--choosing] [--speeds]``. The first run trains the model (`benchmarks/tiny_llama.py`). ``--speeds`` measures speeds
alone, which wants a machine with nothing else to do, and takes the rest from what an earlier run wrote.

A document is computed once; the KV of its first CONTEXT tokens goes through a serde in chunks of CHUNK tokens, in
bfloat16, and the model reads the CONTINUATION tokens that follow it with what came back. Its distributions over the
next token are held against those with the exact KV (`naive`, the same bfloat16): the mean Kullback-Leibler divergence
in nats, and how often the likeliest token is the same. The yardstick is `fp8`, which is what people store KV in when
they do not think of a cache at all. Intervals are of 95 %, from documents drawn anew. ``--choosing`` measures the
documents by which the bins of `cachegen` were chosen; what is reported comes from others, and from a second model.

Blocks have 16 tokens, as on GPUs; what has scales of its own in each block is measured with the 128 tokens that vLLM's
blocks have on CPUs, too. `host fp8` are rows of eight bits (`host_kv_dtype`), by their copier. Speeds are of one core
and count raw bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paired import Estimate, ratio_of_sums
from benchmarks.serde_documents import CHUNK, Documents, chosen_by, continue_with, load_model, read, reported_on
from benchmarks.serde_rows import HostRows, from_row, layout_of, to_row
from benchmarks.tiny_llama import VARIANTS, shape, trained
from lmcache_ext.config import Config
from lmcache_ext.serde.base import Serde
from lmcache_ext.serde.cachegen import CacheGenSerde
from lmcache_ext.serde.fixed import NAMES, FixedSerde
from lmcache_ext.serde.lossless import LosslessSerde
from lmcache_ext.serde.naive import NaiveSerde

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = 16  # tokens, as on GPUs
CPU_BLOCK = 128
DOCUMENTS = 60
REPEATS = 5  # of each timing; the best counts
YARDSTICK = "fp8"
BLOCK_NOTE = f", blocks of {CPU_BLOCK}"


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    encode_mb_s: float
    decode_mb_s: float
    l2_keys: list[float]  # relative, by layer
    l2_values: list[float]
    raw_bytes: list[int]  # by document, as all that follow
    stored_bytes: list[int]
    kl: list[float]  # nats
    top1: list[float]

    @property
    def ratio(self) -> Estimate:
        return ratio_of_sums(self.raw_bytes, self.stored_bytes)

    def loss(self, yardstick: Result) -> Estimate:
        """How many times the KL of the yardstick."""
        return ratio_of_sums(self.kl, yardstick.kl)


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
    stored, raw, kls, agreements = [], [], [], []
    restored = torch.empty_like(documents.kv)
    for i, kv in enumerate(documents.kv):
        pieces = []
        stored.append(0)
        for chunk in kv.split(CHUNK, dim=3):
            num_bytes, back = through(way.coder, to_row(chunk, way.block))
            stored[i] += num_bytes
            pieces.append(from_row(back, chunk, way.block))
        raw.append(kv.numel() * kv.itemsize)
        restored[i] = torch.cat(pieces, dim=3)
        theirs = continue_with(model, restored[i], documents.tokens[i])
        kls.append((documents.log_probs[i].exp() * (documents.log_probs[i] - theirs)).sum(-1).mean().item())
        agreements.append((theirs.argmax(-1) == documents.log_probs[i].argmax(-1)).float().mean().item())
    return Result(name, 0.0, 0.0, *relative_l2(documents.kv, restored), raw, stored, kls, agreements)


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


CURVE = (0.5, 0.7, 1.4, 2.0)  # times as many bins
FLAT = ((32, 10), (62, 15), (96, 32))  # in all layers


def ways(config: LlamaConfig, *, curve: bool = False) -> Mapping[str, Way]:
    """By name, in the order of the table, for the KV of such a model."""
    layout, cpu_layout = layout_of(config, BLOCK), layout_of(config, CPU_BLOCK)
    bins = (Config().cachegen_key_bins, Config().cachegen_value_bins)
    cachegen = CacheGenSerde(layout, *bins)
    found = {serde.name: Way(serde) for serde in (NaiveSerde(), LosslessSerde(2))}
    found |= {name: Way(FixedSerde(scheme, layout)) for name, scheme in NAMES.items()}
    found[cachegen.name] = Way(cachegen)
    if curve:
        for factor in CURVE:
            scaled = ([factor * number for number in schedule] for schedule in bins)
            found[f"cachegen x {factor}"] = Way(CacheGenSerde(layout, *scaled))
        for keys, values in FLAT:
            found[f"cachegen {keys}/{values}"] = Way(CacheGenSerde(layout, (keys,), (values,)))
    found["host fp8"] = Way(HostRows(layout))
    for name, scheme in NAMES.items():
        found[name + BLOCK_NOTE] = Way(FixedSerde(scheme, cpu_layout), CPU_BLOCK)
    found["host fp8" + BLOCK_NOTE] = Way(HostRows(cpu_layout), CPU_BLOCK)
    return found


def table(results: list[Result]) -> str:
    lines = [
        f"| serde | ratio | encode MB/s | decode MB/s | relative L2 of keys / values | KL, nats | x {YARDSTICK} "
        "| top-1 agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    yardstick = next(result for result in results if result.name == YARDSTICK)
    for result in results:
        keys, values = statistics.mean(result.l2_keys), statistics.mean(result.l2_values)
        speeds = [f"{speed:,.0f}" for speed in (result.encode_mb_s, result.decode_mb_s)]
        if result.name == NaiveSerde.name:  # which hands over the row as it is
            speeds = ["", ""]
        lines.append(
            f"| {result.name} | {result.ratio} | {' | '.join(speeds)} "
            f"| {keys:.4f} / {values:.4f} | {statistics.mean(result.kl):.2e} | {result.loss(yardstick)} "
            f"| {statistics.mean(result.top1):.2%} |"
        )
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Loss over size: each serde with a loss as a point, the yardstick and twice it as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for result in results:
        drawn = BLOCK_NOTE not in result.name and not result.name.startswith("host")  # others lie on the same spots
        if drawn and (kl := statistics.mean(result.kl)) > 0:
            place = (16 / result.ratio.value, kl)
            axes.plot(*place, "o" if result.name != YARDSTICK else "s", color="tab:blue")
            axes.annotate(result.name, place, textcoords="offset points", xytext=(6, 4))
            if result.name == YARDSTICK:
                axes.axhline(kl, color="grey", linewidth=0.8)
                axes.axhline(2 * kl, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("bits stored for each element of bfloat16 KV")
    axes.set_ylabel("KL divergence of the next token, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmcache-ext serde bench",
        description=__doc__.splitlines()[0],
        epilog="The first run trains the model, 10 to 40 minutes of a core; later ones take some minutes.",
    )
    parser.add_argument(
        "--serdes", default="", help="names, semicolons between them; all if empty (fp8, the yardstick, always is)"
    )
    parser.add_argument(
        "--model", choices=VARIANTS, default="first", help="which of the models; trained if it is not yet"
    )
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help=f"at most so many; {DOCUMENTS} if not given")
    parser.add_argument("--choosing", action="store_true", help="on the documents that defaults were chosen by")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="run on this core alone")
    parser.add_argument(
        "--curve", action="store_true", help="cachegen with other bins too: times as many, or the same in all layers"
    )
    parser.add_argument("--speeds", action="store_true", help="only speeds, all else as an earlier run wrote it")
    parser.add_argument(
        "--out", type=Path, help="where the numbers and the plot go; benchmarks/results, or nowhere with --serdes"
    )
    return parser


def chosen_names(parser: argparse.ArgumentParser, options: argparse.Namespace, known: Mapping[str, Way]) -> list[str]:
    """Names of what is measured, in the order of the table; what cannot be is refused before anything is computed."""
    asked = {name.strip() for name in options.serdes.split(";")} - {""} or set(known)
    if unknown := asked - set(known):
        parser.error(f"--serdes: {'; '.join(sorted(unknown))}: unknown, expected some of {'; '.join(known)}")
    if options.documents < 1:
        parser.error(f"--documents: {options.documents}, expected 1 or more")
    if options.core not in os.sched_getaffinity(0):
        parser.error(f"--core: {options.core}, expected one of {sorted(os.sched_getaffinity(0))}")
    return [name for name in known if name in asked | {YARDSTICK}]


def earlier(parser: argparse.ArgumentParser, path: Path) -> dict[str, Result]:
    """What an earlier run wrote, by name."""
    try:
        return {line["name"]: Result(**line) for line in json.loads(path.read_text())["results"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--speeds: {path} is not of an earlier run ({error}): run once without it")


def measured(
    names: list[str], known: Mapping[str, Way], model: LlamaForCausalLM, documents: Documents
) -> Mapping[str, Result]:
    found = {}
    for number, name in enumerate(names, 1):
        begin = time.monotonic()
        found[name] = measure(name, known[name], model, documents)
        print(f"{name} ({number} of {len(names)}): {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    known = ways(shape(VARIANTS[options.model]), curve=options.curve)
    names = chosen_names(parser, options, known)
    out: Path | None = options.out or (None if options.serdes else RESULTS)
    stem = "-".join(["serde", *["second"] * (options.model == "second"), *["choosing"] * options.choosing])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    path = (out or RESULTS) / f"{stem}.json"
    results: Mapping[str, Result] = earlier(parser, path) if options.speeds else {}
    torch.set_num_threads(1)
    directory = trained(name=options.model)
    os.sched_setaffinity(0, {options.core})
    model = load_model(directory)
    tokens = (chosen_by if options.choosing else reported_on)(directory, 1 if options.speeds else options.documents)
    print(f"{len(tokens)} documents of {tokens.shape[1]} tokens", file=sys.stderr, flush=True)
    documents = read(model, tokens)
    if not options.speeds:
        results = measured(names, known, model, documents)
    chunk = documents.kv[0][..., :CHUNK, :]
    lines = [timed(results[name], known[name], chunk) for name in names if name in results]
    print(table(lines))
    if out is not None:
        written = [asdict(line) for line in ({**results} | {line.name: line for line in lines}).values()]
        report = {"machine": machine(), "documents": len(lines[0].kl), "results": written}
        path.write_text(json.dumps(report) + "\n")
        plot(lines, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
