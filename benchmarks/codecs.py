"""What the codecs of hosts make of one core, by instruction set: MB/s of raw KV, both ways.

Run: ``python benchmarks/codecs.py [--core 1]``. Rows are made up (`gpu/codecs.py`: bfloat16, four layers of eight heads
of 128, 256 tokens in blocks of 16), so ratios say little; `benchmarks/serde.py` has them on a trained model's KV. The
best of several runs counts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.codecs import KEY_BINS, VALUE_BINS, Shape, rows_like_kv
from lmcache_ext.ops import cachegen, fixed, lossless
from lmcache_ext.serde.cachegen import bins_by_layer

SHAPE = Shape("four layers", layers=4, heads=8, k_dim=128, v_dim=128, blocks=16)
SETS = {1: "plain C++", 2: "AVX2", 3: "AVX-512"}
REPEATS = 9


def mb_s(work: Callable[[], object], num_bytes: int) -> float:
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return num_bytes / min(seconds) / 1e6


def line(name: str, on: str, payload: memoryview, row: bytes, encode: float, decode: float) -> None:
    print(f"| {name} | {on} | {len(row) / payload.nbytes:.2f} | {encode:,.0f} | {decode:,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="run on this core alone")
    os.sched_setaffinity(0, {parser.parse_args().core})
    layout = SHAPE.layout("bfloat16")
    (row,) = rows_like_kv(layout, 1)
    source, target = memoryview(row), memoryview(bytearray(row))
    bins = bins_by_layer(layout.layers, KEY_BINS, VALUE_BINS)
    print("| codec | instruction set | ratio | encode | decode |\n|---|---|---|---|---|")
    for isa in reversed(cachegen.instruction_sets()):
        payload = cachegen.encode(layout, bins, source, isa)
        encode = mb_s(lambda isa=isa: cachegen.encode(layout, bins, source, isa), len(row))
        decode = mb_s(lambda isa=isa, coded=payload: cachegen.decode(layout, coded, target, isa), len(row))
        line("cachegen", SETS[isa], payload, row, encode, decode)
    for isa in reversed(lossless.instruction_sets()):
        payload = lossless.encode(source, 2, isa=isa)
        encode = mb_s(lambda isa=isa: lossless.encode(source, 2, isa=isa), len(row))
        decode = mb_s(lambda isa=isa, coded=payload: lossless.decode(coded, target, isa), len(row))
        line("lossless", SETS[isa], payload, row, encode, decode)
    for scheme, isa in itertools.product(fixed.SCHEMES, reversed(fixed.instruction_sets())):
        given = (layout, scheme)
        payload = fixed.encode(*given, source)
        encode = mb_s(lambda given=given, isa=isa: fixed.encode(*given, source, isa), len(row))
        decode = mb_s(lambda given=given, isa=isa, coded=payload: fixed.decode(*given, coded, target, isa), len(row))
        line(scheme, SETS[isa], payload, row, encode, decode)


if __name__ == "__main__":
    main()
