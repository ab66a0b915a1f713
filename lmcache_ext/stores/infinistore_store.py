"""`infinistore://host:port/`: ByteDance's InfiniStore, which speaks RDMA only.

The server tells nobody how long an object is, so each is stored behind its length: 8 bytes, little-endian. It moves
through a slot of registered memory and is copied once on this side: the client transfers one contiguous piece per
object, and frame and row are two. Nobody has run this on RDMA hardware yet; the tests that need it are marked `rdma`.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmcache_ext.errors import ConfigError, StoreError, StoreFull, StoreUnavailable
from lmcache_ext.stores.base import NAMESPACE_BYTES, Store, Usage
from lmcache_ext.stores.infinistore_options import InfinistoreOptions, parse_options
from lmcache_ext.stores.session import Session

if TYPE_CHECKING:
    from types import ModuleType

    from lmcache_ext.stores.infinistore import Client, Slot

LENGTH_BYTES = 8
MAX_OBJECT_BYTES = 256 * 1024**2


class InfinistoreStore(Store):
    """One server.

    Threads:  any number.
    Order:    a put is visible when it returned; the server replaces an object at once.
    Owner:    objects are copied to and from slots of the client, so callers leave at the deadline.
    Failure:  StoreTimeout at the deadline, StoreFull where the server has no room, else StoreUnavailable; after that
              the connection is made anew.
    """

    name = "infinistore"

    def __init__(self, options: InfinistoreOptions, library: ModuleType) -> None:
        self._timeout_s = options.timeout_s
        self._lookup_timeout_s = options.lookup_timeout_s
        self._library = library
        self._session: Session[Client] = Session(self.name, lambda: library.Client(options))

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        names = [_name(key) for key in keys]
        return self._session.ask(self._lookup_timeout_s, lambda client: self._exist(client, names)) if names else []

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        room, name = sum(part.nbytes for part in parts), _name(key)
        data = self._session.ask(self._timeout_s, lambda client: self._read(client, name, room))
        if data is None:
            return None
        rest = memoryview(data)
        for part in parts:
            piece, rest = rest[: part.nbytes], rest[part.nbytes :]
            part.cast("B")[: piece.nbytes] = piece
        return len(data)

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        data, name = b"".join(parts), _name(key)
        if len(data) > MAX_OBJECT_BYTES:
            raise StoreFull(f"infinistore: an object of {len(data)} bytes, at most {MAX_OBJECT_BYTES}")
        self._session.ask(self._timeout_s, lambda client: self._write(client, name, data))

    def delete(self, keys: Sequence[bytes]) -> None:
        names = [_name(key) for key in keys]
        if names:
            self._session.ask(self._lookup_timeout_s, lambda client: self._remove(client, names))

    def ping(self) -> float:
        started_at = time.monotonic()
        self._session.ask(self._lookup_timeout_s, lambda client: self._exist(client, ["ping"]))
        return time.monotonic() - started_at

    def usage(self) -> Usage:
        """Unknown: the server's manage port has it, the protocol has not."""
        return Usage(None, None, None)

    def close(self) -> None:
        self._session.close()

    # What follows runs in threads of the session.

    def _exist(self, client: Client, names: Sequence[str]) -> list[bool]:
        with _Retired(self._session, client):
            return client.exist(names)

    def _remove(self, client: Client, names: Sequence[str]) -> None:
        with _Retired(self._session, client):
            client.remove(names)

    def _write(self, client: Client, name: str, data: bytes) -> None:
        with _Retired(self._session, client):
            slot = client.slot(LENGTH_BYTES + len(data))
            slot.data[:LENGTH_BYTES] = len(data).to_bytes(LENGTH_BYTES, "little")
            slot.data[LENGTH_BYTES : LENGTH_BYTES + len(data)] = data
            code = client.write(name, slot, LENGTH_BYTES + len(data))
            client.give_back(slot)
            if code != self._library.OK:
                raise self._library.error_of(code, "put")

    def _read(self, client: Client, name: str, room: int) -> bytes | None:
        """The object; a first slot for `room` bytes of it, then ever larger ones until it fits."""
        with _Retired(self._session, client):
            for size in _sizes(room):
                slot = client.slot(size)
                code = client.read(name, slot)
                data = _object(slot) if code == self._library.OK else None
                client.give_back(slot)
                if code in (self._library.OK, self._library.NOT_FOUND):
                    return data
                if code != self._library.TOO_SMALL:
                    raise self._library.error_of(code, "get")
            raise StoreUnavailable(f"infinistore: get: an object of more than {MAX_OBJECT_BYTES} bytes")


class _Retired:
    """A client whose call failed is closed, for nothing is known of its connection any more."""

    def __init__(self, session: Session[Client], client: Client) -> None:
        self._session = session
        self._client = client

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, StoreError) and not isinstance(error, StoreFull):
            self._session.retire(self._client)


def _name(key: bytes) -> str:
    return f"kv:{key[:NAMESPACE_BYTES].hex()}:{key[NAMESPACE_BYTES:].hex()}"


def _sizes(room: int) -> Iterator[int]:
    """Of slots to read into: for the parts as they are, then larger ones, for an object longer than its parts."""
    size = LENGTH_BYTES + room
    while size < LENGTH_BYTES + MAX_OBJECT_BYTES:
        yield size
        size = max(4 * size, 2**20)
    yield LENGTH_BYTES + max(MAX_OBJECT_BYTES, room)


def _object(slot: Slot) -> bytes:
    length = int.from_bytes(slot.data[:LENGTH_BYTES], "little")
    if length > slot.num_bytes - LENGTH_BYTES:
        raise StoreUnavailable(f"infinistore: get: {length} bytes in a block of at most {slot.num_bytes}")
    return bytes(slot.data[LENGTH_BYTES : LENGTH_BYTES + length])


def open_infinistore(url: str, options: Mapping[str, Any]) -> InfinistoreStore:
    """The entry point of `infinistore://`; nothing is connected yet. Raises ConfigError."""
    settings = parse_options(url, options)
    before = dict(os.environ)
    try:
        library = importlib.import_module("lmcache_ext.stores.infinistore")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "infinistore":
            raise
        raise ConfigError(f"infinistore:// needs a package: pip install infinistore ({error})") from error
    finally:
        os.environ.update(before)  # importing the client makes OpenMP of the whole process single-threaded
        for name in set(os.environ) - set(before):
            del os.environ[name]
    return InfinistoreStore(settings, library)
