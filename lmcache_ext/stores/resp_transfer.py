"""Many objects over one connection: requests are sent ahead, payloads land in and leave from the caller's memory.

    reading   GET a, GET b, GET c ─►           as many as fit in the server's cache, then one for each that came
              ◄─ a, the beginning of b with its manifest
              GET b's second part, ... ─►      before its first is received
              ◄─ c, the parts of b

    writing   the parts of all objects ─►      a few ahead; each to expire, should this writer die
              each key, and that its parts may stay ─►

One connection that is never idle is as fast as several, for Redis has one thread. How much is under way decides the
speed (`resp_wire.AHEAD_BYTES`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_ext.errors import StoreError, StoreFull
from lmcache_ext.stores.resp import Argument, ErrorReply, Reply
from lmcache_ext.stores.resp_parts import MAGIC, MANIFEST_BYTES, WHOLE_PARTS, Manifest, parse_manifest, redis_key
from lmcache_ext.stores.resp_topology import error_of
from lmcache_ext.stores.resp_wire import MAX_AHEAD, MIN_AHEAD, Deadline, Wire
from lmcache_ext.stores.sockets import cut

Command = Sequence[Argument]

ORPHAN_S = 600
"""A part that is not published yet lives so long; more than any write takes."""

GRACE_S = 15
"""A part of an overwritten object lives so long; more than any read takes."""

NOT_THERE = frozenset({"ASK", "WRONGTYPE"})
"""Errors that are a miss for who looks: the key is moving to another node, or it is a foreign list or hash."""


@dataclass(slots=True)
class Reading:
    """An object on its way to `views`; `outcome` is its length, None for a miss, or why it failed."""

    key: bytes
    views: Sequence[memoryview]
    outcome: int | StoreError | None = None
    is_done: bool = False
    manifest: Manifest | None = None
    num_left: int = 1
    is_torn: bool = False
    """A part of it is not there: what is left of it is to be removed."""

    @property
    def room(self) -> int:
        """Bytes that there is room for."""
        return sum([view.nbytes for view in self.views])

    def end(self, outcome: int | StoreError | None) -> None:
        self.outcome, self.is_done = outcome, True

    def begin_again(self) -> None:
        self.outcome, self.is_done, self.manifest, self.is_torn, self.num_left = None, False, None, False, 1


@dataclass(slots=True)
class Writing:
    """An object on its way from `views`; `outcome` is None, or why it failed."""

    key: bytes
    views: Sequence[memoryview]
    manifest: Manifest | None
    outcome: StoreError | None = None
    is_done: bool = False

    def end(self, outcome: StoreError | None) -> None:
        self.outcome, self.is_done = outcome, True

    def begin_again(self) -> None:
        self.outcome, self.is_done = None, False

    def value(self) -> list[memoryview]:
        """What is stored under its own key."""
        if self.manifest is None:
            return list(self.views)
        return [memoryview(self.manifest.encode(self.key)), *self.part(0)]

    def part(self, index: int) -> list[memoryview]:
        assert self.manifest is not None
        return cut(self.views, index * self.manifest.part_bytes, self.manifest.length_of(index))

    def part_keys(self) -> list[bytes]:
        return self.manifest.part_keys(self.key) if self.manifest is not None else []


class _Piece(NamedTuple):
    """A value to ask for: the one under an object's own key, or part `number` of it."""

    reading: Reading
    number: int
    name: bytes
    num_bytes: int
    """At most, as far as is known."""


