"""Chunks to a real directory and back; every lie of a stored object is a miss, counted and deleted."""

from __future__ import annotations

import shutil

import pytest

from lmcache_ext import frame
from lmcache_ext.errors import StoreFull, StoreUnavailable
from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.guard import Guarded

NAMESPACE = bytes(range(16))
KEY, OTHER = b"a" * 32 + b"\0\0\0\0", b"b" * 32 + b"\0\0\0\0"
ROW_BYTES = 4096


def row(fill: int = 7) -> memoryview:
    return memoryview(bytearray([fill]) * ROW_BYTES)


class FailingStore(DiskStore):
    """A directory whose writes fail as told: all of them, or those of some keys."""

    error: Exception | None = None
    failing: frozenset[bytes] = frozenset()

    def put(self, key, parts):
        if self.error is not None and (not self.failing or key in self.failing):
            raise self.error
        super().put(key, parts)


@pytest.fixture
def store(tmp_path):
    store = FailingStore([str(tmp_path / "disk")], None)
    yield store
    store.close()


@pytest.fixture
def chunks(store):
    return ChunkIO(store, NaiveSerde(), NAMESPACE)


def fetch(chunks, key, target):
    """One chunk."""
    return chunks.fetch([key], [target])[0]


def keep(chunks, key, source):
    """One chunk."""
    return chunks.keep([key], [source])[0]


def stored(store, key=KEY):
    """The whole object, read around ChunkIO."""
    buffer = bytearray(2 * ROW_BYTES)
    length = store.get_into(NAMESPACE + key, (memoryview(buffer),))
    return None if length is None else bytes(buffer[:length])


def overwrite(store, data, key=KEY):
    store.put(NAMESPACE + key, (memoryview(data),))


