"""InfiniStore's client without the hardware: the calls of its package that we use, over a dictionary.

The only fake of a backend among these tests: the real client and server need an RDMA device at start. It follows
`infinistore` 0.2.35: names and arguments, bare exceptions, codes by callback from another thread, and the server's
rule that a block must be as large as the object.
"""

from __future__ import annotations

import ctypes
import threading
from types import ModuleType


class Server:
    """What the fake clients of one test talk to; `code` is answered instead where it is set, None never."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_up = True
        self.answers = True
        self.code = 0
        self.num_connections = 0


def module(server: Server) -> ModuleType:
    """A stand-in for the package `infinistore`."""
    fake = ModuleType("infinistore")
    fake.TYPE_RDMA = "RDMA"
    fake.ClientConfig = ClientConfig
    fake.InfinityConnection = lambda config: InfinityConnection(config, server)
    return fake


class ClientConfig:
    def __init__(self, *, connection_type, host_addr, dev_name, ib_port, link_type, service_port, log_level) -> None:
        assert connection_type == "RDMA"
        assert link_type in ("IB", "Ethernet")
        assert log_level in ("error", "debug", "info", "warning")
        self.address = (host_addr, service_port, dev_name, ib_port, link_type)


class InfinityConnection:
    def __init__(self, config: ClientConfig, server: Server) -> None:
        self.config = config
        self.conn = self
        self._server = server
        self._regions: list[tuple[int, int]] = []
        self._busy = threading.Lock()
        self._closed = False

    def connect(self) -> None:
        if not self._server.is_up:
            raise Exception("Failed to initialize remote connection")
        self._server.num_connections += 1

    def close(self) -> None:
        self._closed = True

    def register_mr(self, ptr: int, size: int) -> int:
        self._regions.append((ptr, size))
        return 0

    def check_exist(self, key: str) -> bool:
        with self._alone("Failed to check if this key exists"):
            return key in self._server.objects

    def delete_keys(self, keys: list[str]) -> int:
        with self._alone("somethings are wrong"):
            return sum(self._server.objects.pop(key, None) is not None for key in keys)

    def w_rdma_async(self, keys, offsets, block_size, ptr, callback) -> int:
        self._check(offsets, block_size, ptr)

        def write() -> int:
            self._server.objects[keys[0]] = ctypes.string_at(ptr, block_size)
            return 200

        return self._answer(write, callback)

    def r_rdma_async(self, keys, offsets, block_size, ptr, callback) -> int:
        self._check(offsets, block_size, ptr)

        def read() -> int:
            data = self._server.objects.get(keys[0])
            if data is None or len(data) > block_size:
                return 404 if data is None else 400
            ctypes.memmove(ptr, data, len(data))
            return 200

        return self._answer(read, callback)

    def _check(self, offsets, block_size: int, ptr: int) -> None:
        assert offsets == [0]
        assert any(begin <= ptr and ptr + block_size <= begin + size for begin, size in self._regions)

    def _answer(self, work, callback) -> int:
        if self._closed or not self._server.is_up:
            return -1
        if self._server.answers:
            threading.Thread(target=lambda: callback(self._server.code or work())).start()
        return 0

    def _alone(self, what: str):
        """The client's socket is not for two threads."""
        if self._closed or not self._server.is_up:
            raise Exception(what)
        assert self._busy.acquire(blocking=False)
        return _Released(self._busy)


class _Released:
    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._lock.release()
