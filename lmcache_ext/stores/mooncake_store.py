"""`mooncakestore://host:port/`: a store of the DRAM and SSD of many machines (github.com/kvcache-ai/Mooncake).

Mooncake's objects are put once and never change, and readers hold leases on them. A put over an object therefore
removes it first; readers of this process wait for that (`turns`), readers of another may miss, or read what is being
overwritten and find that its checksum is wrong. An object of no bytes does not exist there: EMPTY stands for it.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache_ext.errors import ConfigError, StoreError
from lmcache_ext.stores.base import NAMESPACE_BYTES, Store, Usage
from lmcache_ext.stores.mooncake_options import MooncakeOptions, parse_options
from lmcache_ext.stores.registered import Memory, Pieces, as_bytes
from lmcache_ext.stores.session import Session
from lmcache_ext.stores.turns import Turns

if TYPE_CHECKING:
    from lmcache_ext.stores.mooncake import Client

T = TypeVar("T")
Object = tuple[str, Sequence[memoryview]]  # its name, its parts

EMPTY = bytes.fromhex("c5a1b0e7d4f2938601b7aa2c4e5d6f70")
"""The object that stands for one of no bytes."""

_PACKAGE = "mooncake-transfer-engine-non-cuda"  # on machines with CUDA: mooncake-transfer-engine


class MooncakeStore(Store):
    """One Mooncake cluster, as one of its clients.

    Threads:  any number.
    Order:    as the contract has it within this process; Mooncake's own between processes.
    Owner:    bytes move straight between registered rows and the segments; what lies elsewhere is copied once.
    Failure:  StoreTimeout at the deadline of exists, delete and ping, and of a get or put while the master is asked.
              While rows are on the wire the client's own timeouts count, one or two deadlines, and one minute for an
              engine that hangs before it was ever talked to: rows cannot be given back earlier.
    """

    name = "mooncake"

    def __init__(self, options: MooncakeOptions, connect: Callable[[Sequence[tuple[int, int]]], Client]) -> None:
        self._timeout_s = options.timeout_s
        self._lookup_timeout_s = options.lookup_timeout_s
        self._memory = Memory()
        self._turns = Turns()
        self._session = Session(self.name, lambda: connect(self._memory.regions()))

    def register(self, memory: memoryview) -> None:
        """Connects in the background: joining takes a moment, and the rows are known by then."""
        self._memory.add_rows(memory)
        self._session.warm()

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        names = [_name(key) for key in keys]
        return self._session.ask(self._lookup_timeout_s, lambda client: client.exist(names)) if names else []

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        outcome = self.get_many_into([key], [parts])[0]
        if isinstance(outcome, StoreError):
            raise outcome
        return outcome

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        outcome = self.put_many([key], [parts])[0]
        if outcome is not None:
            raise outcome

    def get_many_into(
        self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]
    ) -> list[int | StoreError | None]:
        objects = list(zip(map(_name, keys), parts_per_key, strict=True))
        if not objects:
            return []
        try:
            with self._turns.reading(keys, self._timeout_s):
                return self._get(objects, time.monotonic() + self._timeout_s)
        except StoreError as error:
            return [error] * len(keys)

    def put_many(self, keys: Sequence[bytes], parts_per_key: Sequence[Sequence[memoryview]]) -> list[StoreError | None]:
        objects = [(_name(key), as_bytes(parts)) for key, parts in zip(keys, parts_per_key, strict=True)]
        if not objects:
            return []
        try:
            with self._turns.writing(keys, self._timeout_s):
                return self._put(objects, time.monotonic() + self._timeout_s)
        except StoreError as error:
            return [error] * len(keys)

    def delete(self, keys: Sequence[bytes]) -> None:
        names = [_name(key) for key in keys]
        if names:
            with self._turns.writing(keys, self._lookup_timeout_s):
                self._session.ask(self._lookup_timeout_s, lambda client: client.remove(names))

    def ping(self) -> float:
        started_at = time.monotonic()
        self._session.ask(self._lookup_timeout_s, lambda client: client.exist(["ping"]))
        return time.monotonic() - started_at

    def usage(self) -> Usage:
        """Unknown: only the master's own metrics tell."""
        return Usage(None, None, None)

    def close(self) -> None:
        self._session.close()

    def _get(self, objects: Sequence[Object], end: float) -> list[int | StoreError | None]:
        client, lengths = self._session.ask(_left(end), partial(_lengths, names=[name for name, _ in objects]))
        outcomes: list[int | StoreError | None] = [*lengths]
        found = {index: length for index, length in enumerate(lengths) if length is not None}
        with ExitStack() as slots:
            direct = self._in_registered_memory(
                {index: as_bytes(objects[index][1], length) for index, length in found.items()}, slots
            )
            direct = {index: pieces for index, pieces in direct.items() if pieces.num_bytes == found[index]}
            for index in found.keys() - direct.keys():
                outcomes[index] = _outcome(partial(self._get_copy, *objects[index], end))
            names = [objects[index][0] for index in direct]
            for index, outcome in zip(direct, self._read(client, names, [*direct.values()]), strict=True):
                outcomes[index] = outcome
        return outcomes

    def _read(self, client: Client, names: list[str], pieces: list[Pieces]) -> list[int | StoreError | None]:
        if not names:
            return []
        outcomes = client.read(names, [each.addresses for each in pieces], [each.sizes for each in pieces])
        if client.may_still_write:
            self._session.retire(client)
        for each, outcome in zip(pieces, outcomes, strict=True):
            if isinstance(outcome, int):
                each.copy_out()
        return outcomes

    def _get_copy(self, name: str, parts: Sequence[memoryview], end: float) -> int:
        """By way of the client's own buffer: for parts outside of rows, and for objects longer than their parts."""
        data = self._session.ask(_left(end), lambda client: client.read_copy(name))
        if data == EMPTY:
            return 0
        rest = data
        for part in as_bytes(parts):
            piece, rest = rest[: part.nbytes], rest[part.nbytes :]
            part[: piece.nbytes] = piece
        return data.nbytes

    def _put(self, objects: Sequence[Object], end: float) -> list[StoreError | None]:
        client = self._session.ask(_left(end), partial(_cleared, names=[name for name, _ in objects]))
        outcomes: list[StoreError | None] = [None] * len(objects)
        with ExitStack() as slots:
            direct = self._in_registered_memory(dict(enumerate(parts for _, parts in objects)), slots)
            for index in set(range(len(objects))) - direct.keys():
                outcomes[index] = _outcome(partial(self._put_copy, *objects[index], end))
            names = [objects[index][0] for index in direct]
            for index, outcome in zip(direct, self._write(client, names, [*direct.values()]), strict=True):
                outcomes[index] = outcome
        return outcomes

    def _write(self, client: Client, names: list[str], pieces: list[Pieces]) -> list[StoreError | None]:
        if not names:
            return []
        for each in pieces:
            each.copy_in()
        return client.write(names, [each.addresses for each in pieces], [each.sizes for each in pieces])

    def _put_copy(self, name: str, parts: Sequence[memoryview], end: float) -> None:
        data = b"".join(parts) or EMPTY
        self._session.ask(_left(end), lambda client: client.write_copy(name, data))

    def _in_registered_memory(self, objects: Mapping[int, Sequence[memoryview]], slots: ExitStack) -> dict[int, Pieces]:
        """Those that lie in rows, but for small parts, which get a stand-in. What stands for nothing is no such one."""
        found = {}
        for index, parts in objects.items():
            if sum(part.nbytes for part in parts) not in (0, len(EMPTY)):
                pieces = self._memory.pieces(parts, slots.enter_context(self._memory.slot()))
                if pieces is not None:
                    found[index] = pieces
        return found