@dataclass(slots=True)
class Reader:
    """Reads objects over one connection, in one thread.

    `ask` encodes the command that reads a value. Objects are ended one by one, so that those read before the connection
    failed stand; the failure itself is raised.
    """

    wire: Wire
    ask: Callable[[bytes], bytes]
    part_bytes: int
    deadline: Deadline
    _todo: deque[Iterator[_Piece]] = field(default_factory=deque)
    _asked: deque[_Piece] = field(default_factory=deque)
    _asked_bytes: int = 0
    _most_bytes: int = 0

    def read(self, readings: Sequence[Reading]) -> None:
        """End all readings, but for those behind a foreign value too long to be worth draining."""
        self._most_bytes = self.wire.ahead_bytes()
        self._todo.append(self._heads(readings))
        self._ask_ahead()
        while self._asked:
            piece = self._asked[0]
            if piece.number:
                self._receive_part(piece)
            else:
                self._receive_head(piece.reading)
            self._asked.popleft()
            self._asked_bytes -= piece.num_bytes
            if not self.wire.goes_on:
                return
            self._ask_ahead()

    def _heads(self, readings: Sequence[Reading]) -> Iterator[_Piece]:
        for reading in readings:
            yield _Piece(reading, 0, redis_key(reading.key), min(reading.room, self.part_bytes))

    def _parts(self, reading: Reading, manifest: Manifest, num_parts: int) -> Iterator[_Piece]:
        """The first parts but for number 0, as long as none was missing."""
        for index, name in zip(range(1, num_parts), manifest.part_keys(reading.key), strict=False):
            if reading.is_done:
                return
            yield _Piece(reading, index, name, manifest.length_of(index))

    def _ask_ahead(self) -> None:
        """Ask for as much as may be under way: one more for each that came, so that the server is never idle."""
        commands: list[bytes] = []
        while self._todo and len(self._asked) < MAX_AHEAD:
            if len(self._asked) >= MIN_AHEAD and self._asked_bytes >= self._most_bytes:
                break
            piece = next(self._todo[0], None)
            if piece is None:
                self._todo.popleft()
                continue
            commands.append(self.ask(piece.name))
            self._asked.append(piece)
            self._asked_bytes += piece.num_bytes
        if commands:
            self.wire.send([b"".join(commands)], len(commands), self.deadline)

    def _receive_head(self, reading: Reading) -> None:
        room = reading.room
        if 0 < room <= WHOLE_PARTS * self.part_bytes and self.wire.take(
            b"$%d\r\n" % room, reading.views, self.deadline, unlike=MAGIC
        ):
            reading.end(room)
            return
        length = self.wire.length(self.deadline)
        if not isinstance(length, int):
            reading.end(_why_not(length, self.wire.label))
            return
        head = self.wire.peek(min(length, MANIFEST_BYTES), self.deadline)
        manifest = parse_manifest(head, reading.key)
        if manifest is None:
            self.wire.payload(length, reading.views, self.deadline)
            reading.end(length)
            return
        self._ask_for_parts(reading, manifest)
        target = [memoryview(bytearray(MANIFEST_BYTES)), *cut(reading.views, 0, manifest.length_of(0))]
        self._receive(reading, length, MANIFEST_BYTES + manifest.length_of(0), target)

    def _ask_for_parts(self, reading: Reading, manifest: Manifest) -> None:
        """The parts that there is room for, before anything else."""
        reading.manifest = manifest
        reading.num_left = max(1, min(manifest.num_parts, -(-reading.room // manifest.part_bytes)))
        self._todo.appendleft(self._parts(reading, manifest, reading.num_left))
        self._ask_ahead()

    def _receive_part(self, piece: _Piece) -> None:
        reading, manifest = piece.reading, piece.reading.manifest
        assert manifest is not None
        target = cut(reading.views, piece.number * manifest.part_bytes, piece.num_bytes)
        if self.wire.take(b"$%d\r\n" % piece.num_bytes, target, self.deadline):
            self._came(reading)
            return
        self._receive(reading, self.wire.length(self.deadline), piece.num_bytes, target)

    def _receive(
        self, reading: Reading, length: int | ErrorReply | None, expected: int, target: Sequence[memoryview]
    ) -> None:
        """One part, which should have `expected` bytes; where it has not, the object is a miss."""
        if isinstance(length, int):
            self.wire.payload(length, target if length == expected else [], self.deadline)
        if length != expected:
            failure = None if isinstance(length, int) else _why_not(length, self.wire.label)
            reading.is_torn = reading.is_torn or failure is None
            reading.end(failure)
        self._came(reading)

    def _came(self, reading: Reading) -> None:
        """One part less is to come."""
        reading.num_left -= 1
        if not reading.num_left and not reading.is_done:
            assert reading.manifest is not None
            reading.end(reading.manifest.num_bytes)


def write(
    wire: Wire,
    writings: Sequence[Writing],
    setting: Callable[[bytes, Sequence[memoryview]], Command],
    lasting: Callable[[bytes], Command],
    deadline: Deadline,
) -> None:
    """Write objects over one connection, and end each; only a failure of the connection itself is raised.

    `setting` makes the command that sets an object's key, `lasting` the one that lets a part live as long.
    """
    _write_parts(wire, writings, deadline)
    good = [writing for writing in writings if not writing.is_done]
    batches = [_publishing(writing, setting, lasting) for writing in good]
    replies = wire.ask_all([command for batch in batches for command in batch], deadline)
    cleaning: list[Command] = []
    for writing, batch in zip(good, batches, strict=True):
        before, published, *kept = replies[: len(batch)]
        del replies[: len(batch)]
        writing.end(_failure(published, kept, wire.label))
        cleaning += _cleaning(writing, published, manifest_in(before, writing.key))
    wire.ask_all(cleaning, deadline)


def _write_parts(wire: Wire, writings: Sequence[Writing], deadline: Deadline) -> None:
    """All parts but the first of each; ends the writings whose parts were refused."""
    owners = [writing for writing in writings for _ in writing.part_keys()]
    replies = wire.ask_all((command for writing in writings for command in _setting_parts(writing)), deadline)
    for writing, reply in zip(owners, replies, strict=True):
        if isinstance(reply, ErrorReply) and not writing.is_done:
            writing.end(error_of(reply, wire.label))
    # What little room there is, is not for parts of nothing.
    full = [writing for writing in writings if isinstance(writing.outcome, StoreFull)]
    wire.ask_all([(b"UNLINK", *writing.part_keys()) for writing in full], deadline)


def _setting_parts(writing: Writing) -> Iterator[Command]:
    for index, name in enumerate(writing.part_keys(), 1):
        yield (b"SET", name, writing.part(index), b"EX", ORPHAN_S)


def _publishing(
    writing: Writing, setting: Callable[[bytes, Sequence[memoryview]], Command], lasting: Callable[[bytes], Command]
) -> list[Command]:
    """Set the object's key, and let its parts stay."""
    name = redis_key(writing.key)
    return [head_of(writing.key), setting(name, writing.value()), *map(lasting, writing.part_keys())]


def _cleaning(writing: Writing, published: Reply, old: Manifest | None) -> list[Command]:
    """What is left of the object that was there before, or of this one where it failed."""
    if writing.outcome is None:
        return [(b"EXPIRE", part, GRACE_S) for part in old.part_keys(writing.key)] if old else []
    names = [] if isinstance(published, ErrorReply) else [redis_key(writing.key)]
    return [(b"UNLINK", *names, *writing.part_keys())] if names or writing.part_keys() else []


def _failure(published: Reply, kept: Sequence[Reply], label: str) -> StoreError | None:
    if isinstance(published, ErrorReply):
        return error_of(published, label)
    refused = next((reply for reply in kept if isinstance(reply, ErrorReply)), None)
    if refused is not None:
        return error_of(refused, label)
    if any(reply != 1 for reply in kept):
        return StoreFull(f"{label}: {kept.count(0)} of {len(kept)} parts were evicted while writing")
    return None


def _why_not(reply: ErrorReply | None, label: str) -> StoreError | None:
    """Of a value that does not come: None for a miss."""
    return None if reply is None or reply.code in NOT_THERE else error_of(reply, label)


def head_of(key: bytes) -> Command:
    """The command that tells whether a manifest is there, without fetching what else may be."""
    return (b"GETRANGE", redis_key(key), 0, MANIFEST_BYTES - 1)


def manifest_in(head: Reply, key: bytes) -> Manifest | None:
    """The manifest in the answer to `head_of`."""
    return parse_manifest(head, key) if isinstance(head, bytes) else None