class TestRoundTrip:
    def test_brings_back_every_byte(self, chunks):
        source = memoryview(bytearray(range(256)) * (ROW_BYTES // 256))
        assert keep(chunks, KEY, source)
        target = row(0)
        assert fetch(chunks, KEY, target)
        assert bytes(target) == bytes(source)
        assert chunks.take_counts() == ({}, {})

    def test_missing_chunk_is_false_and_nothing_is_counted(self, chunks):
        assert not fetch(chunks, KEY, row())
        assert chunks.take_counts() == ({}, {})

    def test_present_answers_for_each_key(self, chunks):
        keep(chunks, KEY, row())
        assert chunks.present([OTHER, KEY]) == [False, True]

    def test_a_chunk_that_is_there_is_not_written_again(self, chunks, store):
        keep(chunks, KEY, row(1))
        store.error = AssertionError("written again")
        assert keep(chunks, KEY, row(1))


def flip(position):
    def lie(data):
        return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]

    return lie


def other_frame(**changed):
    def lie(data):
        parts = [memoryview(data[frame.FRAME_BYTES :])]
        honest = {"namespace": NAMESPACE, "key": NAMESPACE + KEY, "serde_tag": 0, "raw_length": ROW_BYTES}
        return frame.encode(**{**honest, **changed}, payload_parts=parts) + data[frame.FRAME_BYTES :]

    return lie


LIES = {
    "BadMagic": flip(0),
    "UnsupportedVersion": flip(4),
    "ForeignNamespace": other_frame(namespace=bytes(16)),
    "ForeignKey": other_frame(key=NAMESPACE + OTHER),
    "UnknownSerde": other_frame(serde_tag=9),
    "LengthMismatch": other_frame(raw_length=ROW_BYTES + 1),
    "ChecksumMismatch": flip(frame.FRAME_BYTES + 1234),
    "TruncatedFrame": lambda data: data[:-1],
    "OversizedFrame": lambda data: data + b"x",
}


class TestCorruption:
    @pytest.mark.parametrize("cause", LIES)
    def test_is_a_miss_counted_by_cause_and_deleted(self, chunks, store, cause):
        keep(chunks, KEY, row())
        overwrite(store, LIES[cause](stored(store)))
        assert not fetch(chunks, KEY, row())
        assert chunks.take_counts() == ({cause: 1}, {})
        assert stored(store) is None

    @pytest.mark.parametrize("length", [0, 1, frame.FRAME_BYTES - 1, frame.FRAME_BYTES])
    def test_by_truncation_at_any_place_is_a_miss(self, chunks, store, length):
        keep(chunks, KEY, row())
        overwrite(store, stored(store)[:length])
        assert not fetch(chunks, KEY, row())
        assert chunks.take_counts()[0] == {"TruncatedFrame": 1}

    def test_of_two_swapped_objects_is_a_miss_for_both(self, chunks, store):
        keep(chunks, KEY, row(1))
        keep(chunks, OTHER, row(2))
        first, second = stored(store, KEY), stored(store, OTHER)
        overwrite(store, second, KEY)
        overwrite(store, first, OTHER)
        assert not fetch(chunks, KEY, row())
        assert not fetch(chunks, OTHER, row())
        assert chunks.take_counts()[0] == {"ForeignKey": 2}

    def test_of_every_header_byte_is_a_miss(self, chunks, store):
        keep(chunks, KEY, row())
        honest = stored(store)
        for position in range(frame.FRAME_BYTES):
            overwrite(store, flip(position)(honest))
            assert not fetch(chunks, KEY, row()), position

    def test_is_healed_by_the_next_store(self, chunks, store):
        keep(chunks, KEY, row())
        overwrite(store, flip(100)(stored(store)))
        assert not fetch(chunks, KEY, row(0))
        assert keep(chunks, KEY, row(3))
        target = row(0)
        assert fetch(chunks, KEY, target)
        assert bytes(target) == bytes(row(3))


class TestTask:
    """The chunks of one task travel together, and fail one by one."""

    KEYS = tuple(bytes([letter]) * 32 + bytes(4) for letter in b"cdef")

    def test_brings_back_every_row(self, chunks):
        assert chunks.keep(self.KEYS, [row(fill) for fill in range(4)]) == [True] * 4
        targets = [row(9) for _ in self.KEYS]
        assert chunks.fetch(self.KEYS, targets) == [True] * 4
        assert [bytes(target) for target in targets] == [bytes(row(fill)) for fill in range(4)]

    def test_what_is_missing_or_corrupt_fails_alone(self, chunks, store):
        chunks.keep(self.KEYS[:3], [row(fill) for fill in range(3)])
        overwrite(store, flip(100)(stored(store, self.KEYS[1])), self.KEYS[1])
        targets = [row(9) for _ in self.KEYS]
        assert chunks.fetch(self.KEYS, targets) == [True, False, True, False]
        assert bytes(targets[0]) == bytes(row(0))
        assert bytes(targets[2]) == bytes(row(2))
        assert chunks.take_counts() == ({"ChecksumMismatch": 1}, {})
        assert chunks.present(self.KEYS) == [True, False, True, False]

    def test_what_cannot_be_written_fails_alone(self, chunks, store):
        store.error = StoreFull("full")
        store.failing = frozenset({NAMESPACE + self.KEYS[0], NAMESPACE + self.KEYS[3]})
        assert chunks.keep(self.KEYS, [row(fill) for fill in range(4)]) == [False, True, True, False]
        assert chunks.take_counts() == ({}, {"StoreFull": 2})
        assert chunks.present(self.KEYS) == [False, True, True, False]

    def test_only_what_is_missing_is_written(self, chunks, store):
        chunks.keep(self.KEYS[1:3], [row(1), row(2)])
        store.error = AssertionError("written again")
        store.failing = frozenset(NAMESPACE + key for key in self.KEYS[1:3])
        assert chunks.keep(self.KEYS, [row(fill) for fill in range(4)]) == [True] * 4

    def test_none_is_none(self, chunks):
        assert chunks.fetch([], []) == []
        assert chunks.keep([], []) == []


class TestFailure:
    @pytest.mark.parametrize("error", [StoreFull("full"), StoreUnavailable("gone")], ids=["full", "gone"])
    def test_of_a_write_is_a_counted_drop(self, chunks, store, error):
        store.error = error
        assert not keep(chunks, KEY, row())
        assert chunks.take_counts() == ({}, {type(error).__name__: 1})

    def test_of_the_whole_directory_is_a_miss(self, store, tmp_path):
        chunks = ChunkIO(Guarded(store, deadline_s=5.0), NaiveSerde(), NAMESPACE)
        keep(chunks, KEY, row())
        shutil.rmtree(tmp_path / "disk")
        (tmp_path / "disk").write_text("a file where the directory was")
        assert not fetch(chunks, KEY, row())
        assert chunks.present([KEY]) == [False]
        assert not keep(chunks, OTHER, row())

    def test_counts_are_taken_once(self, chunks):
        chunks.count_dropped("backlog", 3)
        assert chunks.take_counts() == ({}, {"backlog": 3})
        assert chunks.take_counts() == ({}, {})
