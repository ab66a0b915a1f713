"""Quantities as Kubernetes writes them: ``24Gi``, ``500Mi``, ``8G``, ``1e9``."""

from __future__ import annotations

import math
import re

GIB = 2**30
_FACTORS = {
    **{"": 1, "m": 1e-3, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18},
    **{"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60},
}
_QUANTITY = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?([a-zA-Z]{0,2})")


def read_bytes(text: str) -> int | None:
    """The bytes of a quantity; None for what is not one."""
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or found[3] not in _FACTORS:
        return None
    return int(float(found[1] + (found[2] or "")) * _FACTORS[found[3]])


def write_gib(size: int) -> str:
    """At least ``size`` bytes, in whole Gi."""
    return f"{max(1, math.ceil(size / GIB))}Gi"


def shown(size: int) -> str:
    """A size for a message."""
    return f"{size / GIB:.6g} GiB"
