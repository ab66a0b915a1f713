"""The command line of the cache server, and what it amounts to on this machine."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from lmcache_ext.daemons.arguments import Parser, count, port, seconds
from lmcache_ext.daemons.lm_policy import POLICIES
from lmcache_ext.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parse(argv: Sequence[str | int] | None, prog: str) -> argparse.Namespace:
    """The arguments, checked one against the other. Exits with 2 and one line where they cannot be honoured."""
    parser = _parser(prog)
    arguments = parser.parse_args(None if argv is None else [str(word) for word in argv])  # 8080 unquoted in YAML
    try:
        _settle(arguments)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    return arguments


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description="A cache server for lm:// clients, this package's and LMCache's.")
    parser.add_argument("host", metavar="HOST", help="address to listen on, such as localhost or 0.0.0.0")
    parser.add_argument("port", metavar="PORT", type=port, help="0 takes a free one and prints it")
    parser.add_argument("device", metavar="DEVICE", nargs="?", default="cpu", help="accepted for LMCache's sake")
    room = parser.add_argument_group("room")
    room.add_argument("--max-bytes", type=size, help="memory for objects, default 80%% of the limit of the container")
    room.add_argument("--policy", choices=sorted(POLICIES), default="lru", help="which object goes when room is needed")
    room.add_argument(
        "--max-object-bytes", type=size, help="default 1 GiB, or a quarter of --max-bytes if that is less"
    )
    room.add_argument("--data-dir", help="keep objects here too, and find them after a restart")
    room.add_argument("--max-disk-bytes", type=size, help="default 80%% of what the directory holds and could hold")
    access = parser.add_argument_group("access")
    access.add_argument("--auth-token-file", help="clients must send this token; LMCache's cannot")
    access.add_argument("--tls-cert", help="PEM file; with --tls-key all connections are TLS")
    access.add_argument("--tls-key", help="PEM file")
    access.add_argument("--tls-client-ca", help="PEM file; clients must show a certificate signed by it")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-connections", type=count, default=4096)
    limits.add_argument("--max-in-flight", type=count, default=128, help="unanswered requests per connection")
    limits.add_argument("--read-timeout", type=seconds, default=30.0, metavar="S", help="for a request to come through")
    limits.add_argument("--idle-timeout", type=seconds, default=0.0, metavar="S", help="default 0, for ever")
    limits.add_argument("--grace", type=seconds, default=10.0, metavar="S", help="for requests under way at SIGTERM")
    watch = parser.add_argument_group("watching it")
    watch.add_argument("--http-port", type=port, help="serve /metrics and /healthz here; off unless given")
    watch.add_argument("--http-host", help="default HOST")
    watch.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    return parser


def size(text: str) -> int:
    """`512Mi`, `2GiB`, `1.5G`, `1000`: bytes. Raises argparse's error."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected such as 512Mi, 20Gi or 1000000")
    return math.floor(float(found[1]) * _UNITS[found[2]])


def memory_limit(paths: Sequence[str] = _CGROUP_LIMITS) -> int:
    """What this process may use at most: the container's limit, or the machine's memory."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in (*paths, *_own_cgroup()):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) > 0:
            limit = min(limit, int(text))
    return limit


def _own_cgroup() -> list[str]:
    """Where a process outside of containers finds its own limit (systemd's MemoryMax)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    return [f"/sys/fs/cgroup{line[3:]}/memory.max" for line in lines if line.startswith("0::/")]


def _settle(arguments: argparse.Namespace) -> None:
    if arguments.max_bytes is None:
        arguments.max_bytes = memory_limit() * 8 // 10
    if arguments.max_object_bytes is None:
        arguments.max_object_bytes = min(2**30, max(arguments.max_bytes // 4, 1))
    if arguments.max_object_bytes > arguments.max_bytes:
        raise ConfigError(f"--max-object-bytes {arguments.max_object_bytes} is above --max-bytes {arguments.max_bytes}")
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise ConfigError("--tls-cert and --tls-key belong together, and one is missing")
    if arguments.tls_client_ca and not arguments.tls_cert:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    if arguments.max_disk_bytes is not None and arguments.data_dir is None:
        raise ConfigError("--max-disk-bytes needs --data-dir")
    if arguments.data_dir is not None:
        os.makedirs(arguments.data_dir, exist_ok=True)
        if arguments.max_disk_bytes is None:
            arguments.max_disk_bytes = _disk_room(arguments.data_dir)


def _disk_room(path: str) -> int:
    """80 % of what is free there and what the directory itself holds."""
    held = sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)
    return (shutil.disk_usage(path).free + held) * 8 // 10
