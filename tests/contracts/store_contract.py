"""The one conformance suite of `lmcache_ext.stores.base.Store`; every backend inherits it.

A backend's test is a subclass that gives the store, and a raw reader and writer that bypass it:

    class TestX(StoreContract):
        @pytest.fixture
        def store(self) -> Iterator[Store]: ...
        def raw_write(self, store: Store, key: bytes, data: bytes) -> None: ...
        def raw_read(self, store: Store, key: bytes) -> bytes | None: ...

The store needs room for ROOM_BYTES.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmcache_ext.stores.base import MAX_KEY_BYTES, Store

ROOM_BYTES = 64 * 1024**2
NAMESPACE = bytes(range(16))
OTHER_NAMESPACE = bytes(range(1, 17))
SIZES = [0, 1, 64, 64 + 4096, 5 * 1024**2]
GUARD = b"\xa5" * 32


def key_of(name: str, namespace: bytes = NAMESPACE) -> bytes:
    return namespace + name.encode()


def views(*pieces: bytes) -> list[memoryview]:
    return [memoryview(piece) for piece in pieces]


def cut(data: bytes) -> list[memoryview]:
    """A header, nothing, a first half, a second half: as objects really come."""
    view = memoryview(data)
    middle = max(64, len(data) // 2)
    return [view[:64], view[:0], view[64:middle], view[middle:]]


class Landing:
    """Buffers to read into, with bytes before, between and after them that nobody may touch."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._whole = bytearray(GUARD + b"".join(b"\0" * size + GUARD for size in sizes))
        self._spans = []
        at = len(GUARD)
        for size in sizes:
            self._spans.append((at, at + size))
            at += size + len(GUARD)

    def parts(self) -> list[memoryview]:
        return [memoryview(self._whole)[start:end] for start, end in self._spans]

    def data(self) -> bytes:
        return b"".join(bytes(part) for part in self.parts())

    def assert_guards_untouched(self) -> None:
        edges = [0, *(edge for span in self._spans for edge in span), len(self._whole)]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            assert bytes(self._whole[start:end]) == GUARD


def get(store: Store, key: bytes, size: int) -> bytes | None:
    """Read an object that should have `size` bytes; its data, or None on a miss."""
    landing = Landing([size])
    length = store.get_into(key, landing.parts())
    landing.assert_guards_untouched()
    return None if length is None else landing.data()[:length]


def in_threads(num_threads: int, call: Callable[[int], None]) -> None:
    """Run `call(index)` in threads that start together; the first exception is raised here."""
    barrier = threading.Barrier(num_threads)

    def start(index: int) -> None:
        barrier.wait()
        call(index)

    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(start, index) for index in range(num_threads)]:
            future.result()


