"""The CacheGen idea for today's layouts (Liu et al., CacheGen, SIGCOMM 2024): steps that are coarser where the model
minds less, differences between tokens where they are alike, entropy coding. Format in README.md.

How coarse is a number of bins for the keys and one for the values of each layer: so many steps cover eight standard
deviations. The defaults come from `benchmarks/serde.py --choosing`. As in the paper, the model minds errors of its
first layers most: with the same steps in all layers the first two make four fifths of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmcache_ext.ops import cachegen
from lmcache_ext.ops.cachegen import Bins
from lmcache_ext.ops.layout import Layout
from lmcache_ext.serde.base import Serde


class CacheGenSerde(Serde):
    """Rows of one layout, in steps of the given bins."""

    name = "cachegen"
    tag = 6
    lossless = False

    def __init__(self, layout: Layout, key_bins: Sequence[float], value_bins: Sequence[float]) -> None:
        """Bins by layer; where there are fewer than layers, the last one holds for the rest."""
        self._layout = layout
        self._bins = bins_by_layer(layout.layers, key_bins, value_bins)

    def encode(self, row: memoryview) -> Sequence[memoryview]:
        return (cachegen.encode(self._layout, self._bins, row),)

    def receive(self, row: memoryview) -> Sequence[memoryview]:
        return (np.empty(cachegen.bound(self._layout), dtype=np.uint8).data,)

    def decode(self, received: Sequence[memoryview], stored_bytes: int, row: memoryview) -> None:
        (payload,) = received
        cachegen.decode(self._layout, payload[:stored_bytes], row)


def bins_by_layer(layers: int, key_bins: Sequence[float], value_bins: Sequence[float]) -> Bins:
    """Of each layer; the last of a schedule holds for the layers behind it."""
    schedules = (key_bins, value_bins)
    rows = [[schedule[min(layer, len(schedule) - 1)] for schedule in schedules] for layer in range(layers)]
    return np.array(rows, dtype=np.float32)
