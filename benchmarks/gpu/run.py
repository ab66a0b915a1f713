"""Runs every check and measurement that needs a GPU, and keeps what they said: one command on a new machine.

Run: ``python benchmarks/gpu/run.py [--out FILE]``. Builds the CUDA kernels where nvcc is there, else takes those that
are; runs each script, the copiers of pages first, shows what it prints as it comes, and writes its tables, its other
lines and its exit status as JSON, by default to ``benchmarks/results/gpu-NAME.json``, NAME being the GPU's; beside it,
as ``gpu-NAME.md``, the section that belongs into ``benchmarks/RESULTS.md``. Exits with 1 where a check failed or a
target was missed, with 2 where nothing can be run.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lmcache_ext.ops import native
from scripts import build_cuda

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = ("pages", "pages_fp8", "launches", "worker", "codecs")
LIMIT_S = 300.0  # of each; they take a minute or two, and a kernel that hangs must not cost the machine
TITLES = {
    "pages": "Pages between the GPU's tensors and pinned rows, GB/s",
    "pages_fp8": "The same to and from rows of eight bits, GB/s of KV as the GPU has it",
    "launches": "A step's stores and loads, begun together on streams of their own",
    "worker": "The worker that an engine has, beside vLLM's own, GB/s of KV as the GPU has it",
    "codecs": "Codecs of rows in the GPU's memory, GB/s of raw KV",
}


class Told(TypedDict):
    """What one script said."""

    exit_status: int
    tables: list[list[dict[str, str]]]
    lines: list[str]


def gpu() -> str | None:
    """The GPU's name and its driver's version, of the driver's own tool."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return told.stdout.splitlines()[0].strip() if told.returncode == 0 and told.stdout.strip() else None


def build() -> str | None:
    """Why there are no kernels, or None. Those of an earlier build stay where there is no nvcc."""
    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        if not native.CUDA_LIBRARY.exists():
            return f"no nvcc, and no {native.CUDA_LIBRARY}: install CUDA's compiler, or bring a library built elsewhere"
        print(f"no nvcc here: taking {native.CUDA_LIBRARY} as it is", flush=True)
        return None
    built = subprocess.run([sys.executable, ROOT / "scripts" / "build_cuda.py", "--nvcc", nvcc], check=False)
    return None if built.returncode == 0 else "the kernels do not build"


def tables_and_lines(lines: Iterable[str]) -> tuple[list[list[dict[str, str]]], list[str]]:
    """Markdown tables as rows by column, and the lines that belong to none."""
    tables: list[list[dict[str, str]]] = []
    columns: list[str] | None = None
    rest = []
    for line in lines:
        if not line.startswith("|"):
            columns = None
            rest += [line] if line.strip() else []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if columns is None:
            columns = cells
            tables.append([])
        elif not set(line) <= set("|-: "):
            tables[-1].append(dict(zip(columns, cells, strict=True)))
    return tables, rest


def run(script: Path, *arguments: str) -> Told:
    """One script to its end, its output shown and kept."""
    print(f"\n== {script.name}", flush=True)
    command = [sys.executable, "-u", str(script), *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        limit = threading.Timer(LIMIT_S, process.kill)
        limit.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
        process.wait()
        limit.cancel()
    tables, rest = tables_and_lines(lines)
    return {"exit_status": process.returncode, "tables": tables, "lines": rest}


def verdicts(told: Told) -> list[str]:
    """What a script says about its targets, or what it says instead of one; or that it came to none."""
    found = [line for line in told["lines"] if line.startswith(("target", "faster", "skipped"))]
    if told["exit_status"] in (0, 1) and found:
        return found
    said = told["lines"][-1] if told["lines"] else "nothing"
    return [*found, f"ended with {told['exit_status']}: {said}"]


def section(name: str, results: Mapping[str, Told]) -> str:
    """Markdown for RESULTS.md: each table, and what became of its targets."""
    lines = [f"### {name}", "", f"`python benchmarks/gpu/run.py`, commit {commit()[:7]}; {platform.platform()}.", ""]
    for script, told in results.items():
        checked = sum("as the twin" in line for line in told["lines"])
        lines += [f"{TITLES[script]} (`{script}.py`; {checked} lines of checks against the twins passed):", ""]
        for table in filter(None, told["tables"]):
            lines += ["| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
            lines += ["| " + " | ".join(row.values()) + " |" for row in table] + [""]
        lines += [f"* {verdict}" for verdict in verdicts(told)] + [""]
    return "\n".join(lines)


def commit() -> str:
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    name = gpu()
    if name is None:
        print("nvidia-smi finds no GPU here", file=sys.stderr)
        return 2
    if (reason := build()) is not None:
        print(reason, file=sys.stderr)
        return 2
    results = {script: run(HERE / f"{script}.py") for script in SCRIPTS}
    report = {"gpu": name, "host": platform.platform(), "commit": commit(), "scripts": results}
    slug = re.sub(r"[^a-z0-9]+", "-", name.partition(",")[0].lower()).strip("-")
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(section(name, results))
    print(f"\n{name}: {out} and {out.with_suffix('.md').name}")
    for script, told in results.items():
        print(*(f"  {script}: {verdict}" for verdict in verdicts(told)), sep="\n")
    return int(any(told["exit_status"] for told in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
