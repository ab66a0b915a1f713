"""A store behind RESP: Redis, Valkey, and what else speaks it. README of the bytes: `resp_parts`.

A small object is one value. A large one is written as parts that expire by themselves, then its manifest is set under
the object's key, then the parts are made to stay (or to live as long as the manifest): it is visible at once or not at
all, and a writer that dies leaves nothing for longer than ORPHAN_S. A part that was evicted makes the object a miss,
and the rest of it is removed. The parts of an overwritten object expire after GRACE_S, for somebody may be reading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TypeVar

from lmcache_ext.errors import StoreError, StoreFull, StoreUnavailable
from lmcache_ext.stores.base import Store, Usage
from lmcache_ext.stores.redis_options import RespOptions
from lmcache_ext.stores.resp import Argument, ErrorReply, Reply, encode
from lmcache_ext.stores.resp_parts import (
    MANIFEST_BYTES,
    WHOLE_PARTS,
    Manifest,
    new_manifest,
    parse_manifest,
    redis_key,
)
from lmcache_ext.stores.resp_pool import Pool
from lmcache_ext.stores.resp_topology import Moved, Topology, error_of
from lmcache_ext.stores.resp_wire import Deadline, Wire, bytes_of, cut

T = TypeVar("T")
Command = Sequence[Argument]

ORPHAN_S = 600
"""A part that is not published yet lives so long; more than any write takes."""

_LOOKS = frozenset({b"EXISTS", b"GETRANGE"})
_NOT_THERE = frozenset({"ASK", "WRONGTYPE"})
"""Errors that are a miss for who looks: the key is moving to another node, or it is a foreign list or hash."""

GRACE_S = 15
"""A part of an overwritten object lives so long; more than any read takes."""


class RespStore(Store):
    """Objects in Redis or Valkey.

    Threads:  any number; each call has its own connections.
    Order:    a returned `put` is seen by everybody at once (asynchronous replicas, after a failover, excepted).
    Owner:    the keys `kv:*` and `{kv:*`; of those the ones it is asked for.
    Failure:  each call is over within `request_timeout_s`, `exists` within `lookup_timeout_s`. A refusal for want of
              memory is StoreFull, lost time is StoreTimeout, everything else StoreUnavailable. No message holds a
              password.
    """

    def __init__(
        self, options: RespOptions, topology: Topology, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = options.name
        self._timeout_s = options.request_timeout_s
        self._lookup_timeout_s = options.lookup_timeout_s or options.request_timeout_s
        self._ttl_ms = None if options.ttl_s is None else max(1, round(options.ttl_s * 1000))
        self._touches = options.ttl_touch and options.ttl_s is not None
        self._part_bytes = options.part_bytes
        self._whole_bytes = int(WHOLE_PARTS * options.part_bytes)
        self._topology = topology
        self._clock = clock

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """One pipelined EXISTS per key: one round trip per server, all at once."""
        commands = [(key, (b"EXISTS", redis_key(key))) for key in keys]
        deadline = Deadline(self._lookup_timeout_s, self._clock)
        return [reply == 1 for reply in self._ask(commands, deadline)]

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        views = [bytes_of(part) for part in parts]
        deadline = self._deadline()
        return self._looking_again(lambda: self._get(key, views, deadline))

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        views = [bytes_of(part) for part in parts]
        num_bytes = sum(view.nbytes for view in views)
        deadline = self._deadline()
        is_whole = num_bytes <= self._whole_bytes
        if is_whole and num_bytes == MANIFEST_BYTES:
            is_whole = parse_manifest(b"".join(views), key) is None
        if is_whole:
            self._publish(key, views, None, deadline)
            return
        manifest = new_manifest(num_bytes, self._part_bytes)
        try:
            self._looking_again(lambda: self._put_parts(key, views, manifest, deadline))
        except StoreFull:
            with suppress(StoreError):  # what little room there is, is not for parts of nothing
                self._ask([(key, (b"UNLINK", *manifest.part_keys(key)))], deadline)
            raise
        self._publish(key, [memoryview(manifest.encode(key))], manifest, deadline)

    def delete(self, keys: Sequence[bytes]) -> None:
        self._delete(keys, self._deadline())

    def ping(self) -> float:
        """PING of every server that has keys: the store is back when all are."""
        started_at = self._clock()
        deadline = self._deadline()
        for pool in self._pools(deadline):
            reply = self._roundtrip([(pool, [(b"PING",)])], deadline)[0]
            if reply != b"PONG":
                raise StoreUnavailable(f"{pool.label}: PING was answered with {str(reply)[:40]!r}")
        return self._clock() - started_at

    def usage(self) -> Usage:
        """`used_memory` and `maxmemory`, which include what is not ours."""
        deadline = self._deadline()
        pools = self._pools(deadline)
        replies = self._roundtrip([(pool, [(b"INFO", b"memory")]) for pool in pools], deadline)
        used = [_info(reply, b"used_memory") for reply in replies]
        limits = [_info(reply, b"maxmemory") for reply in replies]
        return Usage(
            sum(number for number in used if number) if all(number is not None for number in used) else None,
            sum(limit for limit in limits if limit) if all(limits) else None,
            None,
        )

    def close(self) -> None:
        self._topology.close()

    def _delete(self, keys: Sequence[bytes], deadline: Deadline) -> None:
        heads = self._ask([(key, _head_of(key)) for key in keys], deadline)
        gone: list[tuple[bytes, Command]] = []
        for key, head in zip(keys, heads, strict=True):
            manifest = _manifest_in(head, key)
            gone.append((key, (b"UNLINK", redis_key(key), *(manifest.part_keys(key) if manifest else []))))
        self._ask(gone, deadline)

    def _get(self, key: bytes, views: Sequence[memoryview], deadline: Deadline) -> int | None:
        """The object, or through its manifest its parts; None where a part is missing."""
        pool = self._topology.pool_of(key, deadline)
        with pool.connection(deadline) as wire:
            wire.send(encode(self._read_command(redis_key(key))), 1, deadline)
            length = _length(wire, deadline)
            if length is None:
                return None
            if length != MANIFEST_BYTES:
                wire.payload(length, views, deadline)
                return length
            value = bytearray(length)
            wire.payload(length, [memoryview(value)], deadline)
            manifest = parse_manifest(bytes(value), key)
            if manifest is None:
                _copy(value, views)
                return length
            if self._get_parts(key, manifest, views, pool, wire, deadline):
                return manifest.num_bytes
        with suppress(StoreError):  # who may not delete still has a miss
            self._remove_torn(key, manifest, deadline)
        return None

    def _remove_torn(self, key: bytes, manifest: Manifest, deadline: Deadline) -> None:
        """Remove what is left of an object that misses a part, unless it was written anew meanwhile."""
        head = self._ask([(key, _head_of(key))], deadline)[0]
        names = [redis_key(key)] if _manifest_in(head, key) == manifest else []
        self._ask([(key, (b"UNLINK", *names, *manifest.part_keys(key)))], deadline)

    def _get_parts(
        self, key: bytes, manifest: Manifest, views: Sequence[memoryview], pool: Pool, wire: Wire, deadline: Deadline
    ) -> bool:
        """Fetch the parts that the caller has room for, over two connections by turns; whether all were there.

        While one part is received the server already copies the next into the other connection's buffers.
        """
        room = sum(view.nbytes for view in views)
        keys = manifest.part_keys(key)
        num_wanted = min(manifest.num_parts, -(-room // manifest.part_bytes))
        complete = True
        with pool.spare(deadline) as spare:
            wires = [wire, spare] if spare is not None and num_wanted > 1 else [wire]
            for index in range(num_wanted + len(wires)):
                lane = wires[index % len(wires)]
                done = index - len(wires)
                if 0 <= done < num_wanted:
                    length = manifest.length_of(done)
                    target = cut(views, done * manifest.part_bytes, length)
                    if not _receive_part(lane, length, target, deadline):
                        num_wanted, complete = min(num_wanted, index), False  # nothing more is asked for
                if index < num_wanted:
                    lane.send(encode(self._read_command(keys[index])), 1, deadline)
            return complete

    def _put_parts(self, key: bytes, views: Sequence[memoryview], manifest: Manifest, deadline: Deadline) -> None:
        """Write all parts, each with a time to live, over two connections by turns."""
        pool = self._topology.pool_of(key, deadline)
        keys = manifest.part_keys(key)
        with pool.connection(deadline) as wire, pool.spare(deadline) as spare:
            wires = [wire] if spare is None else [wire, spare]
            for index in range(manifest.num_parts + len(wires)):
                lane = wires[index % len(wires)]
                if index >= len(wires) and index - len(wires) < manifest.num_parts:
                    _ok(lane.reply(deadline), lane.label)
                if index < manifest.num_parts:
                    value = cut(views, index * manifest.part_bytes, manifest.length_of(index))
                    lane.send(encode((b"SET", keys[index], value, b"EX", ORPHAN_S)), 1, deadline)

    def _publish(self, key: bytes, value: Sequence[memoryview], manifest: Manifest | None, deadline: Deadline) -> None:
        """Set the object's key, let its parts stay, and the parts of what was there before go."""
        name = redis_key(key)
        lasting: list[Command] = [self._lasting(part) for part in manifest.part_keys(key)] if manifest else []
        setting = (b"SET", name, value) if self._ttl_ms is None else (b"SET", name, value, b"PX", self._ttl_ms)
        commands: list[Command] = [_head_of(key), setting, *lasting]
        before, _, *kept = self._ask([(key, command) for command in commands], deadline)
        old = _manifest_in(before, key)
        if old is not None:
            self._ask([(key, (b"EXPIRE", part, GRACE_S)) for part in old.part_keys(key)], deadline)
        if manifest is not None and any(reply != 1 for reply in kept):
            self._ask([(key, (b"UNLINK", name, *manifest.part_keys(key)))], deadline)
            raise StoreFull(f"{self.name}: {kept.count(0)} of {len(kept)} parts were evicted while writing")

    def _lasting(self, part: bytes) -> Command:
        return (b"PERSIST", part) if self._ttl_ms is None else (b"PEXPIRE", part, self._ttl_ms)

    def _read_command(self, name: bytes) -> Command:
        return (b"GETEX", name, b"PX", self._ttl_ms) if self._touches and self._ttl_ms else (b"GET", name)

    def _ask(self, commands: Sequence[tuple[bytes, Command]], deadline: Deadline) -> list[Reply]:
        """The replies to commands about keys, in their order; sent at once to the servers that have the keys.

        An error reply is raised, but for ASK on a read, which is a miss. All commands here may be said twice.
        """

        def try_once() -> list[Reply]:
            groups: dict[int, tuple[Pool, list[int]]] = {}
            for index, (key, _) in enumerate(commands):
                pool = self._topology.pool_of(key, deadline)
                groups.setdefault(id(pool), (pool, []))[1].append(index)
            batches = sorted(groups.values(), key=lambda group: group[0].label)
            asked = [(pool, [commands[index][1] for index in indices]) for pool, indices in batches]
            order = [index for _, indices in batches for index in indices]
            replies = self._roundtrip(asked, deadline)
            return [reply for _, reply in sorted(zip(order, replies, strict=True), key=lambda pair: pair[0])]

        return self._looking_again(try_once)

    def _roundtrip(self, batches: Sequence[tuple[Pool, Sequence[Command]]], deadline: Deadline) -> list[Reply]:
        """Send each server its commands, then collect all replies. In one order of servers, so calls cannot lock up."""
        with ExitStack() as stack:
            wires = [stack.enter_context(pool.connection(deadline)) for pool, _ in batches]
            for wire, (_, commands) in zip(wires, batches, strict=True):
                buffers = [buffer for command in commands for buffer in encode(command)]
                wire.send(buffers, len(commands), deadline)
            replies: list[Reply] = []
            for wire, (_, commands) in zip(wires, batches, strict=True):
                replies += [wire.reply(deadline) for _ in commands]
            asked = [(pool.label, command) for pool, commands in batches for command in commands]
            for reply, (label, command) in zip(replies, asked, strict=True):
                if not (command[0] in _LOOKS and isinstance(reply, ErrorReply) and reply.code in _NOT_THERE):
                    _ok(reply, label)
            return replies

    def _looking_again(self, call: Callable[[], T]) -> T:
        """Call; where a key has moved, learn where to and call once more. A failed server may have moved too."""
        try:
            return call()
        except Moved:
            self._topology.refresh(moved=True)
        except StoreFull:
            raise
        except StoreError:
            self._topology.refresh(moved=False)
            raise
        return call()

    def _pools(self, deadline: Deadline) -> list[Pool]:
        return self._looking_again(lambda: self._topology.pools(deadline))

    def _deadline(self) -> Deadline:
        return Deadline(self._timeout_s, self._clock)


