"""The region of rows in ``/dev/shm``: who creates it, who unlinks it, and what a dead engine left.

vLLM's `SharedOffloadRegion` is mapped by every worker and then by the scheduler, by name. Each of
ours also holds a shared ``flock`` on the file, from before its pages are populated (which takes
seconds), and the scheduler, the last to map it, unlinks the name. So no exit, SIGKILL included,
leaves memory behind once the engine is up; and what an engine killed before that left is recognised
by nobody holding its lock, whatever process ids mean in this container. Files of vLLM's own
offloading have another prefix and are never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from vllm.logger import init_logger
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

logger = init_logger("vllm.lmcache_ext.offload.rows")

_PREFIX = "lmcache_ext-"
_GLOB = f"vllm_offload_{_PREFIX}*.mmap"


def rows_path(engine_id: str) -> str:
    """Where the engine's rows lie until the scheduler has mapped them, as vLLM names it."""
    return f"/dev/shm/vllm_offload_{_PREFIX}{engine_id}.mmap"


def open_rows(
    *, engine_id: str, num_chunks: int, rank: int | None, row_bytes: int, worker_bytes: int
) -> SharedOffloadRegion:
    """Map the engine's rows. `rank` None is the scheduler, which must come after every worker.

    Rows are `row_bytes` long (a multiple of the page size); rank r owns bytes
    [r * worker_bytes, (r + 1) * worker_bytes) of each.
    """
    if rank == 0:
        sweep_dead_rows()
    path = rows_path(engine_id)
    claim = _claim(path, num_chunks * row_bytes, create=rank is not None)
    try:
        region = SharedOffloadRegion(
            engine_id=f"{_PREFIX}{engine_id}",
            num_chunks=num_chunks,
            rank=rank,
            kv_bytes_per_chunk=row_bytes,
            cpu_page_size=worker_bytes,
        )
        assert region.fd is not None
        fcntl.flock(region.fd, fcntl.LOCK_SH)
    finally:
        os.close(claim)
    if rank is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return region


def _claim(path: str, num_bytes: int, *, create: bool) -> int:
    """Open the file, at least `num_bytes` long, under a shared lock: nobody sweeps it from here on."""
    while True:
        fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        stat = os.fstat(fd)
        if stat.st_nlink:
            break
        os.close(fd)  # a dead engine's file of the same name, swept between open and lock
    if stat.st_size < num_bytes:
        os.ftruncate(fd, num_bytes)
    return fd


def sweep_dead_rows(directory: str = "/dev/shm") -> int:
    """Unlink the rows of engines that no longer live; returns the bytes given back."""
    freed = 0
    for path in Path(directory).glob(_GLOB):
        with contextlib.suppress(OSError):
            freed += _unlink_if_dead(path)
    if freed:
        logger.warning("Reclaimed %.2f GiB in %s that a killed engine left behind", freed / 2**30, directory)
    return freed


def _unlink_if_dead(path: Path) -> int:
    stat = path.stat()
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    else:
        path.unlink()
        return stat.st_blocks * 512
    finally:
        os.close(fd)
