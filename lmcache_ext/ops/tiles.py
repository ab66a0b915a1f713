"""Asks Linux for the tile registers (AMX) that vLLM's attention on CPUs uses without asking.

The kernel gives them to a process that asks, and SIGILL to one that does not. A large matrix product has oneDNN ask,
so an engine that computes a long prompt first never notices. One whose first prompt comes from the cache but for a
token computes nothing large before its attention, and dies. So does vLLM 0.32 without a cache, when its first prompt
is one token long (bfloat16, `--enforce-eager`).
"""

from __future__ import annotations

import ctypes
import platform

# Linux' Documentation/arch/x86/xstate.rst
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def ask_for_tiles() -> bool:
    """Let all threads of this process use AMX; whether they may. A CPU without it, or an older kernel, says no."""
    if platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)
