"""How much host memory a cache may take here, and a clear refusal where it may not.

Rows live in one file in ``/dev/shm``: they count against the free space of that mount and against
the memory limit of the cgroup. A pod that ignores either is killed later, under load; we say so at
the start instead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lmcache_ext.errors import ConfigError

_GIB = 1024**3
_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"
_HEADROOM = 0.5  # of what there is, taken when nobody named a size


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that bound the rows. `cgroup_limit_bytes` is None where there is no limit."""

    shm_free_bytes: int
    shm_size_bytes: int
    cgroup_limit_bytes: int | None

    @property
    def bound_bytes(self) -> int:
        """The smaller of the mount's size and the limit: the same number whoever asks, and whenever."""
        return min(self.shm_size_bytes, self.cgroup_limit_bytes or self.shm_size_bytes)


def read_host_memory(
    shm_dir: str = "/dev/shm", cgroup_root: str = "/sys/fs/cgroup", *, own_rows: str | None = None
) -> HostMemory:
    """Look at the mount and at the cgroup (v2, then v1).

    `own_rows` names the file of this engine's rows. An engine's processes ask one after the other, and
    what the first of them has taken already counts as free for the next.
    """
    stat = os.statvfs(shm_dir)
    free = stat.f_bavail * stat.f_frsize + (_taken_bytes(own_rows) if own_rows else 0)
    limit = _read_limit(Path(cgroup_root, "memory.max"))
    if limit is None:
        limit = _read_limit(Path(cgroup_root, "memory", "memory.limit_in_bytes"))
    return HostMemory(free, stat.f_blocks * stat.f_frsize, limit)


def _taken_bytes(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    if not text.isdigit() or int(text) >= _NO_LIMIT:
        return None
    return int(text)


def check_host_bytes(wanted_bytes: int, memory: HostMemory, *, origin: str) -> None:
    """Raise ConfigError where `wanted_bytes` of rows cannot fit; `origin` says who asked for them."""
    limit = memory.cgroup_limit_bytes
    if limit is not None and wanted_bytes > limit:
        raise ConfigError(
            f"max_local_cpu_size of {_gib(wanted_bytes)} ({origin}) exceeds this container's memory limit of "
            f"{_gib(limit)}: raise resources.limits.memory in the InferenceService, or lower max_local_cpu_size"
        )
    if wanted_bytes > memory.shm_free_bytes:
        raise ConfigError(
            f"max_local_cpu_size of {_gib(wanted_bytes)} ({origin}) exceeds the {_gib(memory.shm_free_bytes)} free in "
            "/dev/shm: mount an emptyDir with medium: Memory and a sizeLimit at least that large at /dev/shm, "
            "or lower max_local_cpu_size"
        )


def fitting_bytes(wanted_bytes: int, memory: HostMemory) -> int:
    """What to take when nobody named a size: `wanted_bytes`, or half of what is there if that is less."""
    return min(wanted_bytes, int(memory.bound_bytes * _HEADROOM))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB ({num_bytes} bytes)"
