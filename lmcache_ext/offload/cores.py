"""Which cores our threads run on: those the model does not compute on.

vLLM pins a CPU worker's main thread to its compute cores, and a thread starts with the affinity of
whoever started it. In the worker that is every thread of ours; the scheduler's process is not pinned, its
threads may go anywhere, and its workers are its children. Left alone both would checksum and write on the very
core that decodes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
from vllm.logger import init_logger

logger = init_logger("vllm.lmcache_ext.offload.cores")


def spare_cores() -> set[int] | None:
    """The cores this process may use and its engine does not compute on; all it may use where none is left.

    The scheduler asks once its workers are pinned. None where the parent's affinity cannot be seen: stay where you are.
    """
    try:
        allowed = os.sched_getaffinity(os.getppid())
    except OSError:
        logger.info("The KV cache shares the compute cores: no view of the parent's CPU affinity")
        return None
    pinned: set[int] = set()
    for cores in _affinities():
        if cores < allowed:
            pinned |= cores
    return (allowed - pinned) or allowed


def _affinities() -> Iterator[set[int]]:
    """Of this thread and of the main thread of each process below this one."""
    yield os.sched_getaffinity(0)
    for child in psutil.Process().children(recursive=True):
        try:
            yield os.sched_getaffinity(child.pid)
        except OSError:  # it has ended
            continue


def leave_compute_cores() -> None:
    """Bind the calling thread to the spare cores. Call it once, from a thread that inherited its starter's."""
    cores = spare_cores()
    if cores is None:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        logger.info("The KV cache shares the compute cores: %s", error)
