"""What the two protocols of `lmcache_ext.wire` mean to the cache server."""

from __future__ import annotations

import json
from functools import partial

from lmcache_ext.daemons.lm_connection import Connection
from lmcache_ext.daemons.lm_disk import Disk
from lmcache_ext.daemons.lm_memory import Block
from lmcache_ext.wire import lm, v2
from lmcache_ext.wire.names import name_of
from lmcache_ext.wire.stream import WireError

MAX_WAITING_OLD = 16
"""Replies that an old client may leave unread before it is not read either."""


class OldDialect:
    """LMCache 0.5: replies in the order of the requests, none to a PUT."""

    is_ordered = True
    max_waiting = MAX_WAITING_OLD

    def __init__(self, connection: Connection) -> None:
        self.decoder = lm.RequestDecoder()
        self._connection = connection
        self._cache = connection.host.cache

    def on_head(self, request: lm.Request) -> None:
        command = lm.Command
        if request.command == command.HEALTH:
            self._health(request.name)
            return
        if not self._connection.is_authorized:
            self._connection.count("unauthorized")
            self._reply(lm.FAILED)
            self._connection.end()
            return
        {
            command.PUT: self._put,
            command.GET: self._get,
            command.EXIST: self._exist,
            command.LIST: self._list,
        }[request.command](request)

    def on_error(self, error: WireError) -> None:
        self._reply(lm.FAILED)

    def _health(self, name: str) -> None:
        if name != v2.HELLO_NAME:
            self._reply(lm.OK)
            return
        self._connection.send(v2.hello_reply().encode())
        self._connection.change_over(V2Dialect(self._connection))

    def _put(self, request: lm.Request) -> None:
        connection, memory = self._connection, self._cache.memory
        is_small = request.length <= connection.host.limits.max_object_bytes
        block = memory.claim(request.length) if is_small else None
        if block is None:
            connection.receive(None, partial(connection.count, "put.full"))
            return
        claimed = block

        def done() -> None:
            self._cache.commit(request.name, claimed, request.meta)
            connection.count("put.ok")
            if self._cache.disk is None:
                memory.let_go(claimed)
            else:
                self._connection.start(self._keep(self._cache.disk, request.name, claimed))

        connection.receive(block.view, done, partial(memory.let_go, block))

    async def _keep(self, disk: Disk, name: str, block: Block) -> None:
        try:
            await self._cache.keep(disk, name, block)
        finally:
            self._cache.memory.let_go(block)

    def _get(self, request: lm.Request) -> None:
        block = self._cache.memory.get(request.name)
        if block is None and self._cache.disk is not None:
            self._connection.start(self._fetch(self._cache.disk, request.name))
        else:
            self._answer_get(block)

    async def _fetch(self, disk: Disk, name: str) -> None:
        block = await self._cache.fetch(disk, name)
        self._answer_get(block)

    def _answer_get(self, block: Block | None) -> None:
        memory = self._cache.memory
        if block is not None and block.num_bytes > lm.MAX_INT32:
            memory.let_go(block)
            block = None
        self._connection.count("get.miss" if block is None else "get.hit")
        if block is None:
            self._reply(lm.FAILED)
            return
        head = lm.Reply(lm.OK, block.num_bytes, block.meta).encode()
        self._connection.send(head, block.view, partial(memory.let_go, block))

    def _exist(self, request: lm.Request) -> None:
        self._connection.count("exists")
        if request.name in self._cache.memory:
            self._reply(lm.OK)
        elif self._cache.disk is None:
            self._reply(lm.FAILED)
        else:
            self._connection.start(self._exist_on_disk(self._cache.disk, request.name))

    async def _exist_on_disk(self, disk: Disk, name: str) -> None:
        found = await self._cache.exists_on_disk(disk, [name])
        self._reply(lm.OK if found[0] else lm.FAILED)

    def _list(self, _request: lm.Request) -> None:
        self._connection.count("list")
        self._connection.start(self._answer_list())

    async def _answer_list(self) -> None:
        body = "\n".join(await self._cache.names()).encode()
        if len(body) > lm.MAX_INT32:
            body = body[: body.rindex(b"\n", 0, lm.MAX_INT32)]
        self._connection.send(lm.Reply(lm.OK, len(body), lm.binary(len(body))).encode(), memoryview(body))

    def _reply(self, code: int) -> None:
        self._connection.send(lm.Reply(code).encode())


