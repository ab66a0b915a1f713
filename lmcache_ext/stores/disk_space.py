"""Bounded room in one root, shared by processes on any number of nodes, without a lock.

A process may write only bytes that it has *published* as its own before: it creates a lease file whose
name says how many, and only then looks at what is there, evicts the oldest objects until everything
fits, and begins to write. A lease is dropped when it is used up and the last write charged to it is
done.

Invariant: objects + temporary files + what is left of all granted leases <= capacity, where a file
counts with its length.

Why it holds. Take the granted lease that was published last, P. Whatever changed while P looked around
was charged to a lease that P saw (they stay until their writes are done), so P counted it, at least
once; what no lease covered did not grow. P began to write only when that count fitted. A lease
published after P's look-around sees P's, whole, and must itself make everything fit. So of two writers
at the same moment at least one sees the other; often both do, and then both evict, which is harmless:
each bound is an upper one. A file that vanishes during the look-around only makes the count too high;
an object that was replaced before we evict it was counted too, in a lease.

What the invariant does not survive: a process stopped for STALE_S between taking its bytes and writing
them; capacities that differ between processes (the largest rules); and on NFS, a directory listing of
another node's writes that is older than its attribute cache admits (see README.md).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from lmcache_ext.errors import StoreFull
from lmcache_ext.stores.base import Usage
from lmcache_ext.stores.disk_io import unlink_if_there
from lmcache_ext.stores.disk_scan import (
    STALE_S,
    Listing,
    create_lease,
    evict,
    list_files,
    list_leases,
    server_time,
)

SMALL_LEASE_BYTES = 256 * 1024**2
"""A lease of more is taken only from large stores, where a walk over the tree costs seconds."""

REFRESH_S = STALE_S / 10
"""A lease older than this is touched, and so found to be still ours, before it is written from."""

USAGE_S = 60.0
USAGE_DUTY = 20
"""`usage` walks the tree at most every USAGE_S, and at most one part in USAGE_DUTY of the time."""


@dataclass(slots=True, eq=False)
class Lease:
    """Room published as ours; `left` of it is not spoken for, `in_flight` bytes are being written."""

    path: str
    num_bytes: int
    left: int
    touched_at: float
    in_flight: int = 0
    num_writes: int = 0
    retired: bool = False


@dataclass(slots=True)
class _Seen:
    """The last walk over the tree, and what this process wrote since."""

    at: float
    took_s: float
    num_bytes: int
    num_objects: int


class Space:
    """The room of one root. Methods raise StoreFull or OSError; the latter is the caller's to map.

    `_lock` guards the accounting and is never held over I/O; `_renewing` lets one thread at a time look
    around and evict, while others go on writing from the lease they have.
    """

    def __init__(self, root: str, capacity_bytes: int | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.root = root
        self._capacity = capacity_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._lease: Lease | None = None
        self._retired: list[Lease] = []
        self._seen: _Seen | None = None

    @property
    def capacity_bytes(self) -> int | None:
        return self._capacity

    def reserve(self, num_bytes: int) -> Lease | None:
        """Room for one write, evicting if need be; None where there is no limit. Give it to `settle`."""
        capacity = self._capacity
        if capacity is None:
            return None
        if num_bytes > capacity:
            raise StoreFull(f"{self.root}: object of {num_bytes} bytes, capacity is {capacity}")
        lease = self._charge(num_bytes)
        if lease is None:
            with self._renewing:
                lease = self._charge(num_bytes) or self._renew(num_bytes, capacity)
        return lease

    def settle(self, lease: Lease | None, num_bytes: int, *, unused: bool) -> None:
        """The write is over; `unused` where it surely left no file, and its bytes may be spent again."""
        with self._lock:
            if not unused and self._seen is not None:
                self._seen.num_bytes += num_bytes
                self._seen.num_objects += 1
            if lease is None:
                return
            lease.in_flight -= num_bytes
            lease.num_writes -= 1
            if unused:
                lease.left += num_bytes
            is_done = lease.retired and lease.num_writes == 0
            self._retired = [other for other in self._retired if not (is_done and other is lease)]
        if is_done:
            unlink_if_there(lease.path)

    def distrust(self) -> None:
        """Something under the root is gone: somebody removed it, and perhaps our lease with it."""
        with self._renewing:
            if self._lease is not None and not self._refresh(self._lease):
                self._retire()

    def make_room(self, num_bytes: int) -> bool:
        """The file system is full: evict a sixteenth, or `num_bytes` if that is more. Whether it helped."""
        with self._renewing:
            listing = self._walk(self._now())
            wanted = max(num_bytes, min(listing.num_bytes // 16, SMALL_LEASE_BYTES))
            return self._evict(listing, wanted) > 0

    def set_capacity(self, capacity_bytes: int | None) -> None:
        """Change the limit, and evict down to it at once. Other processes keep theirs until told."""
        with self._renewing:
            self._capacity = capacity_bytes
            self._retire()
            if capacity_bytes is not None:
                in_flight = self._in_flight()
                listing = self._walk(None)
                self._evict(listing, listing.num_bytes + in_flight - capacity_bytes)

    def usage(self) -> Usage:
        """What the last walk found plus what was written since; walks again when that is old and nobody evicts."""
        seen = self._seen
        is_old = seen is None or self._clock() - seen.at > max(USAGE_S, USAGE_DUTY * seen.took_s)
        if is_old and self._renewing.acquire(blocking=False):
            try:
                self._walk(self._now())
            finally:
                self._renewing.release()
        seen = self._seen
        return Usage(seen.num_bytes if seen else None, self._capacity, seen.num_objects if seen else None)

    def close(self) -> None:
        """Give back all leases."""
        with self._lock:
            leases = [*self._retired, *([self._lease] if self._lease else [])]
            self._lease, self._retired = None, []
        for lease in leases:
            unlink_if_there(lease.path)

    def _charge(self, num_bytes: int) -> Lease | None:
        """Take bytes from the lease we hold; None if it has too few, or was not refreshed for long."""
        with self._lock:
            lease = self._lease
            if lease is None or lease.left < num_bytes or self._clock() - lease.touched_at > REFRESH_S:
                return None
            lease.left -= num_bytes
            lease.in_flight += num_bytes
            lease.num_writes += 1
            return lease

    def _renew(self, num_bytes: int, capacity: int) -> Lease:
        """Refresh the lease if that is all it needs, else replace it and take the bytes from the new one."""
        if self._lease is not None and self._lease.left >= num_bytes and self._refresh(self._lease):
            lease = self._charge(num_bytes)
            if lease is not None:
                return lease
        self._retire()
        for size in self._lease_sizes(num_bytes, capacity):
            lease = self._acquire(size, num_bytes, capacity)
            if lease is not None:
                return lease
        raise StoreFull(f"{self.root}: no room for {num_bytes} bytes beside the leases of others in {capacity}")

    def _lease_sizes(self, num_bytes: int, capacity: int) -> Iterator[int]:
        """A size that buys a while without looking around, then just what is needed.

        A sixteenth of the capacity up to SMALL_LEASE_BYTES, a sixty-fourth beyond; less where there are more
        than four writers: room that is spoken for holds no objects.
        """
        num_others = 0
        with suppress(OSError):
            num_others = len(os.listdir(f"{self.root}/.leases"))
        roomy = min(capacity // 16, max(capacity // 64, SMALL_LEASE_BYTES), capacity // 4 // (num_others + 1))
        if roomy > num_bytes:
            yield roomy
        yield num_bytes

    def _acquire(self, size: int, num_bytes: int, capacity: int) -> Lease | None:
        """Publish a lease, then make everything fit beside it; None, and the lease is gone, where it cannot."""
        touched_at = self._clock()
        path, now = create_lease(self.root, size)
        lease = Lease(path, size, size - num_bytes, touched_at, in_flight=num_bytes, num_writes=1)
        granted = False
        try:
            granted = self._fit(lease, now, capacity, spare=size > num_bytes)
        finally:
            if not granted:
                unlink_if_there(path)
        if not granted:
            return None
        with self._lock:
            self._lease = lease
        return lease

    def _fit(self, lease: Lease, now: float, capacity: int, *, spare: bool) -> bool:
        """Evict until objects, temporary files and all leases fit; False, evicting nothing, where leases forbid it.

        Of our own retired leases only what is in flight counts, and that is read before the walk: a write
        that ends in between is then counted twice, never not at all.
        """
        with self._lock:
            ours = {retired.path for retired in self._retired} | {lease.path}
        reserved = lease.num_bytes + self._in_flight()
        leases = list_leases(self.root, now)
        reserved += sum(size for path, size in leases.items() if path not in ours)
        # A lease with room to spare may not cost more than half of what is stored.
        if reserved > (capacity // 2 if spare else capacity):
            return False
        listing = self._walk(now)
        excess = reserved + listing.num_bytes - capacity
        return self._evict(listing, excess) >= excess

    def _in_flight(self) -> int:
        with self._lock:
            return sum(retired.in_flight for retired in self._retired)

    def _retire(self) -> None:
        """Let go of the lease; its file stays until the last write charged to it is done."""
        with self._lock:
            lease, self._lease = self._lease, None
            if lease is None:
                return
            lease.retired = True
            is_busy = lease.num_writes > 0
            if is_busy:
                self._retired.append(lease)
        if not is_busy:
            unlink_if_there(lease.path)

    def _refresh(self, lease: Lease) -> bool:
        """Touch the lease by the file server's clock; False where it was, or may just be, taken from us."""
        touched_at = self._clock()
        if touched_at - lease.touched_at > STALE_S / 2:
            return False
        try:
            os.utime(lease.path)
        except FileNotFoundError:
            return False
        lease.touched_at = touched_at
        return True

    def _now(self) -> float | None:
        """The file server's clock, or None where it cannot be asked (read-only, full): then nothing is stale."""
        try:
            now = server_time(self.root)
        except OSError:
            return None
        list_leases(self.root, now)
        return now

    def _walk(self, now: float | None) -> Listing:
        started_at = self._clock()
        listing = list_files(self.root, now)
        at = self._clock()
        with self._lock:
            self._seen = _Seen(at, at - started_at, listing.num_bytes, len(listing.objects))
        return listing

    def _evict(self, listing: Listing, excess: int) -> int:
        """Remove the oldest objects until `excess` bytes are free; how many became so."""
        evicted = evict(listing, excess)
        with self._lock:
            if self._seen is not None:
                self._seen.num_bytes -= evicted.num_bytes
                self._seen.num_objects -= len(evicted.objects)
        return evicted.num_bytes
