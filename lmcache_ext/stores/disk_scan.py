"""What lies in one root: the tree, its names, and a walk over it.

    <root>/<32 hex: namespace>/<2 hex>/<hex of the key's rest>.kv    an object
    <root>/<32 hex: namespace>/<2 hex>/<32 hex>.tmp                  an object being written
    <root>/.leases/<32 hex>-<bytes>.lease                            an empty file: room spoken for

Whatever does not look exactly so is somebody else's: it is neither counted nor touched.
"""

from __future__ import annotations

import os
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_ext.stores.base import NAMESPACE_BYTES
from lmcache_ext.stores.disk_io import DIRECTORY_MODE, FILE_MODE, unlink_if_there

LEASES = ".leases"

STALE_S = 600.0
"""A lease or temporary file untouched for so long belongs to a dead process."""

_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_LEAF = re.compile(r"[0-9a-f]{2}")
_OBJECT = re.compile(r"(?:[0-9a-f]{2})+\.kv")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.tmp")
_LEASE = re.compile(r"[0-9a-f]{32}-([0-9]{1,19})\.lease")


class StoredFile(NamedTuple):
    """One object, ordered by age: the least recently used first."""

    mtime: float
    path: str
    num_bytes: int


@dataclass(slots=True)
class Listing:
    """The objects of a root, and the bytes of objects and temporary files together."""

    objects: list[StoredFile] = field(default_factory=list)
    num_bytes: int = 0


def object_path(root: str, key: bytes) -> str:
    """Where the object of `key` lies. The first byte after the namespace chooses the leaf directory."""
    rest = key[NAMESPACE_BYTES:].hex()
    return f"{root}/{key[:NAMESPACE_BYTES].hex()}/{rest[:2]}/{rest}.kv"


def temporary_name() -> str:
    """A name no other process on any node uses."""
    return f"{uuid.uuid4().hex}.tmp"


def make_directory(root: str, path: str) -> None:
    """Create `path`, `root` or a directory below it. A pruner may be faster: the caller tries again."""
    os.makedirs(root, exist_ok=True)
    built = root
    for name in os.path.relpath(path, root).split(os.sep):
        built = os.path.join(built, name)
        with suppress(FileExistsError):
            os.mkdir(built, DIRECTORY_MODE)


def create_lease(root: str, num_bytes: int) -> tuple[str, float]:
    """Publish a lease; its path and its creation time by the file server's clock."""
    make_directory(root, f"{root}/{LEASES}")
    path = f"{root}/{LEASES}/{uuid.uuid4().hex}-{num_bytes}.lease"
    return path, _create_empty(path)


def server_time(root: str) -> float:
    """What the file server's clock says: the only one by which all nodes judge age. Creates no root."""
    with suppress(FileExistsError):
        os.mkdir(f"{root}/{LEASES}", DIRECTORY_MODE)
    path = f"{root}/{LEASES}/{temporary_name()}"
    try:
        return _create_empty(path)
    finally:
        unlink_if_there(path)


def list_leases(root: str, now: float) -> dict[str, int]:
    """Bytes of each live lease by path; the dead ones are removed on the way."""
    leases: dict[str, int] = {}
    for entry in _entries(f"{root}/{LEASES}"):
        match = _LEASE.fullmatch(entry.name)
        if match is None and not _TEMPORARY.fullmatch(entry.name):
            continue
        with suppress(FileNotFoundError):
            if _stale(entry.stat(follow_symlinks=False).st_mtime, now) and unlink_if_there(entry.path):
                continue
            if match is not None:
                leases[entry.path] = int(match[1])
    return leases


def list_files(root: str, now: float | None) -> Listing:
    """Walk the root. With `now`, dead temporary files and long-empty directories are removed on the way."""
    listing = Listing()
    for namespace in _entries(root):
        if not _NAMESPACE.fullmatch(namespace.name):
            continue
        is_empty = True
        for leaf in _entries(namespace.path):
            is_empty = False
            if _LEAF.fullmatch(leaf.name) and not _list_leaf(leaf.path, listing, now):
                _prune(leaf.path, now)
        if is_empty:
            _prune(namespace.path, now)
    return listing


def namespaces_of(listing: Listing) -> Counter[str]:
    """How many objects there are of each namespace (hex)."""
    return Counter(file.path.split("/")[-3] for file in listing.objects)


def evict(listing: Listing, excess: int) -> Listing:
    """Remove the oldest objects until `excess` bytes are free; what became so.

    One that vanished meanwhile is free too. One that we may not remove (sticky directory, other owner)
    is passed over. Raises OSError.
    """
    evicted = Listing()
    for file in sorted(listing.objects) if excess > 0 else ():
        if evicted.num_bytes >= excess:
            break
        try:
            with suppress(FileNotFoundError):
                os.unlink(file.path)
        except PermissionError:
            continue
        evicted.objects.append(file)
        evicted.num_bytes += file.num_bytes
    return evicted


def _list_leaf(path: str, listing: Listing, now: float | None) -> bool:
    """Add one leaf directory to the listing; whether anything is in it."""
    found = False
    for entry in _entries(path):
        found = True
        is_object = _OBJECT.fullmatch(entry.name) is not None
        if not is_object and not _TEMPORARY.fullmatch(entry.name):
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if is_object:
            listing.objects.append(StoredFile(status.st_mtime, entry.path, status.st_size))
        elif _stale(status.st_mtime, now) and unlink_if_there(entry.path):
            continue
        listing.num_bytes += status.st_size
    return found


def _prune(path: str, now: float | None) -> None:
    """Remove a directory that has been empty for long; one that is in use, or already gone, stays as it is."""
    with suppress(OSError):
        if _stale(os.stat(path).st_mtime, now):
            os.rmdir(path)


def _stale(mtime: float, now: float | None) -> bool:
    return now is not None and now - mtime > STALE_S


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    """The entries of a directory; none where it vanished or is a file."""
    try:
        with os.scandir(path) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return


def _create_empty(path: str) -> float:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)
