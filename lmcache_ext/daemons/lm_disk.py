"""Objects of a cache server on disk: a `DiskStore` whose files say their own names.

    offset  size  field
         0    64  frame of `lmcache_ext.frame`; its payload is all that follows, its raw length the object's
        64    28  LMCache's metadata: fmt, dtype, shape0..3, location; int32
        92   150  name, padded with blanks
       242    14  zero
       256        the object

Blocking; called from the server's disk threads. The directory is the index: nothing is read at start.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_ext import frame
from lmcache_ext.errors import FrameError, TruncatedFrame
from lmcache_ext.stores.base import Usage
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.disk_scan import list_files
from lmcache_ext.wire import lm

NAMESPACE = b"lmcache-server/1"
_LABEL = struct.Struct(f"<7i{lm.NAME_BYTES}s14x")
HEAD_BYTES = frame.FRAME_BYTES + _LABEL.size
_SERDE_TAG = 0


@dataclass(frozen=True, slots=True)
class Found:
    """An object on disk, not verified yet."""

    num_bytes: int
    meta: lm.Meta


class Disk:
    """Objects by name below one directory.

    Threads:  any number.
    Order:    a returned `save` is found by every later call, also of a process started after this one was killed.
    Owner:    of the `DiskStore`, which may be shared with other servers on the same directory.
    Failure:  StoreError where the disk fails; a file that is not what it says is a miss, and removed.
    """

    def __init__(self, path: str, capacity_bytes: int | None) -> None:
        self._path = path
        self._store = DiskStore([path], capacity_bytes, name="data-dir")

    def open(self) -> None:
        """Make the directory and see that it answers. Raises StoreError."""
        self._store.ping()

    def save(self, name: str, meta: lm.Meta, view: memoryview) -> None:
        """Write, replacing what was there. Raises StoreError."""
        key = _key(name)
        label = memoryview(_LABEL.pack(meta.fmt, meta.dtype, *meta.shape, meta.location, lm.name_field(name)))
        head = frame.encode(
            namespace=NAMESPACE, key=key, serde_tag=_SERDE_TAG, raw_length=len(view), payload_parts=[label, view]
        )
        self._store.put(key, [memoryview(head), label, view])

    def find(self, name: str) -> Found | None:
        """Its length and metadata, from the head alone. Raises StoreError."""
        head = bytearray(HEAD_BYTES)
        length = self._store.get_into(_key(name), [memoryview(head)])
        if length is None:
            return None
        if length < HEAD_BYTES:
            self._store.delete([_key(name)])
            return None
        *fields, _name = _LABEL.unpack_from(head, frame.FRAME_BYTES)
        fmt, dtype, a, b, c, d, location = fields
        return Found(length - HEAD_BYTES, lm.Meta(fmt, dtype, (a, b, c, d), location))

    def load(self, name: str, view: memoryview) -> bool:
        """Fill `view` with the object and verify it; False where it is gone, or was wrong and now is gone."""
        key = _key(name)
        head, label = memoryview(bytearray(frame.FRAME_BYTES)), memoryview(bytearray(_LABEL.size))
        length = self._store.get_into(key, [head, label, view])
        if length is None:
            return False
        try:
            _verify(key, head, [label, view], length, len(view))
        except FrameError:
            self._store.delete([key])
            return False
        return True

    def exists(self, names: Sequence[str]) -> list[bool]:
        return self._store.exists([_key(name) for name in names])

    def delete(self, names: Sequence[str]) -> list[bool]:
        """Which of them were there. Raises StoreError."""
        found = self.exists(names)
        self._store.delete([_key(name) for name in names])
        return found

    def names(self) -> list[str]:
        """Read the head of every file: slow, for people who ask for a list. Raises OSError."""
        found = []
        for file in list_files(self._path, None).objects:
            try:
                fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            with os.fdopen(fd, "rb") as stream:
                head = stream.read(HEAD_BYTES)
            if len(head) == HEAD_BYTES:
                name = lm.parse_name(_LABEL.unpack_from(head, frame.FRAME_BYTES)[7])
                if name is not None:
                    found.append(name)
        return found

    def usage(self) -> Usage:
        return self._store.usage()

    def close(self) -> None:
        self._store.close()


def _verify(key: bytes, head: memoryview, parts: Sequence[memoryview], length: int, raw_length: int) -> None:
    if length < HEAD_BYTES:
        raise TruncatedFrame(f"file has {length} bytes, its head has {HEAD_BYTES}")
    frame.verify(
        frame.parse(head),
        namespace=NAMESPACE,
        key=key,
        payload_parts=parts,
        object_length=length,
        raw_length=raw_length,
    )


def _key(name: str) -> bytes:
    return NAMESPACE + hashlib.sha256(name.encode()).digest()
