"""Which cores our threads run on: those the model does not compute on.

vLLM pins a CPU worker's main thread to its compute cores, and a thread starts with the affinity of
whoever started it. Where worker and scheduler share a process (one rank), that is every thread of ours:
left alone they would checksum and write on the very core that decodes.
"""

from __future__ import annotations

import os

from vllm.logger import init_logger

logger = init_logger("vllm.lmcache_ext.offload.cores")


def spare_cores() -> set[int] | None:
    """The cores this process may use and does not compute on; all it may use where none is left.

    None where the parent's affinity cannot be seen: stay where you are.
    """
    try:
        pinned, allowed = os.sched_getaffinity(0), os.sched_getaffinity(os.getppid())
    except OSError:
        logger.info("The KV cache shares the compute cores: no view of the parent's CPU affinity")
        return None
    return (allowed - pinned) or allowed


def leave_compute_cores() -> None:
    """Bind the calling thread to the spare cores. Call it once, from a thread that inherited its starter's."""
    cores = spare_cores()
    if cores is None:
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        logger.info("The KV cache shares the compute cores: %s", error)