def _name(key: bytes) -> str:
    return f"kv:{key[:NAMESPACE_BYTES].hex()}:{key[NAMESPACE_BYTES:].hex()}"


def _lengths(client: Client, names: Sequence[str]) -> tuple[Client, list[int | None]]:
    """The client, which has just answered, and the length of each object."""
    return client, [client.length(name) for name in names]


def _cleared(client: Client, names: Sequence[str]) -> Client:
    """The client, after what was there under these names has been removed."""
    there = [name for name, is_there in zip(names, client.exist(names), strict=True) if is_there]
    if there:
        client.remove(there)
    return client


def _left(end: float) -> float:
    return end - time.monotonic()


def _outcome(call: Callable[[], T]) -> T | StoreError:
    try:
        return call()
    except StoreError as error:
        return error


def open_mooncake(url: str, options: Mapping[str, Any]) -> MooncakeStore:
    """The entry point of `mooncakestore://`; nothing is connected yet. Raises ConfigError."""
    settings = parse_options(url, options)
    for name, value in settings.environment().items():
        os.environ.setdefault(name, value)
    try:
        library = importlib.import_module("lmcache_ext.stores.mooncake")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "mooncake":
            raise
        raise ConfigError(f"mooncakestore:// needs a package: pip install {_PACKAGE} ({error})") from error
    return MooncakeStore(settings, lambda memory: library.Client(settings, memory))
