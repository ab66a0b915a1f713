"""Of which chunks something happened lately: what tells an eviction from a chunk that was never there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from vllm.v1.kv_offload.base import OffloadKey

_MAX_KEYS = 65536


class Recent:
    """Keys that were added lately, the oldest forgotten first."""

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._keys: OrderedDict[OffloadKey, None] = OrderedDict()

    def add(self, keys: Iterable[OffloadKey]) -> None:
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._max_keys:
            self._keys.popitem(last=False)

    def discard(self, keys: Iterable[OffloadKey]) -> None:
        for key in keys:
            self._keys.pop(key, None)

    def __contains__(self, key: OffloadKey) -> bool:
        return key in self._keys