class StoreContract:
    """Inherit, give `store`, `raw_write` and `raw_read`."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        raise NotImplementedError

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        """Put an object where the store will look, without the store."""
        raise NotImplementedError

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        """Read an object where the store keeps it, without the store."""
        raise NotImplementedError

    def test_a_miss_is_a_value(self, store: Store) -> None:
        landing = Landing([64])
        assert store.get_into(key_of("nobody"), landing.parts()) is None
        assert landing.data() == bytes(64)
        assert store.exists([key_of("nobody")]) == [False]

    @pytest.mark.parametrize("size", SIZES)
    def test_an_object_of_many_parts_comes_back(self, store: Store, size: int) -> None:
        data = os.urandom(size)
        store.put(key_of("a"), cut(data))
        assert self.raw_read(store, key_of("a")) == data
        landing = Landing([64, 0, size // 3, size - size // 3])
        assert store.get_into(key_of("a"), landing.parts()) == size
        assert landing.data()[:size] == data
        landing.assert_guards_untouched()
        assert store.exists([key_of("a")]) == [True]

    def test_an_object_that_someone_else_wrote_is_found(self, store: Store) -> None:
        self.raw_write(store, key_of("theirs"), b"x" * 100)
        assert store.exists([key_of("theirs")]) == [True]
        assert get(store, key_of("theirs"), 100) == b"x" * 100

    def test_more_parts_than_one_system_call_takes(self, store: Store) -> None:
        data = os.urandom(3000)
        store.put(key_of("many"), views(*(data[at : at + 1] for at in range(len(data)))))
        landing = Landing([1] * 3000)
        assert store.get_into(key_of("many"), landing.parts()) == 3000
        assert landing.data() == data
        landing.assert_guards_untouched()

    @pytest.mark.parametrize("sizes", [[], [0], [10], [64, 100], [64, 0, 4095]])
    def test_smaller_parts_are_filled_and_the_true_length_told(self, store: Store, sizes: list[int]) -> None:
        data = os.urandom(64 + 4096)
        self.raw_write(store, key_of("long"), data)
        landing = Landing(sizes)
        assert store.get_into(key_of("long"), landing.parts()) == len(data)
        assert landing.data() == data[: sum(sizes)]
        landing.assert_guards_untouched()

    def test_larger_parts_are_filled_as_far_as_the_object_goes(self, store: Store) -> None:
        self.raw_write(store, key_of("short"), b"y" * 70)
        landing = Landing([64, 4096, 10])
        assert store.get_into(key_of("short"), landing.parts()) == 70
        assert landing.data() == b"y" * 70 + bytes(4100)
        landing.assert_guards_untouched()

    def test_buffers_of_signed_bytes_will_do(self, store: Store) -> None:
        store.put(key_of("signed"), [memoryview(bytearray(b"abcdef")).cast("b")])
        buffer = bytearray(6)
        assert store.get_into(key_of("signed"), [memoryview(buffer).cast("b")]) == 6
        assert bytes(buffer) == b"abcdef"

    def test_the_last_put_is_what_is_read(self, store: Store) -> None:
        for data in (b"long" * 100, b"short", b"", b"longer again" * 9):
            store.put(key_of("a"), views(data))
            assert get(store, key_of("a"), 1000) == data

    def test_a_buffer_may_be_reused_as_soon_as_put_returned(self, store: Store) -> None:
        buffer = bytearray(b"before")
        store.put(key_of("a"), [memoryview(buffer)])
        buffer[:] = b"after!"
        assert get(store, key_of("a"), 6) == b"before"

    def test_delete_is_idempotent(self, store: Store) -> None:
        store.put(key_of("a"), views(b"1"))
        store.put(key_of("b"), views(b"2"))
        store.delete([key_of("a"), key_of("nobody")])
        store.delete([key_of("a")])
        store.delete([])
        assert store.exists([key_of("a"), key_of("b")]) == [False, True]
        assert get(store, key_of("a"), 1) is None

    def test_exists_answers_in_the_order_of_the_keys(self, store: Store) -> None:
        for name in ("b", "d", "f"):
            store.put(key_of(name), views(b"x"))
        asked = [key_of(name) for name in ("f", "a", "b", "b", "c", "d", "e")]
        assert store.exists(asked) == [True, False, True, True, False, True, False]
        assert store.exists([]) == []

    def test_keys_of_another_namespace_are_other_keys(self, store: Store) -> None:
        store.put(key_of("same"), views(b"mine"))
        assert store.exists([key_of("same", OTHER_NAMESPACE)]) == [False]
        assert get(store, key_of("same", OTHER_NAMESPACE), 9) is None
        store.put(key_of("same", OTHER_NAMESPACE), views(b"theirs"))
        assert get(store, key_of("same"), 9) == b"mine"
        store.delete([key_of("same", OTHER_NAMESPACE)])
        assert store.exists([key_of("same")]) == [True]

    def test_distinct_keys_never_alias(self, store: Store) -> None:
        """Separators, dots, case, zeros, prefixes and the longest key: all of them are bytes."""
        longest = b"\xff" * (MAX_KEY_BYTES - 16)
        rests = [
            *(b"a", b"A", b"aa", b"a/b", b"a_b", b"a-SEP-b", b"a@b", b"a b", b"a\0", b"\0", b"\0\0", b"..", b"/"),
            *(b"a\r\n", b"a.kv", b".tmp", b"\xe4", "ä".encode(), b"%41", b"a*", longest, longest[:-1]),
        ]
        for index, rest in enumerate(rests):
            store.put(NAMESPACE + rest, views(b"object %d" % index))
        for index, rest in enumerate(rests):
            assert get(store, NAMESPACE + rest, 20) == b"object %d" % index
        store.delete([NAMESPACE + rests[0]])
        assert store.exists([NAMESPACE + rest for rest in rests]) == [False] + [True] * (len(rests) - 1)

    def test_readers_only_ever_see_whole_objects(self, store: Store) -> None:
        sizes = [100_000, 300_000]
        store.put(key_of("hot"), views(b"\0" * sizes[0]))
        writing = threading.Event()

        def write_or_read(index: int) -> None:
            if index < 2:
                for turn in range(20):
                    letter = bytes([1 + index * 20 + turn])
                    store.put(key_of("hot"), cut(letter * sizes[turn % 2]))
                writing.set()
                return
            while not writing.is_set():
                data = get(store, key_of("hot"), sizes[1])
                assert data is not None
                assert len(data) in sizes
                assert data.count(data[0]) == len(data)

        in_threads(5, write_or_read)

    def test_many_threads_with_keys_of_their_own(self, store: Store) -> None:
        def work(index: int) -> None:
            for turn in range(12):
                key = key_of(f"{index}-{turn}")
                data = bytes([index]) * (1000 + turn)
                store.put(key, cut(data))
                assert get(store, key, len(data)) == data
                assert store.exists([key, key_of(f"{index}-none")]) == [True, False]
                if turn % 3 == 0:
                    store.delete([key])
                    assert get(store, key, len(data)) is None

        in_threads(8, work)

    def test_a_batch_brings_back_each_object_and_tells_what_is_missing(self, store: Store) -> None:
        sizes = [5 * 1024**2 + 64, 0, 4096, 64, 2 * 1024**2, 1, 5 * 1024**2]
        keys = [key_of(f"batch {index}") for index in range(len(sizes))]
        objects = [os.urandom(size) for size in sizes]
        assert store.put_many(keys, [cut(data) for data in objects]) == [None] * len(keys)
        assert [self.raw_read(store, key) for key in keys] == objects
        store.delete([keys[0], keys[3]])
        landings = [Landing([64, 0, max(size - 64, 0)]) for size in sizes]
        lengths = store.get_many_into(keys, [landing.parts() for landing in landings])
        assert lengths == [None if index in (0, 3) else size for index, size in enumerate(sizes)]
        for landing, length, data in zip(landings, lengths, objects, strict=True):
            assert isinstance(length, int | None)
            assert landing.data()[: length or 0] == (b"" if length is None else data)
            landing.assert_guards_untouched()

    def test_objects_of_a_batch_that_do_not_fit_their_parts_harm_no_other(self, store: Store) -> None:
        keys = [key_of(name) for name in ("much", "fits", "none", "little", "last")]
        stored = [b"m" * 3 * 1024**2, b"f" * 100, None, b"l" * 10, b"z" * 64]
        for key, data in zip(keys, stored, strict=True):
            if data is not None:
                self.raw_write(store, key, data)
        landings = [Landing([size]) for size in (64, 100, 64, 64, 64)]
        lengths = store.get_many_into(keys, [landing.parts() for landing in landings])
        assert lengths == [3 * 1024**2, 100, None, 10, 64]
        expected = [b"m" * 64, b"f" * 100, bytes(64), b"l" * 10 + bytes(54), b"z" * 64]
        assert [landing.data() for landing in landings] == expected
        for landing in landings:
            landing.assert_guards_untouched()

    def test_a_batch_overwrites(self, store: Store) -> None:
        keys = [key_of("a"), key_of("b")]
        store.put_many(keys, [views(b"long" * 100), views(b"x" * 6 * 1024**2)])
        store.put_many(keys, [views(b"y" * 6 * 1024**2), views(b"short")])
        assert get(store, keys[0], 6 * 1024**2) == b"y" * 6 * 1024**2
        assert get(store, keys[1], 5) == b"short"

    def test_a_batch_of_none_and_one_of_many(self, store: Store) -> None:
        assert store.put_many([], []) == []
        assert store.get_many_into([], []) == []
        keys = [key_of(f"small {index}") for index in range(40)]
        assert store.put_many(keys, [views(b"%d" % index) for index in range(40)]) == [None] * 40
        landings = [Landing([3]) for _ in keys]
        lengths = store.get_many_into(keys, [landing.parts() for landing in landings])
        assert lengths == [len(str(index)) for index in range(40)]
        assert [landing.data().rstrip(b"\0") for landing in landings] == [b"%d" % index for index in range(40)]

    def test_a_batch_with_fewer_objects_than_keys_is_a_mistake(self, store: Store) -> None:
        with pytest.raises(ValueError, match="shorter"):
            store.put_many([key_of("a"), key_of("b")], [views(b"x")])
        with pytest.raises(ValueError, match="shorter"):
            store.get_many_into([key_of("a"), key_of("b")], [Landing([1]).parts()])

    def test_batches_from_many_threads(self, store: Store) -> None:
        def work(index: int) -> None:
            keys = [key_of(f"{index} of {number}") for number in range(4)]
            for turn in range(4):
                objects = [bytes([16 * index + 4 * turn + number]) * 70_000 for number in range(4)]
                assert store.put_many(keys, [cut(data) for data in objects]) == [None] * 4
                landings = [Landing([70_000]) for _ in keys]
                assert store.get_many_into(keys, [landing.parts() for landing in landings]) == [70_000] * 4
                assert [landing.data() for landing in landings] == objects

        in_threads(8, work)

    def test_ping_tells_seconds(self, store: Store) -> None:
        assert 0.0 <= store.ping() < 10.0

    def test_usage_is_in_bytes_or_unknown(self, store: Store) -> None:
        store.put(key_of("a"), views(b"x" * 5000))
        usage = store.usage()
        assert usage.used_bytes is None or usage.used_bytes >= 5000
        assert usage.num_objects is None or usage.num_objects >= 1
        assert usage.capacity_bytes is None or usage.capacity_bytes >= ROOM_BYTES

    def test_has_a_short_name(self, store: Store) -> None:
        assert 0 < len(store.name) < 32

    def test_close_may_be_called_twice(self, store: Store) -> None:
        store.put(key_of("a"), views(b"x"))
        store.close()
        store.close()
