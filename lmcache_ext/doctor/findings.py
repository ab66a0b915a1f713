"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]

NEARLY_FULL = 0.95
"""Of a capacity: what evicts is never fuller for long."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report, and what to do about it."""

    level: Level
    what: str
    way_out: str = ""


def gib(num_bytes: float) -> str:
    """A size as people read it."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
