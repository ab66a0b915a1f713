"""The region of rows in ``/dev/shm``: who creates it, who unlinks it, and what a dead engine left.

vLLM's `SharedOffloadRegion` is mapped by every worker and then by the scheduler, by name. Each of
ours also holds a shared ``flock`` on the file, and the scheduler, the last to map it, unlinks the
name. So no exit, SIGKILL included, leaves memory behind once the engine is up; and what an engine
killed before that left is recognised by nobody holding its lock, whatever process ids mean in this
container. Files of vLLM's own offloading have another prefix and are never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from vllm.logger import init_logger
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

logger = init_logger("vllm.lmcache_ext.offload.rows")

_PREFIX = "lmcache_ext-"
_GLOB = f"vllm_offload_{_PREFIX}*.mmap"
_GRACE_S = 5.0  # between a file's creation and its lock


def open_rows(
    *, engine_id: str, num_chunks: int, rank: int | None, row_bytes: int, worker_bytes: int
) -> SharedOffloadRegion:
    """Map the engine's rows. `rank` None is the scheduler, which must come after every worker.

    Rows are `row_bytes` long (a multiple of the page size); rank r owns bytes
    [r * worker_bytes, (r + 1) * worker_bytes) of each.
    """
    if rank == 0:
        sweep_dead_rows()
    region = SharedOffloadRegion(
        engine_id=f"{_PREFIX}{engine_id}",
        num_chunks=num_chunks,
        rank=rank,
        kv_bytes_per_chunk=row_bytes,
        cpu_page_size=worker_bytes,
    )
    assert region.fd is not None
    fcntl.flock(region.fd, fcntl.LOCK_SH)
    region._creator = False  # the name is the scheduler's to drop, or the next start's
    if rank is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(region.mmap_path)
    return region


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
    if time.time() - stat.st_ctime < _GRACE_S:
        return 0
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
