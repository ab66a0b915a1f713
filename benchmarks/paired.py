"""Paired comparisons: sides asked by turns in an order drawn anew, and how sure the ratio of two of them is."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

_RESAMPLES = 4000
_COVERAGE = 0.95


class Ratio(NamedTuple):
    """The median of paired ratios, and the bootstrap's 95 % confidence interval [low, high] of it."""

    median: float
    low: float
    high: float

    @property
    def overhead(self) -> str:
        """As "+1.2 % (95 % CI -0.3 to +2.5 %)"."""
        median, low, high = (100 * (value - 1) for value in self)
        return f"{median:+.1f} % (95 % CI {low:+.1f} to {high:+.1f} %)"

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of the n-th of `ours` to the n-th of `theirs`."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)  # the same interval for the same numbers
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    outside = round(_RESAMPLES * (1 - _COVERAGE) / 2)
    return Ratio(statistics.median(pairs), medians[outside], medians[-1 - outside])


def balanced_ratio(ours: Sequence[float], theirs: Sequence[float], ours_first: Sequence[bool]) -> Ratio:
    """As `ratio`, where who of a pair comes first is slower or faster for it.

    The (geometric) mean of two medians, of the pairs in which ours came first and of the others: what being first costs
    is in both, once for and once against us. Raises ValueError where one kind of pair is missing.
    """
    logs, first = np.log(np.array(ours) / np.array(theirs)), np.array(ours_first, dtype=bool)
    if first.all() or not first.any():
        raise ValueError("pairs of both orders are needed")
    draw = np.random.default_rng(0)  # the same interval for the same numbers
    sides = [logs[first], logs[~first]]
    drawn = [np.median(draw.choice(side, (_RESAMPLES, len(side))), axis=1) for side in sides]
    outside = 50 * (1 - _COVERAGE)
    low, high = np.percentile(np.mean(drawn, axis=0), [outside, 100 - outside])
    return Ratio(*(float(np.exp(value)) for value in (np.mean([np.median(side) for side in sides]), low, high)))


class Estimate(NamedTuple):
    """A ratio of sums, and the bootstrap's 95 % confidence interval [low, high] of it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio_of_sums(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Of all `ours` to all `theirs`; pairs are drawn anew."""
    a, b = np.array(ours, dtype=np.float64), np.array(theirs, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(
        len(a), size=(_RESAMPLES, len(a))
    )  # the same interval for the same numbers
    outside = 50 * (1 - _COVERAGE)
    low, high = np.percentile(a[drawn].sum(axis=1) / b[drawn].sum(axis=1), [outside, 100 - outside])
    return Estimate(float(a.sum() / b.sum()), float(low), float(high))


def rounds(sides: Sequence[T], count: int, seed: int) -> Iterator[tuple[int, list[T]]]:
    """`count` rounds of all sides, each in a random order: what lasts longer than a turn favours no side."""
    draw = random.Random(seed)
    for index in range(count):
        yield index, draw.sample(sides, len(sides))
