"""Finds the compiled libraries of this package; only this room loads any."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


def load(name: str, abi_function: str, abi: int) -> ctypes.CDLL | None:
    """The library `name`; None where it was not built, does not load, or `abi_function` says another number."""
    paths = (Path(__file__).with_name(f"{name}{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # built for another machine or C library
        return None
    return library if getattr(library, abi_function)() == abi else None
