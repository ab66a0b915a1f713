"""Both ends of `lm://` for the tests: our server as a process, and LMCache 0.5's server and client as it has them."""

from __future__ import annotations

import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lmcache_ext.stores.lmserver import LMServerStore, Settings
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.wire import v2

START_S = 20.0
PATIENT = Settings(connect_timeout_s=10.0, lookup_timeout_s=10.0, timeout_s=20.0)


class ServerProcess:
    """`lmcache_server` on a free port of this machine."""

    def __init__(self, *options: str, port: int = 0, host: str = "127.0.0.1") -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "lmcache_ext.daemons.lmserver", host, str(port), *options]
        self.process = subprocess.Popen(command, stderr=self._log, cwd=Path(__file__).parent.parent)
        self.port = int(self.wait_for(r"listening on \S+:(\d+)"))

    def wait_for(self, pattern: str) -> str:
        """The first group of a pattern that comes up in the log."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            found = re.search(pattern, self.log())
            if found:
                return found[1] if found.groups() else found[0]
            assert self.process.poll() is None, self.log()
            time.sleep(0.01)
        raise AssertionError(f"{pattern} did not come up in: {self.log()}")

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.port)

    def store(self, settings: Settings = PATIENT) -> LMServerStore:
        return LMServerStore(self.address, settings)

    def dial(self) -> OldClient:
        return OldClient(self.port)

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        self._log.close()
        return code


@contextmanager
def serving(*options: str, port: int = 0) -> Iterator[ServerProcess]:
    server = ServerProcess(*options, port=port)
    try:
        yield server
    finally:
        server.stop()


def clear(server: ServerProcess) -> None:
    """Empty a server of objects with plain names, so that the next test need not start another."""
    with server.dial() as client:
        names = client.list().split()
        client.change_over()
        keys = [bytes.fromhex(name.split("@")[3]) for name in names if name.startswith("kvcf@")]
        client.exchange(v2.Op.DELETE, body=v2.encode_keys(keys))


class OldClient:
    """LMCache's client: one blocking socket, exact frames, no acknowledgement of a PUT."""

    def __init__(self, port: int, timeout_s: float = 10.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout_s)

    def __enter__(self) -> OldClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @staticmethod
    def frame(
        command: int, key: str, length: int = 0, fmt: int = 1, dtype: int = 2, shape: Sequence[int] = ()
    ) -> bytes:
        padded = [*shape, 0, 0, 0, 0][:4]
        return struct.pack("<9i150s", command, length, fmt, dtype, 0, *padded, key.encode().ljust(150))

    def put(
        self, key: str, data: bytes, fmt: int = 1, dtype: int = 3, shape: Sequence[int] = (2, 32, 256, 1024)
    ) -> None:
        self.sock.sendall(self.frame(1, key, len(data), fmt, dtype, shape) + data)

    def get(self, key: str) -> tuple[tuple[int, ...], bytes]:
        self.sock.sendall(self.frame(2, key))
        reply = self.reply()
        return reply, self.exactly(reply[1])

    def exist(self, key: str) -> bool:
        self.sock.sendall(self.frame(3, key))
        return self.reply()[0] == 200

    def list(self) -> str:
        self.sock.sendall(self.frame(4, "a@b@c@d@e"))
        return self.exactly(self.reply()[1]).decode()

    def health(self, key: str = "a@1@0@0@half") -> tuple[int, ...]:
        self.sock.sendall(self.frame(5, key))
        return self.reply()

    def reply(self) -> tuple[int, ...]:
        return struct.unpack("<9i", self.exactly(36))

    def exactly(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            came = self.sock.recv(num_bytes - len(data))
            if not came:
                raise ConnectionError(f"closed after {len(data)} of {num_bytes} bytes")
            data += came
        return data

    def is_closed(self, within_s: float = 10.0) -> bool:
        """Whether the server closes the connection; what it still says is read and forgotten."""
        self.sock.settimeout(within_s)
        try:
            while self.sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def change_over(self) -> None:
        assert self.health(v2.HELLO_NAME)[4:6] == (0x4643564B, 2)

    def exchange(self, op: v2.Op, key: bytes = b"", body: bytes = b"", argument: int = 0) -> tuple[v2.Reply, bytes]:
        """One request of version 2, after `change_over`."""
        self.sock.sendall(v2.Request(op, 7, key, len(body), argument).encode() + body)
        return self.reply_v2()

    def reply_v2(self) -> tuple[v2.Reply, bytes]:
        decoder = v2.ReplyDecoder()
        decoder.feed(self.exactly(v2.HEAD_BYTES))
        reply = decoder.head()
        assert reply is not None
        return reply, self.exactly(reply.body_bytes)


class OldServer:
    """LMCache 0.5's server: a thread per client, a dict without bound, PUT without reply.

    A key of fewer than five parts kills the thread, LIST has no answer, a truncated PUT poisons its key.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[tuple[int, ...], bytes | None]] = {}
        self.commands: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._clients: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its two writes are 40 ms apart otherwise
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError, TypeError):
            while self._serve_one(client):
                pass

    def _serve_one(self, client: socket.socket) -> bool:
        head = self._receive(client, 186)
        if head is None:
            return False
        command, length, fmt, dtype, location, a, b, c, d, raw = struct.unpack("<9i150s", head)
        key = raw.decode().strip()
        if len(key.split("@")) < 5:
            return False
        self.commands.append(command)
        if command == 1:
            self.objects[key] = ((fmt, dtype, a, b, c, d, location), self._receive(client, length))
        elif command == 2:
            found = self.objects.get(key)
            if found is None:
                client.sendall(struct.pack("<9i", 400, 0, 1, 2, 0, 0, 0, 0, 0))
            else:
                meta, data = found
                client.sendall(struct.pack("<9i", 200, len(data), *meta))  # TypeError where it is poisoned
                client.sendall(data)
        elif command in (3, 5):
            is_there = command == 5 or key in self.objects
            client.sendall(struct.pack("<9i", 200 if is_there else 400, 0, 1, 2, 0, 0, 0, 0, 0))
        return True

    def _receive(self, client: socket.socket, num_bytes: int) -> bytes | None:
        data = bytearray()
        while len(data) < num_bytes:
            came = client.recv(min(num_bytes - len(data), 1 << 20))
            if not came:
                return None
            data += came
        return bytes(data)
