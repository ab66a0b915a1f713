"""A connection to a cache server that speaks one of the two protocols of `lmcache_ext.wire`.

`V2Link` to our server, `OldLink` to LMCache's; `connect` finds out which. One exchange at a time, by one
thread; after any error the link is closed by its owner, because nobody knows what is still under way.

    get a, get b, get c ─►          V2Link sends the requests of many objects ahead, as many as AHEAD_BYTES allow,
    ◄─ object b, object a, miss     and takes the replies as they come
"""

from __future__ import annotations

import json
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, TypeAlias

from lmcache_ext.errors import StoreError, StoreFull, StoreUnavailable
from lmcache_ext.stores.lmserver_socket import Address, Line
from lmcache_ext.wire import lm, v2
from lmcache_ext.wire.names import name_of
from lmcache_ext.wire.stream import WireError

Got: TypeAlias = tuple[int, int | StoreError | None]
Put: TypeAlias = tuple[int, StoreError | None]

AHEAD_BYTES = 8 * 1024**2
"""Asked for and not received yet, or sent and not acknowledged; of one object more than that is no matter."""


class Link(ABC):
    """What both protocols can do. `line.begin` was called for each exchange.

    `get_many` and `put_many` yield the outcome of one object after another, with its number among `keys`, in any order;
    what was not yielded before a StoreError was raised has no other outcome than that.
    """

    def __init__(self, line: Line, address: Address) -> None:
        self.line = line
        self._address = address

    @abstractmethod
    def exists(self, keys: Sequence[bytes]) -> list[bool]: ...

    @abstractmethod
    def get_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> Iterator[Got]: ...

    @abstractmethod
    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> Iterator[Put]: ...

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> None: ...

    @abstractmethod
    def ping(self) -> None: ...

    @abstractmethod
    def stats(self, *, by_namespace: bool = False) -> dict[str, Any]: ...


