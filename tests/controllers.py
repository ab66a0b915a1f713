"""A real controller for tests: in this process on a thread of its own, on free ports, and a plain client of it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from lmcache_ext.daemons.controller import Controller
from lmcache_ext.daemons.controller_directory import Directory
from lmcache_ext.daemons.lmserver import bind
from lmcache_ext.wire import controller as wire
from lmcache_ext.wire.v2 import encode_keys


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self._now = time.monotonic()

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


class RunningController:
    """`with RunningController() as controller:`; `restart` keeps the ports and forgets everything."""

    def __init__(
        self,
        *,
        timeout_s: float = 60.0,
        max_keys: int = 10_000,
        token_file: str | None = None,
        host: str = "127.0.0.1",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = {"timeout_s": timeout_s, "max_keys": max_keys, "token_file": token_file}
        self._host = host
        self._now = now
        self.ports = {"http": 0, "pull": 0, "reply": 0}
        self.kept: list[object] = []

    def __enter__(self) -> RunningController:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        sockets = {name: bind(self._host, port) for name, port in self.ports.items()}
        self.ports = {name: found[0].getsockname()[1] for name, found in sockets.items()}
        directory = Directory(timeout_s=self._options["timeout_s"], max_keys=self._options["max_keys"])
        ready = threading.Event()

        async def run() -> None:
            self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
            self.controller = Controller(
                directory, token_file=self._options["token_file"], max_connections=64, sweep_s=0.05, now=self._now
            )
            await self.controller.listen(sockets["http"], [*sockets["pull"], *sockets["reply"]])
            ready.set()
            await self._stopped.wait()
            await self.controller.stop()

        self._thread = threading.Thread(target=asyncio.run, args=(run(),))
        self._thread.start()
        assert ready.wait(10.0)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10.0)
        assert not self._thread.is_alive()

    def url(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"http://{self.url('http')}{path}", **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"http://{self.url('http')}{path}", json=body, **options)

    def num_keys(self) -> int:
        return self.get("/controller/key-stats").json()["total_key_count"]

    def workers(self) -> list[dict[str, Any]]:
        return self.get("/controller/workers").json()["workers"]


class Talker:
    """Says messages on a socket and reads the answers; nothing of the engine's own client in it."""

    def __init__(self, port: int, *, hello: bool = True, token: str = "") -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 5.0)
        self._decoder = wire.MessageDecoder()
        self._number = 0
        if hello:
            self.hello = self.say("hello", token=token)

    def say(self, op: str, keys: tuple[bytes, ...] = (), **fields: Any) -> dict[str, Any]:
        self._number += 1
        self.sock.sendall(wire.encode({"op": op, "id": self._number, **fields}, encode_keys(keys)))
        answer = self.read()
        assert answer is not None
        return answer

    def read(self) -> dict[str, Any] | None:
        """The next message; None where the other side closes."""
        while (message := self._decoder.head()) is None:
            data = self.sock.recv(65536)
            if not data:
                return None
            self._decoder.feed(data)
        return dict(message.fields)

    def close(self) -> None:
        self.sock.close()
