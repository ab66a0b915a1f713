"""Rows of host memory as objects for other engines, framed as they would be in a store.

A row may be given to another chunk while it is read. It is copied out, and counts only if the chunk was in the same
place before and after: a chunk is removed from the holdings before anything overwrites its row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from lmcache_ext import frame
from lmcache_ext.offload.holdings import Holdings
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.peer_server import Objects


class PeerRows(Objects):
    """What one connection of a peer may read: see `Objects`."""

    def __init__(self, rows: memoryview, holdings: Holdings, namespace: bytes) -> None:
        self._rows = np.asarray(rows).view(np.uint8)
        self._holdings = holdings
        self._namespace = namespace
        self._room = np.empty(self._rows.shape[1], np.uint8)

    @override
    def get(self, key: bytes) -> Sequence[memoryview] | None:
        name = self._name(key)
        place = self._holdings.place(name) if name is not None else None
        if name is None or place is None:
            return None
        np.copyto(self._room, self._rows[place.row])
        if self._holdings.place(name) != place:
            return None
        payload = self._room.data
        head = frame.encode(
            namespace=self._namespace,
            key=key,
            serde_tag=NaiveSerde.tag,
            raw_length=payload.nbytes,
            payload_parts=(payload,),
        )
        return (memoryview(head), payload)

    @override
    def has(self, key: bytes) -> bool:
        name = self._name(key)
        return name is not None and self._holdings.place(name) is not None

    def _name(self, key: bytes) -> bytes | None:
        """The key within our namespace."""
        size = len(self._namespace)
        return key[size:] if key[:size] == self._namespace else None
