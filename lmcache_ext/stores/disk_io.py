"""Vectored file reads and writes that finish, and the one place where an errno becomes a StoreError."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lmcache_ext.errors import StoreFull, StoreUnavailable

IOV_MAX = 1024
"""Linux UIO_MAXIOV: more buffers in one call are EINVAL."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Full, and eviction may help. EFBIG is full too, but no eviction makes a file-size limit larger."""

FILE_MODE = 0o660
DIRECTORY_MODE = 0o770
"""Less the umask. 022 (the usual): the same user shares; 002: the group (a pod's fsGroup) shares. Never others."""


@contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """Turn an OSError raised inside into StoreFull or StoreUnavailable, saying what was being done."""
    try:
        yield
    except OSError as error:
        message = f"{doing}: {errno.errorcode.get(error.errno or 0, 'OSError')} {error}"
        if error.errno in NO_ROOM or error.errno == errno.EFBIG:
            raise StoreFull(message) from error
        raise StoreUnavailable(message) from error


def read_into(fd: int, parts: Sequence[memoryview], length: int) -> int:
    """Fill `parts` with the first `length` bytes of the file, never past their end; how many came."""

    def read(window: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, window, offset)

    return _transfer(read, parts, length)


def write_all(fd: int, parts: Sequence[memoryview]) -> None:
    """Write the concatenation of `parts`. Raises OSError; short writes go on."""

    def write(window: Sequence[memoryview], _offset: int) -> int:
        return os.writev(fd, window)

    total = sum(part.nbytes for part in parts)
    done = _transfer(write, parts, total)
    if done != total:
        raise OSError(errno.EIO, f"wrote {done} bytes, expected {total}")


def write_new(path: str, parts: Sequence[memoryview]) -> None:
    """Create `path` with the concatenation of `parts`; on any failure it is gone again.

    Not synced: what a power loss tears is found by the frame's checksum. A close that fails (NFS and
    quotas report there) is a write that failed.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        try:
            write_all(fd, parts)
        finally:
            os.close(fd)
    except BaseException:
        unlink_if_there(path)
        raise


def unlink_if_there(path: str) -> bool:
    """Remove a file as cleanup; whether it is gone now. Never raises: an older error is under way."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _transfer(call: Callable[[Sequence[memoryview], int], int], parts: Sequence[memoryview], length: int) -> int:
    """Repeat a vectored system call over `parts` until `length` bytes, their end, or a call that moves none."""
    left = [part.cast("B") for part in parts if part.nbytes]
    length = min(length, sum(part.nbytes for part in left))
    first, done = 0, 0
    while done < length:
        moved = call(left[first : first + IOV_MAX], done)
        if moved == 0:
            break
        done += moved
        while first < len(left) and moved >= left[first].nbytes:
            moved -= left[first].nbytes
            first += 1
        if moved:
            left[first] = left[first][moved:]
    return done
