"""A real Mooncake for tests: the master, and processes that bring segments, on free loopback ports."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import Server, free_port

MIB = 1024**2
INSTALL = "pip install mooncake-transfer-engine-non-cuda; apt-get install libibverbs1 librdmacm1 libcurl4"

OWNER = """
import sys, mooncake.store
client = mooncake.store.MooncakeDistributedStore()
code = client.setup("127.0.0.1", sys.argv[2], int(sys.argv[3]), 16 * 1024**2, "tcp", "", sys.argv[1])
print("ready" if code == 0 else f"setup: {code}", flush=True)
sys.stdin.read()
client.close()
"""


def needs_mooncake() -> None:
    """Skip where its package, or a Debian library that it links to, is absent."""
    if importlib.util.find_spec("mooncake") is None:
        pytest.skip(f"no mooncake: {INSTALL}")
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        pytest.skip(f"{error}: {INSTALL}")


@contextmanager
def master(directory: Path, *arguments: str) -> Iterator[Server]:
    """The master, whose clients are given up after 3 s of silence; it can be killed and started again."""
    needs_mooncake()
    spec = importlib.util.find_spec("mooncake")
    assert spec is not None
    assert spec.origin is not None
    binary, port = Path(spec.origin).parent / "mooncake_master", free_port()
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    flags = [f"-rpc_port={port}", f"-metrics_port={free_port()}", "-client_ttl=3", "-logtostderr", *arguments]
    one = Server(str(binary), directory, *flags, port=port)
    try:
        yield one.start()
    finally:
        one.kill()


@contextmanager
def owner(address: str, *, num_bytes: int = 256 * MIB, metadata: str = "P2PHANDSHAKE") -> Iterator[subprocess.Popen]:
    """A process that holds a segment of the store, as another engine would."""
    command = [sys.executable, "-c", OWNER, address, metadata, str(num_bytes)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()