def _ok(reply: T, label: str) -> T:
    """The reply, unless it is an error, which is raised."""
    if isinstance(reply, ErrorReply):
        raise error_of(reply, label)
    return reply


def _length(wire: Wire, deadline: Deadline) -> int | None:
    """The length of the value that comes; None where there is none, or one that is not a string."""
    length = wire.length(deadline)
    if isinstance(length, ErrorReply):
        if length.code in _NOT_THERE:
            return None
        raise error_of(length, wire.label)
    return length


def _receive_part(wire: Wire, expected: int, target: Sequence[memoryview], deadline: Deadline) -> bool:
    """Receive one part; whether it was there, with the length that the manifest says."""
    length = _length(wire, deadline)
    if length is None:
        return False
    wire.payload(length, target if length == expected else [], deadline)
    return length == expected


def _head_of(key: bytes) -> Command:
    """The command that tells whether a manifest is there, without fetching what else may be."""
    return (b"GETRANGE", redis_key(key), 0, MANIFEST_BYTES)


def _manifest_in(head: Reply, key: bytes) -> Manifest | None:
    return parse_manifest(head, key) if isinstance(head, bytes) else None


def _copy(data: bytearray, views: Sequence[memoryview]) -> None:
    at = 0
    for view in cut(views, 0, len(data)):
        view[:] = data[at : at + view.nbytes]
        at += view.nbytes


def _info(reply: Reply, name: bytes) -> int | None:
    """A number of INFO's answer."""
    for line in reply.splitlines() if isinstance(reply, bytes) else []:
        key, _, value = line.partition(b":")
        if key == name and value.isdigit():
            return int(value)
    return None
