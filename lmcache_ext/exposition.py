"""Prometheus' text format, as servers answer ``/metrics`` in it: read here, by who asks servers how they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')
_DECLARED = re.compile(r"^# TYPE (\S+) ", re.MULTILINE)


class Sample(NamedTuple):
    """One line of a metric; the labels' values are as they were written, escapes included."""

    labels: Mapping[str, str]
    value: float


def read_samples(text: str) -> dict[str, list[Sample]]:
    """Name -> samples; a metric that is declared has none before its first event. Other lines are passed over."""
    found: dict[str, list[Sample]] = {name: [] for name in _DECLARED.findall(text)}
    for line in text.splitlines():
        matched = None if line.startswith("#") else _SAMPLE.fullmatch(line.strip())
        if matched is None:
            continue
        try:
            value = float(matched[3])
        except ValueError:
            continue
        found.setdefault(matched[1], []).append(Sample(dict(_LABEL.findall(matched[2] or "")), value))
    return found
