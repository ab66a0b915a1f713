"""`/metrics` and `/healthz` of the cache server: enough HTTP for Prometheus, a kubelet and curl."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

MAX_REQUEST_BYTES = 8192
TIMEOUT_S = 5.0
TEXT = "text/plain; version=0.0.4; charset=utf-8"

Handler = Callable[[], tuple[int, str]]


class HttpPort:
    """Answers GET and HEAD of fixed paths, one request per connection.

    Threads:  the event loop's.
    Order:    none.
    Owner:    of its listening sockets.
    Failure:  what is not a request is answered with 400 or closed after TIMEOUT_S.
    """

    def __init__(self, paths: Mapping[str, Handler], *, max_connections: int = 64) -> None:
        self._paths = paths
        self._free = asyncio.Semaphore(max_connections)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Callback of `asyncio.start_server`."""
        try:
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                if not self._free.locked():
                    async with self._free, asyncio.timeout(TIMEOUT_S):
                        await self._answer(reader, writer)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split()
        if len(words) != 3 or not words[2].startswith("HTTP/"):
            code, body = 400, "not a request\n"
        elif words[0] not in ("GET", "HEAD"):
            code, body = 405, "only GET and HEAD\n"
        else:
            handler = self._paths.get(words[1].partition("?")[0])
            code, body = handler() if handler is not None else (404, f"try {' or '.join(self._paths)}\n")
        reason = {200: "OK", 503: "Service Unavailable"}.get(code, "Error")
        data = body.encode()
        lines = [f"HTTP/1.1 {code} {reason}", f"Content-Type: {TEXT}", f"Content-Length: {len(data)}"]
        writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        if words and words[0] != "HEAD":
            writer.write(data)
        await writer.drain()


def prometheus(families: Mapping[str, tuple[str, str, Mapping[str, float]]]) -> str:
    """Text of `{name: (type, help, {labels: value})}`."""
    lines = []
    for name, (kind, text, values) in families.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value:.15g}" for labels, value in values.items()]
    return "\n".join([*lines, ""])