class V2Link(Link):
    """Our frames."""

    def __init__(self, line: Line, address: Address, token: bytes) -> None:
        super().__init__(line, address)
        self._ids = count(1)
        reply = self._exchange(v2.Op.HELLO, body=[memoryview(token)])
        self._can = v2.Capabilities.decode(self._small_body(reply))

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Batches travel all at once; the answers come in their order."""
        batches = self._batches(keys)
        requests = [self._send(v2.Op.EXISTS, body=[memoryview(v2.encode_keys(batch))]) for batch in batches]
        found: list[bool] = []
        for request_id, batch in zip(requests, batches, strict=True):
            try:
                body = self._small_body(self._receive(request_id))
            except Answered as answered:  # the answers to the other batches are still under way
                raise answered.error from None
            if len(body) != len(batch):
                raise WireError(f"{self._address}: asked for {len(batch)} keys, answered for {len(body)}")
            found += [byte != 0 for byte in body]
        return found

    def get_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> Iterator[Got]:
        rooms = [sum(part.nbytes for part in parts) for parts in parts_per_key]
        pairs = zip(keys, rooms, strict=True)
        requests = [v2.Request(v2.Op.GET, self._new_id(), key, argument=room) for key, room in pairs]
        for index, reply in self._replies(requests, [()] * len(keys), rooms):
            try:
                yield index, self._object(reply, parts_per_key[index], rooms[index])
            except Answered as answered:
                yield index, answered.error

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> Iterator[Put]:
        sizes = [sum(part.nbytes for part in parts) for parts in parts_per_key]
        limit = self._can.max_object_bytes
        fitting = [index for index, size in enumerate(sizes) if size <= limit]
        for index, size in enumerate(sizes):
            if size > limit:
                yield index, StoreFull(f"{self._address}: {size} bytes, the server takes {limit}")
        requests = [v2.Request(v2.Op.PUT, self._new_id(), keys[index], sizes[index]) for index in fitting]
        bodies = [parts_per_key[index] for index in fitting]
        for number, reply in self._replies(requests, bodies, [sizes[index] for index in fitting]):
            try:
                self._judge(reply)
                self._small_body(reply)
                yield fitting[number], None
            except Answered as answered:
                yield fitting[number], answered.error

    def delete(self, keys: Sequence[bytes]) -> None:
        for batch in self._batches(keys):
            self._small_body(self._exchange(v2.Op.DELETE, body=[memoryview(v2.encode_keys(batch))]))

    def ping(self) -> None:
        self._small_body(self._exchange(v2.Op.PING))

    def stats(self, *, by_namespace: bool = False) -> dict[str, Any]:
        body = self._small_body(self._exchange(v2.Op.STATS, argument=int(by_namespace)))
        try:
            found = json.loads(body)
        except ValueError as error:
            raise WireError(f"{self._address}: statistics are not JSON") from error
        return found if isinstance(found, dict) else {}

    def _batches(self, keys: Sequence[bytes]) -> list[Sequence[bytes]]:
        size = min(self._can.max_batch_keys, v2.MAX_SMALL_BYTES // (2 + v2.MAX_KEY_BYTES))
        return [keys[at : at + size] for at in range(0, len(keys), size)]

    def _exchange(self, op: v2.Op, body: Sequence[memoryview] = (), argument: int = 0) -> v2.Reply:
        return self._receive(self._send(op, body, argument))

    def _send(self, op: v2.Op, body: Sequence[memoryview] = (), argument: int = 0) -> int:
        request = v2.Request(op, self._new_id(), b"", sum(part.nbytes for part in body), argument)
        self.line.send([memoryview(request.encode()), *body])
        return request.request_id

    def _new_id(self) -> int:
        return next(self._ids) & 0xFFFFFFFF

    def _replies(
        self, requests: Sequence[v2.Request], bodies: Sequence[Sequence[memoryview]], num_bytes: Sequence[int]
    ) -> Iterator[tuple[int, v2.Reply]]:
        """Send the requests ahead; the head of each reply as it comes, with the number of its request.

        Whoever takes it reads the reply's body before the next. `num_bytes`: what each request puts on the way, here or
        there; more are sent when half of AHEAD_BYTES has come through.
        """
        waiting: dict[int, int] = {}
        ahead_bytes = next_index = 0
        while waiting or next_index < len(requests):
            buffers: list[memoryview] = []
            refills = ahead_bytes <= AHEAD_BYTES // 2
            while next_index < len(requests) and self._may_send(len(waiting), ahead_bytes, refills=refills):
                request = requests[next_index]
                buffers += [memoryview(request.encode()), *bodies[next_index]]
                waiting[request.request_id] = next_index
                ahead_bytes += num_bytes[next_index]
                next_index += 1
            self.line.send(buffers)
            reply = self._head()
            index = waiting.pop(reply.request_id, None)
            if index is None:
                raise WireError(f"{self._address}: read the reply to a request {reply.request_id} that was not made")
            ahead_bytes -= num_bytes[index]
            yield index, reply

    def _may_send(self, num_waiting: int, ahead_bytes: int, *, refills: bool) -> bool:
        return not num_waiting or (refills and ahead_bytes < AHEAD_BYTES and num_waiting < self._can.max_in_flight)

    def _object(self, reply: v2.Reply, parts: Sequence[memoryview], room: int) -> int | None:
        """The object that a reply to GET brings, read into `parts`."""
        self._judge(reply, v2.Status.MISS)
        if reply.status == v2.Status.MISS:
            self.line.skip(_at_most(reply.body_bytes, v2.MAX_SMALL_BYTES))
            return None
        if reply.body_bytes != min(room, reply.value):
            raise WireError(f"{self._address}: {reply.body_bytes} of {reply.value} bytes come, expected at most {room}")
        self.line.read_into(parts, reply.body_bytes)
        return reply.value

    def _receive(self, request_id: int) -> v2.Reply:
        """The reply to a request, which is the next; raises what a status other than OK says."""
        reply = self._head()
        if reply.request_id != request_id:
            raise WireError(f"{self._address}: read the reply to another request than {request_id}")
        self._judge(reply)
        return reply

    def _head(self) -> v2.Reply:
        self.line.begin_answer()
        decoder = v2.ReplyDecoder()
        decoder.feed(self.line.read(v2.HEAD_BYTES))
        reply = decoder.head()
        assert reply is not None
        return reply

    def _judge(self, reply: v2.Reply, *fine: v2.Status) -> None:
        """Raise what a status other than OK and `fine` says."""
        if reply.status == v2.Status.OK or reply.status in fine:
            return
        message = self.line.read(_at_most(reply.body_bytes, v2.MAX_MESSAGE_BYTES)).decode("utf-8", "replace")
        failure = StoreFull if reply.status == v2.Status.FULL else StoreUnavailable
        raise Answered(failure(f"{self._address}: {reply.status.name}: {message}"), reply.status)

    def _small_body(self, reply: v2.Reply) -> bytes:
        return self.line.read(_at_most(reply.body_bytes, v2.MAX_SMALL_BYTES))


class OldLink(Link):
    """LMCache's frames: nothing is acknowledged, so every PUT is followed by a question that shows it arrived.

    That server cannot delete: an object is overwritten by an empty one, and its owner remembers.
    """

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """One round trip each: that server has been seen to read short where two requests lie in the socket."""
        return [self._ask(lm.Command.EXIST, name_of(key)).code == lm.OK for key in keys]

    def get_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> Iterator[Got]:
        """One round trip each, as `exists`."""
        for index, (key, parts) in enumerate(zip(keys, parts_per_key, strict=True)):
            yield index, self._get_into(key, parts)

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> Iterator[Put]:
        for index, (key, parts) in enumerate(zip(keys, parts_per_key, strict=True)):
            yield index, self._put(key, parts)

    def _get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        reply = self._ask(lm.Command.GET, name_of(key))
        if reply.code != lm.OK:
            return None
        self.line.acknowledge_at_once()  # that server sends head and object apart, and a small one after the head's ACK
        wanted = min(sum(part.nbytes for part in parts), reply.length)
        self.line.read_into(parts, wanted)
        self.line.skip(reply.length - wanted)
        return reply.length

    def _put(self, key: bytes, parts: Sequence[memoryview]) -> StoreError | None:
        num_bytes = sum(part.nbytes for part in parts)
        if num_bytes > lm.MAX_INT32:
            return StoreFull(f"{self._address}: {num_bytes} bytes, LMCache's protocol takes {lm.MAX_INT32}")
        head = lm.Request(lm.Command.PUT, name_of(key), num_bytes, lm.binary(num_bytes)).encode()
        self.line.send([memoryview(head), *parts])
        if not self.exists([key])[0]:
            return StoreUnavailable(f"{self._address}: did not keep {num_bytes} bytes")
        return None

    def delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if self.exists([key])[0] and (error := self._put(key, [])) is not None:
                raise error

    def ping(self) -> None:
        self._ask(lm.Command.HEALTH, v2.HELLO_NAME)

    def stats(self, *, by_namespace: bool = False) -> dict[str, Any]:
        return {}

    def _ask(self, command: lm.Command, name: str) -> lm.Reply:
        return _ask(self.line, lm.Request(command, name))


class Answered(Exception):
    """The server said no in good order: `error` is raised to the caller and the link stays open."""

    def __init__(self, error: StoreError, status: v2.Status) -> None:
        super().__init__(str(error))
        self.error = error
        self.status = status


def connect(address: Address, tls: ssl.SSLContext | None, token: bytes, timeout_s: float) -> Link:
    """Connect, ask which protocol is spoken, and introduce ourselves. Raises StoreError."""
    deadline = time.monotonic() + timeout_s
    line = Line.connect(address, tls, timeout_s)
    try:
        line.begin(deadline - time.monotonic())
        if v2.speaks_v2(_first_answer(line, "a certificate (tls_cert)" if tls else "TLS (tls_ca)")):
            return V2Link(line, address, token)
        if token:
            raise StoreUnavailable(f"{address}: a token is set, and this server knows no tokens")
    except Answered as answered:
        line.close()
        raise answered.error from None
    except BaseException:
        line.close()
        raise
    return OldLink(line, address)


def _first_answer(line: Line, wanted: str) -> lm.Reply:
    """What the server says first. One that closes instead says no reason, so we name those there are."""
    try:
        return _ask(line, v2.hello_request())
    except StoreUnavailable as error:
        raise StoreUnavailable(f"{error}; it may want {wanted}, or take no more connections") from error


def _ask(line: Line, request: lm.Request) -> lm.Reply:
    line.send([memoryview(request.encode())])
    line.begin_answer()
    decoder = lm.ReplyDecoder()
    decoder.feed(line.read(lm.REPLY_BYTES))
    reply = decoder.head()
    if reply is None:
        raise WireError(f"{lm.REPLY_BYTES} bytes are no reply")
    if reply.length and request.command not in (lm.Command.GET, lm.Command.LIST):
        raise WireError(f"read {reply.length} bytes after a reply to {request.command.name}")
    return reply


def _at_most(num_bytes: int, limit: int) -> int:
    if num_bytes > limit:
        raise WireError(f"{num_bytes} bytes follow, at most {limit} are read")
    return num_bytes
