"""A network of the test's own: namespaces on a bridge that is in a namespace too, so nothing leaves it.

Needs root and `ip` (iproute2), which every Debian has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

PREFIX = "10.77.0"


@contextmanager
def network(count: int) -> Iterator[Sequence[tuple[str, str]]]:
    """(name of a namespace, its address) for `count` pods that reach each other and nobody else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make a network: apt-get install iproute2")
    tag = f"lm{os.getpid()}"
    with ExitStack() as stack:
        bridge = _namespace(stack, f"{tag}-bridge")
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        found = []
        for index in range(1, count + 1):
            name, address = _namespace(stack, f"{tag}-{index}"), f"{PREFIX}.{index}"
            _ip("-n", bridge, "link", "add", f"v{index}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", bridge, "link", "set", f"v{index}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            found.append((name, address))
        yield found


def _namespace(stack: ExitStack, name: str) -> str:
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    return name


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10)
