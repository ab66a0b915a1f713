"""Finds the compiled libraries of this package; only this room loads any."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")  # built by scripts/build_cuda.py


def load(name: str, abi_function: str, abi: int) -> ctypes.CDLL | None:
    """The library `name`; None where it was not built, does not load, or `abi_function` says another number."""
    paths = (Path(__file__).with_name(f"{name}{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    return None if path is None else _open(path, abi_function, abi)


def load_cuda(abi_function: str, abi: int) -> ctypes.CDLL | None:
    """The library of CUDA kernels; None on the same terms."""
    return _open(CUDA_LIBRARY, abi_function, abi) if CUDA_LIBRARY.exists() else None


def _open(path: Path, abi_function: str, abi: int) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
        found = getattr(library, abi_function)()
    except (OSError, AttributeError):  # built for another machine or C library, or from other sources
        return None
    return library if found == abi else None
