"""Fixed-rate serdes: as many bits for every element, whatever it is.

`fp8` and `int8` halve bfloat16: a byte for each element, a scale for the keys and one for the values of each head and
block. `kivi` is 4 or 2 bits: keys are scaled per channel, values per token, as their outliers want it (Liu et al.,
KIVI, 2024), in groups of 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmcache_ext.ops import fixed
from lmcache_ext.ops.fixed import Scheme
from lmcache_ext.ops.layout import Layout
from lmcache_ext.serde.base import Serde

NAMES: dict[str, Scheme] = {"fp8": "fp8", "int8": "int8", "kivi": "kivi4", "kivi2": "kivi2"}
"""As they are written in a configuration."""

TAGS: dict[Scheme, int] = {"fp8": 2, "int8": 3, "kivi4": 4, "kivi2": 5}


class FixedSerde(Serde):
    """Rows of one layout, in one of `ops.fixed.SCHEMES`."""

    lossless = False

    def __init__(self, scheme: Scheme, layout: Layout) -> None:
        self.name = scheme
        self.tag = TAGS[scheme]
        self._scheme = scheme
        self._layout = layout

    def encode(self, row: memoryview) -> Sequence[memoryview]:
        return (fixed.encode(self._layout, self._scheme, row),)

    def receive(self, row: memoryview) -> Sequence[memoryview]:
        return (np.empty(fixed.payload_bytes(self._layout, self._scheme), dtype=np.uint8).data,)

    def decode(self, received: Sequence[memoryview], stored_bytes: int, row: memoryview) -> None:
        (payload,) = received
        fixed.decode(self._layout, self._scheme, payload[:stored_bytes], row)
