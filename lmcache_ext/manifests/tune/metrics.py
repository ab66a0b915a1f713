"""``/metrics`` of a server: sums, and quantiles of histograms."""

from __future__ import annotations

import math

from lmcache_ext.exposition import Sample, read_samples


class Metrics:
    """One exposition; counters of several engines or servers are added up."""

    def __init__(self, text: str) -> None:
        self._samples = read_samples(text)

    def of(self, name: str, **labels: str) -> list[Sample]:
        """Samples of that name, with or without the ``_total`` that Prometheus appends to counters."""
        found = [*self._samples.get(name, ()), *self._samples.get(f"{name}_total", ())]
        return [each for each in found if labels.items() <= each.labels.items()]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of a counter or gauge; None where it is not there."""
        found = self.of(name, **labels)
        return sum(each.value for each in found) if found else None

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The sum for each value of a label."""
        found: dict[str, float] = {}
        for each in self.of(name):
            value = each.labels.get(label, "")
            found[value] = found.get(value, 0.0) + each.value
        return found

    def quantile(self, name: str, share: float) -> float | None:
        """The upper bound of the bucket that ``share`` of all observations stay below; None without observations."""
        buckets = sorted(self._buckets(name).items())
        if not buckets or not buckets[-1][1]:
            return None
        wanted = share * buckets[-1][1]
        finite = [bound for bound, _ in buckets if bound < math.inf]
        found = next(bound for bound, count in buckets if count >= wanted)
        return found if found < math.inf else (finite[-1] if finite else None)

    def _buckets(self, name: str) -> dict[float, float]:
        found: dict[float, float] = {}
        for each in self.of(f"{name}_bucket"):
            bound = float(each.labels.get("le", "nan"))
            if not math.isnan(bound):
                found[bound] = found.get(bound, 0.0) + each.value
        return found
