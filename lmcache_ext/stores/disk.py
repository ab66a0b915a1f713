"""A directory, or several, as a store: shared by processes and nodes, found again after a restart.

One file per object, written under a temporary name and renamed: whole or not there, on NFS too. There
is no index to lose; the directory is the index. Room is bounded across processes by `disk_space`; the
tree is drawn in `disk_scan`; README.md has the format page.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import xxhash

from lmcache_ext.errors import ConfigError, StoreError, StoreUnavailable
from lmcache_ext.stores.base import MAX_KEY_BYTES, NAMESPACE_BYTES, Store, Survey, Usage, surveyed
from lmcache_ext.stores.disk_io import NO_ROOM, os_errors, read_into, unlink_if_there, write_new
from lmcache_ext.stores.disk_scan import list_files, make_directory, namespaces_of, object_path, temporary_name
from lmcache_ext.stores.disk_space import Space

TOUCH_S = 60.0
"""A hit marks its object as used at most this often: the resolution of the LRU order."""

MAX_TOUCHED = 65536
"""How many keys remember when they were last marked; beyond it all forget."""

MAX_DIRECTORY_ATTEMPTS = 8
"""How often a directory that vanishes as soon as it was made is made again."""


class DiskStore(Store):
    """Objects as files below one or several roots.

    Threads:  any number, no lock held over I/O.
    Order:    a returned `put` is seen by this machine at once, over NFS by others within their attribute cache.
    Owner:    the roots belong to all processes that use them; only files named as ours are touched.
    Failure:  StoreFull (no room, even after evicting once) or StoreUnavailable; never an OSError.

    Each key has one root, chosen by rendezvous hashing over the paths: adding a root moves only the
    objects that it takes over (which are then misses, and age out where they lie). `capacity_bytes` is
    for all roots together, in equal shares, since each gets an equal share of the keys; None is no limit.
    """

    def __init__(
        self,
        paths: Sequence[str],
        capacity_bytes: int | None,
        *,
        name: str = "disk",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        roots = list(dict.fromkeys(os.path.abspath(path) for path in paths))
        if not roots:
            raise ConfigError("a disk store needs at least one directory, got none")
        self.name = name
        self._clock = clock
        self._spaces = [Space(root, _share(capacity_bytes, len(roots)), clock=clock) for root in roots]
        self._touched: dict[bytes, float] = {}
        self._touched_lock = threading.Lock()

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """One `stat` per key."""
        with os_errors(f"{self.name}: exists"):
            return [_is_there(self._path(key)) for key in keys]

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        path = self._path(key)
        with os_errors(f"{self.name}: read {path}"):
            try:
                # Not blocking: a pipe that somebody put here must not hold the thread.
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
            try:
                return self._read(fd, key, parts)
            finally:
                os.close(fd)

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        space = self._space(key)
        path = object_path(space.root, _checked(key))
        num_bytes = sum(part.nbytes for part in parts)
        with os_errors(f"{self.name}: write {num_bytes} bytes to {path}"):
            try:
                self._write(space, path, parts, num_bytes)
            except OSError as error:
                if error.errno not in NO_ROOM or not space.make_room(num_bytes):
                    raise
                self._write(space, path, parts, num_bytes)

    def delete(self, keys: Sequence[bytes]) -> None:
        with os_errors(f"{self.name}: delete"):
            for key in keys:
                with suppress(FileNotFoundError):
                    os.unlink(self._path(key))

    def ping(self) -> float:
        """Ask each root for its free space and its first entry; creates a root that is missing."""
        started_at = self._clock()
        for space in self._spaces:
            with os_errors(f"{self.name}: ping {space.root}"):
                os.makedirs(space.root, exist_ok=True)
                os.statvfs(space.root)
                with os.scandir(space.root) as entries:
                    next(entries, None)
        return self._clock() - started_at

    def usage(self) -> Usage:
        """The sum over the roots, at most a minute old."""
        with os_errors(f"{self.name}: usage"):
            usages = [space.usage() for space in self._spaces]
        return Usage(
            _sum([usage.used_bytes for usage in usages]),
            _sum([usage.capacity_bytes for usage in usages]),
            _sum([usage.num_objects for usage in usages]),
        )

    def set_capacity(self, capacity_bytes: int | None) -> None:
        """Change the limit of a running store; a lower one evicts before this returns."""
        failures = []
        for space in self._spaces:
            try:
                with os_errors(f"{self.name}: set capacity"):
                    space.set_capacity(_share(capacity_bytes, len(self._spaces)))
            except StoreError as error:  # of one root; the others evict all the same
                failures.append(error)
        if failures:
            raise failures[0]

    def survey(self) -> list[Survey]:
        """Of each root; walks over it, and removes nothing."""
        return [surveyed(f"{self.name} {space.root}", partial(self._survey, space)) for space in self._spaces]

    def _survey(self, space: Space) -> Survey:
        started_at = self._clock()
        with os_errors(f"{self.name}: survey {space.root}"):
            os.statvfs(space.root)
            ping_s = self._clock() - started_at
            listing = list_files(space.root, None)
        usage = Usage(listing.num_bytes, space.capacity_bytes, len(listing.objects))
        return Survey(f"{self.name} {space.root}", "", ping_s, usage, "lru", namespaces_of(listing))

    def close(self) -> None:
        for space in self._spaces:
            space.close()

    def _read(self, fd: int, key: bytes, parts: Sequence[memoryview]) -> int | None:
        """The object behind `fd`; None where the file server dropped it after we opened it."""
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return None
            num_read = read_into(fd, parts, status.st_size)
        except OSError as error:
            if error.errno == errno.ESTALE:  # evicted by another NFS client
                return None
            raise
        self._touch(fd, key)
        room = sum(part.nbytes for part in parts)
        # The file ended before its own length: somebody cut it. What came is what there is.
        return num_read if num_read < min(room, status.st_size) else status.st_size

    def _touch(self, fd: int, key: bytes) -> None:
        """Mark as used, for the eviction of all processes. Best effort: another's or a read-only file stays old."""
        now = self._clock()
        with self._touched_lock:
            if now - self._touched.get(key, -TOUCH_S) < TOUCH_S:
                return
            if len(self._touched) >= MAX_TOUCHED:
                self._touched.clear()
            self._touched[key] = now
        with suppress(OSError):
            os.utime(fd)

    def _write(self, space: Space, path: str, parts: Sequence[memoryview], num_bytes: int) -> None:
        """Write and rename; make the directory where it is missing, as at first or deleted under our feet."""
        directory = os.path.dirname(path)
        for _ in range(MAX_DIRECTORY_ATTEMPTS):
            lease = space.reserve(num_bytes)
            vanished = False
            try:
                self._write_once(f"{directory}/{temporary_name()}", path, parts)
                return
            except FileNotFoundError:
                vanished = True
            finally:
                space.settle(lease, num_bytes, unused=vanished)
            space.distrust()
            with suppress(FileNotFoundError):  # a pruner was faster
                make_directory(space.root, directory)
        raise StoreUnavailable(f"{self.name}: {directory} vanished {MAX_DIRECTORY_ATTEMPTS} times while writing")

    def _write_once(self, temporary: str, path: str, parts: Sequence[memoryview]) -> None:
        write_new(temporary, parts)
        try:
            os.replace(temporary, path)
        except BaseException:
            unlink_if_there(temporary)
            raise

    def _space(self, key: bytes) -> Space:
        if len(self._spaces) == 1:
            return self._spaces[0]
        return max(self._spaces, key=lambda space: xxhash.xxh3_64_intdigest(space.root.encode() + b"\0" + key))

    def _path(self, key: bytes) -> str:
        return object_path(self._space(key).root, _checked(key))


def _checked(key: bytes) -> bytes:
    if not NAMESPACE_BYTES < len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"key has {len(key)} bytes, expected {NAMESPACE_BYTES + 1} to {MAX_KEY_BYTES}")
    return key


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _share(capacity_bytes: int | None, num_roots: int) -> int | None:
    return None if capacity_bytes is None else capacity_bytes // num_roots


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
