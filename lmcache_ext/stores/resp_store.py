"""A store behind RESP: Redis, Valkey, and what else speaks it. README of the bytes: `resp_parts`; of their ways:
`resp_transfer`.

A small object is one value. A large one is written as parts that expire by themselves, then its manifest and first part
are set under the object's key, then the parts are made to stay (or to live as long as the manifest): it is visible at
once or not at all, and a writer that dies leaves nothing for longer than ORPHAN_S. A part that was evicted makes the
object a miss, and the rest of it is removed. The parts of an overwritten object expire after GRACE_S, for somebody may
be reading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar

from lmcache_ext.errors import StoreError, StoreFull, StoreUnavailable
from lmcache_ext.stores.base import Store, Survey, Usage, surveyed
from lmcache_ext.stores.pace import Floor
from lmcache_ext.stores.redis_options import RespOptions
from lmcache_ext.stores.resp import ErrorReply, Reply, encode
from lmcache_ext.stores.resp_parts import MANIFEST_BYTES, WHOLE_PARTS, new_manifest, parse_manifest, redis_key
from lmcache_ext.stores.resp_pool import Pool
from lmcache_ext.stores.resp_survey import info_field, number, survey_of
from lmcache_ext.stores.resp_topology import Moved, Topology, error_of
from lmcache_ext.stores.resp_transfer import NOT_THERE, Command, Reader, Reading, Writing, head_of, manifest_in, write
from lmcache_ext.stores.resp_wire import Deadline, PacedDeadline, Wire
from lmcache_ext.stores.sockets import bytes_of, cut

T = TypeVar("T")
X = TypeVar("X", Reading, Writing)

_LOOKS = frozenset({b"EXISTS", b"GETRANGE"})


class RespStore(Store):
    """Objects in Redis or Valkey.

    Threads:  any number; each call has its own connections.
    Order:    a returned `put` is seen by everybody at once (asynchronous replicas, after a failover, excepted).
    Owner:    the keys `kv:*` and `{kv:*`; of those the ones it is asked for.
    Failure:  each call is over within `request_timeout_s`, `exists` within `lookup_timeout_s`. A refusal for want of
              memory is StoreFull, lost time is StoreTimeout (of a get StoreStalled, see `pace`), everything else
              StoreUnavailable. No message holds a password.
    """

    def __init__(
        self, options: RespOptions, topology: Topology, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = options.name
        self._timeout_s = options.request_timeout_s
        self._lookup_timeout_s = options.lookup_timeout_s or options.request_timeout_s
        self._floor = Floor(options.stall_timeout_s, options.min_bytes_per_s)
        self._ttl_ms = None if options.ttl_s is None else max(1, round(options.ttl_s * 1000))
        self._part_bytes = options.part_bytes
        self._whole_bytes = int(WHOLE_PARTS * options.part_bytes)
        self._reading = _reading(self._ttl_ms if options.ttl_touch else None)
        self._topology = topology
        self._clock = clock

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """One pipelined EXISTS per key: one round trip per server, all at once."""
        commands = [(key, (b"EXISTS", redis_key(key))) for key in keys]
        deadline = Deadline(self._lookup_timeout_s, self._clock)
        return [reply == 1 for reply in self._ask(commands, deadline)]

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        return _value(self.get_many_into([key], [parts])[0])

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        _value(self.put_many([key], [parts])[0])

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        """Of each server over one connection, requests sent ahead; given up where a server stops sending."""
        deadline = PacedDeadline(self._timeout_s, self._floor, self._clock)
        pairs = zip(keys, parts_per_key, strict=True)
        readings = [Reading(key, [bytes_of(part) for part in parts]) for key, parts in pairs]

        def read(wire: Wire, share: Sequence[Reading]) -> None:
            Reader(wire, self._reading, self._part_bytes, deadline).read(share)

        self._transfer(readings, read, deadline)
        self._remove_torn([reading for reading in readings if reading.is_torn], deadline)
        return [reading.outcome for reading in readings]

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> list[StoreError | None]:
        """To each server over one connection, objects sent ahead."""
        deadline = self._deadline()
        pairs = zip(keys, parts_per_key, strict=True)
        writings = [self._writing(key, [bytes_of(part) for part in parts]) for key, parts in pairs]

        def send(wire: Wire, share: Sequence[Writing]) -> None:
            write(wire, share, self._setting, self._lasting, deadline)

        self._transfer(writings, send, deadline)
        return [writing.outcome for writing in writings]

    def delete(self, keys: Sequence[bytes]) -> None:
        self._delete(keys, self._deadline())

    def ping(self) -> float:
        """PING of every server that has keys: the store is back when all are, or others have taken their places."""
        started_at = self._clock()
        deadline = self._deadline()
        self._looking_again(lambda: self._ping(deadline))
        return self._clock() - started_at

    def usage(self) -> Usage:
        """`used_memory` and `maxmemory`, which include what is not ours."""
        deadline = self._deadline()
        pools = self._pools(deadline)
        replies = self._roundtrip([(pool, [(b"INFO", b"memory")]) for pool in pools], deadline)
        used = [number(info_field(reply, b"used_memory")) for reply in replies]
        limits = [number(info_field(reply, b"maxmemory")) for reply in replies]
        return Usage(
            sum(number for number in used if number) if all(number is not None for number in used) else None,
            sum(limit for limit in limits if limit) if all(limits) else None,
            None,
        )

    def survey(self) -> list[Survey]:
        """Of every server that has keys; of all of them together, why nobody knows which these are."""
        try:
            pools = self._pools(self._deadline())
        except StoreError as error:
            return [Survey(self.name, failure=str(error))]
        return [surveyed(pool.label, partial(survey_of, pool, self._deadline(), self._clock)) for pool in pools]

    def close(self) -> None:
        self._topology.close()

    def _ping(self, deadline: Deadline) -> None:
        for pool in self._topology.pools(deadline):
            reply = self._roundtrip([(pool, [(b"PING",)])], deadline)[0]
            if reply != b"PONG":
                raise StoreUnavailable(f"{pool.label}: PING was answered with {str(reply)[:40]!r}")

    def _delete(self, keys: Sequence[bytes], deadline: Deadline) -> None:
        heads = self._ask([(key, head_of(key)) for key in keys], deadline)
        gone: list[tuple[bytes, Command]] = []
        for key, head in zip(keys, heads, strict=True):
            manifest = manifest_in(head, key)
            gone.append((key, (b"UNLINK", redis_key(key), *(manifest.part_keys(key) if manifest else []))))
        self._ask(gone, deadline)

    def _writing(self, key: bytes, views: Sequence[memoryview]) -> Writing:
        """In parts where it is long, or where it would be taken for the beginning of parts."""
        num_bytes = sum(view.nbytes for view in views)
        is_whole = num_bytes <= self._whole_bytes
        if is_whole and num_bytes >= MANIFEST_BYTES:
            is_whole = parse_manifest(b"".join(cut(views, 0, MANIFEST_BYTES)), key) is None
        return Writing(key, views, None if is_whole else new_manifest(num_bytes, self._part_bytes))

    def _transfer(self, transfers: Sequence[X], call: Callable[[Wire, Sequence[X]], None], deadline: Deadline) -> None:
        """End each transfer, with the server of its key; where a key has moved, learn where to and try once more."""
        self._try_each(transfers, call, deadline)
        moved = [transfer for transfer in transfers if isinstance(transfer.outcome, Moved)]
        if moved:
            self._topology.refresh(moved=True)
            for transfer in moved:
                transfer.begin_again()
            self._try_each(moved, call, deadline)
        outcomes = [transfer.outcome for transfer in transfers]
        if any(isinstance(outcome, StoreError) and not isinstance(outcome, StoreFull) for outcome in outcomes):
            self._topology.refresh(moved=False)  # a failed server may have been replaced

    def _try_each(self, transfers: Sequence[X], call: Callable[[Wire, Sequence[X]], None], deadline: Deadline) -> None:
        groups: dict[int, tuple[Pool, list[X]]] = {}
        for transfer in transfers:
            try:
                pool = self._topology.pool_of(transfer.key, deadline)
            except StoreError as error:
                transfer.end(error)
            else:
                groups.setdefault(id(pool), (pool, []))[1].append(transfer)
        for pool, group in groups.values():
            _try_server(pool, group, call, deadline)

    def _remove_torn(self, torn: Sequence[Reading], deadline: Deadline) -> None:
        """Remove what is left of objects that miss a part, unless they were written anew meanwhile."""
        if not torn:
            return
        with suppress(StoreError):  # who may not delete still has a miss
            heads = self._ask([(reading.key, head_of(reading.key)) for reading in torn], deadline)
            gone: list[tuple[bytes, Command]] = []
            for reading, head in zip(torn, heads, strict=True):
                assert reading.manifest is not None
                is_same = manifest_in(head, reading.key) == reading.manifest
                names = [*([redis_key(reading.key)] if is_same else []), *reading.manifest.part_keys(reading.key)]
                gone += [(reading.key, (b"UNLINK", *names))] if names else []
            self._ask(gone, deadline)

    def _setting(self, name: bytes, value: Sequence[memoryview]) -> Command:
        return (b"SET", name, value) if self._ttl_ms is None else (b"SET", name, value, b"PX", self._ttl_ms)

    def _lasting(self, part: bytes) -> Command:
        return (b"PERSIST", part) if self._ttl_ms is None else (b"PEXPIRE", part, self._ttl_ms)

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
                if not (command[0] in _LOOKS and isinstance(reply, ErrorReply) and reply.code in NOT_THERE):
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


def _try_server(
    pool: Pool, transfers: Sequence[X], call: Callable[[Wire, Sequence[X]], None], deadline: Deadline
) -> None:
    """End the transfers of one server; `call` may leave some to another connection, but never all."""
    try:
        while left := [transfer for transfer in transfers if not transfer.is_done]:
            with pool.connection(deadline) as wire:
                call(wire, left)
                for transfer in left:
                    if isinstance(transfer.outcome, StoreError) and not isinstance(transfer.outcome, StoreFull):
                        raise transfer.outcome  # to the pool: its connections lead where we are refused
    except StoreError as error:
        for transfer in transfers:
            if not transfer.is_done:
                transfer.end(error)


def _reading(touch_ms: int | None) -> Callable[[bytes], bytes]:
    """What encodes the command that reads a value, and has it live on for so long."""
    if touch_ms is None:
        return lambda name: b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name)
    return lambda name: b"".join(encode((b"GETEX", name, b"PX", touch_ms)))


def _value(outcome: T | StoreError) -> T:
    """The outcome, unless it is a failure, which is raised."""
    if isinstance(outcome, StoreError):
        raise outcome
    return outcome


def _ok(reply: T, label: str) -> T:
    """The reply, unless it is an error, which is raised."""
    if isinstance(reply, ErrorReply):
        raise error_of(reply, label)
    return reply
