"""Builds the CUDA kernels, every .cu of lmcache_ext/ops/csrc in one _cuda.so, for every architecture we name.

Run: ``python scripts/build_cuda.py [--nvcc PATH] [--out FILE]``. Needs no GPU, but nvcc 12.1 or newer: CUDA's toolkit,
or the wheels that .ci/run installs. Architectures that this nvcc does not know are left out, and PTX of the newest one
it knows is added for GPUs to come. The result runs on any driver of the same major version of CUDA or a newer one.
Wheels of this package take it along where it is there.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

OPS = Path(__file__).resolve().parents[1] / "lmcache_ext" / "ops"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def find_nvcc() -> str | None:
    """On the PATH, in CUDA_HOME, or where CUDA's toolkit is installed."""
    toolkits = [root for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    return next(filter(shutil.which, ("nvcc", *(f"{root}/bin/nvcc" for root in toolkits))), None)


def known_to(nvcc: str) -> list[int]:
    """Those of our architectures that this compiler can write code for."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [number for number in ARCHITECTURES if f"compute_{number}" in listed]


def command(nvcc: str, architectures: list[int], out: Path) -> list[str]:
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    newest = architectures[-1]
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    flags = [
        "-std=c++17",
        "-O3",
        "--fmad=false",  # payloads are compared bit for bit with those of hosts
        "--threads=0",
        "-shared",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
        "-Werror=all-warnings",
    ]
    libraries = Path(nvcc).resolve().parents[1] / "lib"  # nvcc of a wheel has them there and does not look
    sources = map(str, sorted(OPS.glob("csrc/*.cu")))
    return [nvcc, *flags, *targets, f"-L{libraries}", *sources, "-o", str(out)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", default=find_nvcc() or "nvcc")
    parser.add_argument("--out", type=Path, default=OPS / "_cuda.so")
    options = parser.parse_args()
    if shutil.which(options.nvcc) is None:
        print(f"{options.nvcc} is not here: install CUDA's compiler, or name it with --nvcc", file=sys.stderr)
        return 2
    nvcc = str(shutil.which(options.nvcc))
    architectures = known_to(nvcc)
    built = subprocess.run(command(nvcc, architectures, options.out), check=False)
    if built.returncode == 0:
        print(f"{options.out}: sm_{', sm_'.join(map(str, architectures))} and PTX")
    return built.returncode


if __name__ == "__main__":
    sys.exit(main())
