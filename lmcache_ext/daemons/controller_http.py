"""Enough HTTP for a router, a kubelet, Prometheus and curl: one request per connection, JSON in and out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

from lmcache_ext.daemons.lm_http import TEXT
from lmcache_ext.errors import RequestRefused

MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 16 * 1024**2
"""A million token ids."""
READ_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Request:
    """`body` is the JSON object that was sent, {} without one."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def token(self) -> str:
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() if kind.lower() == "bearer" else ""


@dataclass(frozen=True, slots=True)
class Response:
    """A JSON value, or text for Prometheus."""

    body: object
    status: int = 200


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """Answers the paths of `routes`, by method.

    Threads:  the event loop's.
    Owner:    of no socket; `handle` is the callback of `asyncio.start_server`.
    Failure:  RequestRefused becomes its status; what is no request 400, or the connection is closed.
    """

    def __init__(self, routes: Mapping[tuple[str, str], Handler], *, max_connections: int = 256) -> None:
        self._routes = routes
        self._free = asyncio.Semaphore(max_connections)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                if not self._free.locked():
                    async with self._free:
                        response = await self._respond(reader, writer)
                        writer.write(_encoded(*response))
                        async with asyncio.timeout(READ_TIMEOUT_S):
                            await writer.drain()
        finally:
            writer.close()

    async def _respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[Response, bool]:
        """The answer, and whether its body is sent."""
        method = ""
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                method, target, headers = _parse_head(await reader.readuntil(b"\r\n\r\n"))
                body = await _read_body(reader, writer, headers)
            path, _, query = target.partition("?")
            request = Request(method, path, dict(parse_qsl(query)), headers, _parse_body(body))
            return await self._handler(method, path)(request), method != "HEAD"
        except RequestRefused as refused:
            return Response({"detail": str(refused)}, refused.status), method != "HEAD"

    def _handler(self, method: str, path: str) -> Handler:
        path = path.rstrip("/") or "/"
        handler = self._routes.get(("GET" if method == "HEAD" else method, path))
        if handler is not None:
            return handler
        methods = [known for known, at in self._routes if at == path]
        if methods:
            raise RequestRefused(405, f"{path} answers {' and '.join(methods)}, not {method}")
        raise RequestRefused(404, f"no such path; there are {', '.join(sorted({at for _, at in self._routes}))}")


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
        raise RequestRefused(400, "not a request of HTTP/1.1")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name != name.strip():
            raise RequestRefused(400, "a header has no name")
        headers[name.lower()] = value.strip()
    return words[0], words[1], headers


async def _read_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding"):
        raise RequestRefused(411, "send the body with a Content-Length")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise RequestRefused(400, f"Content-Length {length[:20]!r} is no number")
    if int(length) > MAX_BODY_BYTES:
        raise RequestRefused(413, f"the body has {length} bytes, at most {MAX_BODY_BYTES} are read")
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return await reader.readexactly(int(length))


def _parse_body(data: bytes) -> Mapping[str, Any]:
    if not data.strip():
        return {}
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(400, f"the body is not JSON: {str(error)[:100]}") from error
    if not isinstance(body, dict):
        raise RequestRefused(422, "the body is not a JSON object")
    return body


def _encoded(response: Response, has_body: bool) -> bytes:
    is_text = isinstance(response.body, str)
    data = (response.body if isinstance(response.body, str) else json.dumps(response.body)).encode()
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        f"Content-Type: {TEXT if is_text else 'application/json'}",
        f"Content-Length: {len(data)}",
        *(["WWW-Authenticate: Bearer"] if response.status == 401 else []),
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (data if has_body else b"")
