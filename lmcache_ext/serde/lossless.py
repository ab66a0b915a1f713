"""Smaller, and bit for bit: the exponents of neighbours are alike, their mantissas are noise.

Any bytes will do: pages that only an instruction set understands are as good as any. What must be
known is the size of an element, which follows from the KV cache's dtype; a wrong one costs bytes on
the store and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmcache_ext.ops import lossless
from lmcache_ext.serde.base import Serde


class LosslessSerde(Serde):
    """Byte planes, of which those that pay are entropy coded (`lmcache_ext.ops.lossless`)."""

    name = "lossless"
    tag = 1
    lossless = True

    def __init__(self, element_bytes: int) -> None:
        self._element_bytes = element_bytes

    def encode(self, row: memoryview) -> Sequence[memoryview]:
        return (lossless.encode(row, self._element_bytes),)

    def receive(self, row: memoryview) -> Sequence[memoryview]:
        longest = max(lossless.bound(row.nbytes, element_bytes) for element_bytes in lossless.ELEMENT_BYTES)
        return (np.empty(longest, dtype=np.uint8).data,)

    def decode(self, received: Sequence[memoryview], stored_bytes: int, row: memoryview) -> None:
        (payload,) = received
        lossless.decode(payload[:stored_bytes], row)
