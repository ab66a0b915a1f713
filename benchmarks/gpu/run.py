"""Runs every check and measurement that needs a GPU, and keeps what they said: one command on a new machine.

Run: ``python benchmarks/gpu/run.py [--out FILE]``. Builds the CUDA kernels, runs each script of this folder, shows what
it prints as it comes, and writes its tables, its other lines and its exit status as JSON, by default to
``benchmarks/results/gpu-NAME.json``, NAME being the GPU's. Exits with 1 where a check failed or a target was missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def gpu() -> str | None:
    """The GPU's name, of the driver's own tool."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return told.stdout.splitlines()[0].strip() if told.returncode == 0 and told.stdout.strip() else None


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


def run(script: Path, *arguments: str) -> dict[str, object]:
    """One script to its end, its output shown and kept."""
    print(f"\n== {script.name}", flush=True)
    command = [sys.executable, "-u", str(script), *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    tables, rest = tables_and_lines(lines)
    return {"exit_status": process.returncode, "tables": tables, "lines": rest}


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
    subprocess.run([sys.executable, ROOT / "scripts" / "build_cuda.py"], check=True)
    scripts = sorted(path for path in HERE.glob("*.py") if path != Path(__file__).resolve())
    results = {script.stem: run(script) for script in scripts}
    report = {"gpu": name, "host": platform.platform(), "commit": commit(), "scripts": results}
    slug = re.sub(r"[^a-z0-9]+", "-", name.partition(",")[0].lower()).strip("-")
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    statuses = {script: result["exit_status"] for script, result in results.items()}
    print(f"\n{out}: {', '.join(f'{script} ended with {status}' for script, status in statuses.items())}")
    return int(any(statuses.values()))


if __name__ == "__main__":
    raise SystemExit(main())
