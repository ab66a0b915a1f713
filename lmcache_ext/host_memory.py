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
_HEADROOM = 0.5  # of what is free, taken when nobody named a size


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that bound the rows. `cgroup_limit_bytes` is None where there is no limit."""

    shm_free_bytes: int
    cgroup_limit_bytes: int | None

    @property
    def bound_bytes(self) -> int:
        """The smaller of the two bounds, in bytes."""
        return min(self.shm_free_bytes, self.cgroup_limit_bytes or self.shm_free_bytes)


def read_host_memory(shm_dir: str = "/dev/shm", cgroup_root: str = "/sys/fs/cgroup") -> HostMemory:
    """Look at the mount and at the cgroup (v2, then v1)."""
    stat = os.statvfs(shm_dir)
    limit = _read_limit(Path(cgroup_root, "memory.max"))
    if limit is None:
        limit = _read_limit(Path(cgroup_root, "memory", "memory.limit_in_bytes"))
    return HostMemory(stat.f_bavail * stat.f_frsize, limit)


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
