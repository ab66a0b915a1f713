"""Chunks to a store and back: serde, frame, store, in this order and its reverse.

Threads:  `fetch`, `keep` and `present` run in pool threads, several at once; counts are locked.
Order:    none.
Owner:    a row is touched only while the call runs.
Failure:  nothing raises. A store's failure, a lie in a frame, a missing object: all are False, told
          apart by the counters only. After a False the row's bytes mean nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

from lmcache_ext import frame
from lmcache_ext.errors import FrameError, StoreError, UnknownSerde
from lmcache_ext.serde.base import Serde
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.base import Store

logger = logging.getLogger("vllm.lmcache_ext.offload.chunk_io")


class ChunkIO:
    """Moves whole rows between host memory and one store, verified."""

    def __init__(self, store: Store, serde: Serde, namespace: bytes, readable: Sequence[Serde] = ()) -> None:
        """Writes with `serde`; reads what it or any of `readable` wrote, which must mean the same KV."""
        self._store = store
        self._serde = serde
        self._namespace = namespace
        self._by_tag = {known.tag: known for known in (*readable, serde)}
        self._lock = threading.Lock()
        self._corrupt: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._told: set[str] = set()

    @property
    def decodes(self) -> bool:
        """Whether a chunk that has arrived is not yet what belongs into its row."""
        return not isinstance(self._serde, NaiveSerde)

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each chunk seems to be there. Advice: the fetch is the truth."""
        try:
            return self._store.exists([self._namespace + key for key in keys])
        except StoreError:
            return [False] * len(keys)

    def fetch(self, keys: Sequence[bytes], rows: Sequence[memoryview]) -> list[bool]:
        """Fill each row with the chunk of its key; True only where every byte is verified."""
        far_keys = [self._namespace + key for key in keys]
        headers = [memoryview(bytearray(frame.FRAME_BYTES)) for _ in rows]
        received = [self._serde.receive(row) for row in rows]
        objects = [(header, *payload) for header, payload in zip(headers, received, strict=True)]
        lengths = self._store.get_many_into(far_keys, objects)
        return [
            isinstance(length, int) and self._is_chunk(key, parts, length, row)
            for key, parts, length, row in zip(far_keys, objects, lengths, rows, strict=True)
        ]

    def keep(self, keys: Sequence[bytes], rows: Sequence[memoryview]) -> list[bool]:
        """Write the chunk of each key; True where it is in the store now, or was before."""
        kept = self.present(keys)
        missing = [index for index, is_there in enumerate(kept) if not is_there]
        far_keys = [self._namespace + keys[index] for index in missing]
        objects = [self._pack(key, rows[index]) for key, index in zip(far_keys, missing, strict=True)]
        for index, error in zip(missing, self._store.put_many(far_keys, objects), strict=True):
            kept[index] = error is None
            if error is not None:
                self.count_dropped(type(error).__name__)
        return kept

    def count_dropped(self, cause: str, chunks: int = 1) -> None:
        """Count chunks that were not written, by cause."""
        with self._lock:
            self._dropped[cause] += chunks

    def take_counts(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """Corrupt and dropped chunks by cause, since the last call."""
        with self._lock:
            corrupt, self._corrupt = self._corrupt, Counter()
            dropped, self._dropped = self._dropped, Counter()
        return corrupt, dropped

    def _pack(self, key: bytes, row: memoryview) -> Sequence[memoryview]:
        """The object that holds `row`: its frame and its payload."""
        serde, payload = self._serde, self._serde.encode(row)
        if serde.lossless and sum(part.nbytes for part in payload) > row.nbytes:
            serde, payload = NaiveSerde(), (row,)  # noise: nothing gained, and a naive reader has no room for more
        head = frame.encode(
            namespace=self._namespace,
            key=key,
            serde_tag=serde.tag,
            raw_length=row.nbytes,
            payload_parts=payload,
        )
        return (memoryview(head), *payload)

    def _is_chunk(self, key: bytes, parts: Sequence[memoryview], length: int, row: memoryview) -> bool:
        """Whether what came is the chunk of `key`; then `row` holds it, else it is deleted where it came from."""
        try:
            self._unpack(key, parts[0], parts[1:], length, row)
        except FrameError as error:
            self._discard(key, error)
            return False
        return True

    def _unpack(
        self, key: bytes, head: memoryview, received: Sequence[memoryview], length: int, row: memoryview
    ) -> None:
        header = frame.parse(head[: min(length, frame.FRAME_BYTES)])
        frame.verify(
            header,
            namespace=self._namespace,
            key=key,
            payload_parts=received,
            object_length=length,
            raw_length=row.nbytes,
        )
        serde = self._by_tag.get(header.serde_tag)
        if serde is None:
            raise UnknownSerde(f"read serde tag {header.serde_tag}, known here are {sorted(self._by_tag)}")
        if serde is not self._serde:  # received as another serde likes it, perhaps in the row itself
            received = (memoryview(b"".join(received))[: header.stored_length],)
        serde.decode(received, header.stored_length, row)

    def _discard(self, key: bytes, error: FrameError) -> None:
        cause = type(error).__name__
        with self._lock:
            self._corrupt[cause] += 1
            first = cause not in self._told
            self._told.add(cause)
        if first:  # one line per cause; the counter has the rest
            logger.warning("Corrupt chunk in %s, deleted and computed again: %s: %s", self._store.name, cause, error)
        try:
            self._store.delete([key])
        except StoreError as failure:
            logger.debug("Could not delete a corrupt chunk from %s: %s", self._store.name, failure)