class V2Dialect:
    """Ours: replies in any order, each with the id of its request."""

    is_ordered = False

    def __init__(self, connection: Connection) -> None:
        self.decoder = v2.RequestDecoder()
        self.max_waiting = connection.host.limits.max_in_flight
        self._connection = connection
        self._cache = connection.host.cache

    def on_head(self, request: v2.Request) -> None:
        if not self._connection.is_authorized and request.op != v2.Op.HELLO:
            self._refuse_stranger(request.request_id)
            return
        if request.op in (v2.Op.HELLO, v2.Op.EXISTS, v2.Op.DELETE):
            body = bytearray(request.body_bytes)
            answer = {v2.Op.HELLO: self._hello, v2.Op.EXISTS: self._exists, v2.Op.DELETE: self._delete}[request.op]
            self._connection.receive(memoryview(body), lambda: answer(request.request_id, body))
        elif request.op == v2.Op.PUT:
            self._put(request)
        elif request.op == v2.Op.GET:
            self._get(request)
        elif request.op == v2.Op.STATS:
            self._stats(request)
        else:
            self._reply(request.request_id)

    def on_error(self, error: WireError) -> None:
        """Nobody knows to which request; 0 is none."""
        self._say_no(0, v2.Status.REFUSED, str(error))

    def _hello(self, request_id: int, token: bytearray) -> None:
        host = self._connection.host
        if not host.token.accepts(bytes(token)):
            self._refuse_stranger(request_id)
            return
        self._connection.is_authorized = True
        limits = host.limits
        can = v2.Capabilities(limits.max_object_bytes, v2.MAX_BATCH_KEYS, limits.max_in_flight)
        self._reply(request_id, body=can.encode())

    def _put(self, request: v2.Request) -> None:
        connection, memory = self._connection, self._cache.memory
        limit = connection.host.limits.max_object_bytes
        if request.body_bytes > limit:
            connection.count("put.full")
            message = f"{request.body_bytes} bytes, objects may have {limit}"
            self._say_no(request.request_id, v2.Status.FULL, message)
            connection.end()
            return
        block = memory.claim(request.body_bytes)
        if block is None:
            message = f"no room for {request.body_bytes} bytes in {memory.capacity_bytes} that are all in use"
            connection.receive(None, lambda: self._full(request.request_id, message))
            return
        connection.receive(block.view, partial(self._put_done, request, block), partial(memory.let_go, block))

    def _put_done(self, request: v2.Request, block: Block) -> None:
        name = name_of(request.key)
        self._cache.commit(name, block, lm.binary(block.num_bytes))
        self._connection.count("put.ok")
        if self._cache.disk is not None:
            self._connection.start(self._keep(self._cache.disk, request.request_id, name, block))
        else:
            self._cache.memory.let_go(block)
            self._reply(request.request_id)

    async def _keep(self, disk: Disk, request_id: int, name: str, block: Block) -> None:
        try:
            await self._cache.keep(disk, name, block)
        finally:
            self._cache.memory.let_go(block)
        self._reply(request_id)

    def _full(self, request_id: int, message: str) -> None:
        self._connection.count("put.full")
        self._say_no(request_id, v2.Status.FULL, message)

    def _get(self, request: v2.Request) -> None:
        name = name_of(request.key)
        block = self._cache.memory.get(name)
        if block is None and self._cache.disk is not None:
            self._connection.start(self._fetch(self._cache.disk, request, name))
        else:
            self._answer_get(request, block)

    async def _fetch(self, disk: Disk, request: v2.Request, name: str) -> None:
        self._answer_get(request, await self._cache.fetch(disk, name))

    def _answer_get(self, request: v2.Request, block: Block | None) -> None:
        self._connection.count("get.miss" if block is None else "get.hit")
        if block is None:
            self._connection.send(v2.Reply(v2.Status.MISS, request.request_id).encode())
            return
        body = block.view[: min(request.argument, block.num_bytes)]
        head = v2.Reply(v2.Status.OK, request.request_id, len(body), block.num_bytes).encode()
        self._connection.send(head, body, partial(self._cache.memory.let_go, block))

    def _exists(self, request_id: int, body: bytearray) -> None:
        self._connection.count("exists")
        names = [name_of(key) for key in v2.decode_keys(body)]
        there = [name in self._cache.memory for name in names]
        if self._cache.disk is None or all(there):
            self._reply(request_id, body=bytes(there))
        else:
            self._connection.start(self._exists_on_disk(self._cache.disk, request_id, names, there))

    async def _exists_on_disk(self, disk: Disk, request_id: int, names: list[str], there: list[bool]) -> None:
        missing = [name for name, found in zip(names, there, strict=True) if not found]
        on_disk = await self._cache.exists_on_disk(disk, missing)
        found = {name for name, is_there in zip(missing, on_disk, strict=True) if is_there}
        self._reply(request_id, body=bytes(was or name in found for name, was in zip(names, there, strict=True)))

    def _delete(self, request_id: int, body: bytearray) -> None:
        self._connection.count("delete")
        names = [name_of(key) for key in v2.decode_keys(body)]
        deleted = self._cache.delete(names)
        if self._cache.disk is None:
            self._reply(request_id, value=sum(deleted))
        else:
            self._connection.start(self._delete_on_disk(self._cache.disk, request_id, names, deleted))

    async def _delete_on_disk(self, disk: Disk, request_id: int, names: list[str], deleted: list[bool]) -> None:
        on_disk = await self._cache.delete_on_disk(disk, names)
        self._reply(request_id, value=sum(a or b for a, b in zip(deleted, on_disk, strict=True)))

    def _stats(self, request: v2.Request) -> None:
        if request.argument:
            self._connection.start(self._stats_by_namespace(request.request_id))
        else:
            self._reply(request.request_id, body=json.dumps(self._connection.host.stats()).encode())

    async def _stats_by_namespace(self, request_id: int) -> None:
        found = self._connection.host.stats() | {"namespaces": await self._cache.namespaces()}
        self._reply(request_id, body=json.dumps(found).encode())

    def _refuse_stranger(self, request_id: int) -> None:
        self._connection.count("unauthorized")
        self._say_no(request_id, v2.Status.UNAUTHORIZED, "the token is missing or wrong")
        self._connection.end()

    def _say_no(self, request_id: int, status: v2.Status, message: str) -> None:
        body = message.encode()[: v2.MAX_MESSAGE_BYTES]
        self._connection.send(v2.Reply(status, request_id, len(body)).encode() + body)

    def _reply(self, request_id: int, *, body: bytes = b"", value: int = 0) -> None:
        self._connection.send(v2.Reply(v2.Status.OK, request_id, len(body), value).encode() + body)
