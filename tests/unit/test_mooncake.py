"""mooncakestore://: the contract against a real master, with the objects in the memory of another process."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence

import pytest

from lmcache_ext.errors import StoreError
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.mooncake_store import EMPTY
from lmcache_ext.stores.registry import open_store
from tests.contracts.store_contract import StoreContract, get, key_of, views
from tests.mooncake_servers import MIB, master, owner
from tests.servers import Server, free_port

OPTIONS = {"global_segment_bytes": 0, "local_buffer_bytes": 64 * MIB, "local_hostname": "127.0.0.1"}


def opened(server: Server, **options: object) -> Store:
    return open_store(f"mooncakestore://{server.address}/", options={**OPTIONS, **options})


def name_of(key: bytes) -> str:
    return f"kv:{key[:16].hex()}:{key[16:].hex()}"


@pytest.fixture(scope="module")
def mooncake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with master(tmp_path_factory.mktemp("mooncake")) as server, owner(server.address):
        yield server


@pytest.fixture(scope="module")
def raw(mooncake: Server):
    """A client of Mooncake's own."""
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 64 * MIB, "tcp", "", mooncake.address) == 0
    yield client
    client.close()


class OfRows(Store):
    """A store whose callers' objects lie in registered rows, but for their first 64 bytes: as chunks do.

    Each call has rows of its own; what the contract passes is copied to them and back.
    """

    ROOM = 16 * MIB

    def __init__(self, store: Store) -> None:
        self.name = store.name
        self.inner = store
        self._rows = memoryview(mmap.mmap(-1, 10 * self.ROOM))
        store.register(self._rows.cast("B", (10, self.ROOM)))
        self._free = list(range(10))
        self._lock = threading.Condition()

    def get_into(self, key: bytes, parts: Sequence[memoryview]) -> int | None:
        outcome = self.get_many_into([key], [parts])[0]
        assert not isinstance(outcome, StoreError)
        return outcome

    def put(self, key: bytes, parts: Sequence[memoryview]) -> None:
        assert self.put_many([key], [parts]) == [None]

    def get_many_into(self, keys, parts_per_key):
        with self._lock:
            self._lock.wait_for(lambda: self._free)
            row = self._free.pop()
        objects = self._placed(row, parts_per_key)
        for parts, stand_ins in zip(parts_per_key, objects, strict=True):
            copy(parts, stand_ins)
        outcomes = self.inner.get_many_into(keys, objects)
        for parts, stand_ins in zip(parts_per_key, objects, strict=True):
            copy(stand_ins, parts)
        self._give_back(row)
        return outcomes

    def put_many(self, keys, parts_per_key):
        with self._lock:
            self._lock.wait_for(lambda: self._free)
            row = self._free.pop()
        objects = self._placed(row, parts_per_key)
        for parts, stand_ins in zip(parts_per_key, objects, strict=True):
            copy(parts, stand_ins)
        outcomes = self.inner.put_many(keys, objects)
        self._rows[row * self.ROOM : (row + 1) * self.ROOM] = b"\xee" * self.ROOM
        self._give_back(row)
        return outcomes

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return self.inner.exists(keys)

    def delete(self, keys: Sequence[bytes]) -> None:
        self.inner.delete(keys)

    def ping(self) -> float:
        return self.inner.ping()

    def usage(self):
        return self.inner.usage()

    def close(self) -> None:
        self.inner.close()

    def _placed(self, row: int, parts_per_key) -> list[list[memoryview]]:
        at, objects = row * self.ROOM, []
        for parts in parts_per_key:
            stand_ins = []
            for part in parts:
                size, is_row = part.nbytes, part.nbytes > 64
                stand_ins.append(self._rows[at : at + size] if is_row else memoryview(bytearray(size)))
                at += size + 32 if is_row else 0
            objects.append(stand_ins)
        assert at <= (row + 1) * self.ROOM
        return objects

    def _give_back(self, row: int) -> None:
        with self._lock:
            self._free.append(row)
            self._lock.notify_all()


def copy(source: Sequence[memoryview], target: Sequence[memoryview]) -> None:
    for one, other in zip(source, target, strict=True):
        other.cast("B")[:] = one.cast("B")


class Shared:
    """One store for many tests, for leaving Mooncake takes a second; a new one where a test closed it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._plain = opened(server)
        self._of_rows = OfRows(opened(server))

    def plain(self) -> Store:
        if self._plain._session._closed:
            self._plain = opened(self._server)
        return self._plain

    def of_rows(self) -> Store:
        if self._of_rows.inner._session._closed:
            self._of_rows = OfRows(opened(self._server))
        return self._of_rows

    def close(self) -> None:
        self._plain.close()
        self._of_rows.close()


@pytest.fixture(scope="module")
def shared(mooncake: Server) -> Iterator[Shared]:
    one = Shared(mooncake)
    yield one
    one.close()


class TestMooncake(StoreContract):
    @pytest.fixture
    def store(self, shared: Shared, raw) -> Store:
        raw.remove_all(True)
        self.raw = raw
        return shared.plain()

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        assert self.raw.put(name_of(key), data or EMPTY) == 0

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        if self.raw.is_exist(name_of(key)) != 1:
            return None
        data = self.raw.get(name_of(key))
        return b"" if data == EMPTY else data


class TestMooncakeOfRows(TestMooncake):
    """Without a copy, from and into registered rows."""

    @pytest.fixture
    def store(self, shared: Shared, raw) -> Store:
        raw.remove_all(True)
        self.raw = raw
        return shared.of_rows()


def test_a_row_and_its_frame_are_one_object_that_moves_without_the_clients_buffer(mooncake, raw):
    """The client's own buffer has 1 MiB here; the row has 4."""
    store = opened(mooncake, local_buffer_bytes=MIB)
    rows = memoryview(mmap.mmap(-1, 16 * MIB)).cast("B", (4, 4 * MIB))
    store.register(rows)
    flat = rows.cast("B")
    one, other = flat[: 4 * MIB], flat[8 * MIB : 12 * MIB]
    one[:] = bytes(range(256)) * (4 * MIB // 256)
    store.put(key_of("row"), [memoryview(b"h" * 64), one])
    assert raw.get(name_of(key_of("row"))) == b"h" * 64 + bytes(one)
    header = memoryview(bytearray(64))
    assert store.get_into(key_of("row"), [header, other]) == 64 + 4 * MIB
    assert (bytes(header), other == one) == (b"h" * 64, True)
    with pytest.raises(StoreError):  # what does not lie in rows has to fit the buffer
        store.put(key_of("elsewhere"), views(bytes(4 * MIB)))
    store.close()


def test_it_joins_through_a_metadata_server(tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}/metadata"
    flags = ["-enable_http_metadata_server=true", f"-http_metadata_server_port={port}"]
    with master(tmp_path, *flags) as server, owner(server.address, metadata=url):
        store = opened(server, metadata_server=url, lookup_timeout_s=10.0)
        assert store.exists([key_of("a")]) == [False]
        store.put(key_of("a"), views(b"data"))
        assert get(store, key_of("a"), 4) == b"data"
        store.close()
