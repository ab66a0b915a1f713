"""The disk store: the contract, then what is particular to a directory that several processes share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from lmcache_ext.errors import ConfigError, StoreFull, StoreUnavailable
from lmcache_ext.stores import disk
from lmcache_ext.stores.base import Store
from lmcache_ext.stores.disk import MAX_DIRECTORY_ATTEMPTS, TOUCH_S, DiskStore
from lmcache_ext.stores.disk_scan import STALE_S, make_directory, object_path
from tests.contracts.store_contract import (
    NAMESPACE,
    OTHER_NAMESPACE,
    ROOM_BYTES,
    StoreContract,
    get,
    key_of,
    views,
)

KIB = 1024


def files(root: Path, pattern: str = "*.kv") -> list[Path]:
    return sorted(root.rglob(pattern))


def num_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in files(root))


def age(path: Path, seconds: float) -> None:
    """Make a file look unused for so long."""
    at = path.stat().st_mtime - seconds
    os.utime(path, (at, at))


def put_aged(store: DiskStore, root: Path, name: str, size: int, seconds: float) -> None:
    store.put(key_of(name), views(b"x" * size))
    age(Path(object_path(str(root), key_of(name))), seconds)


class FileBypass:
    """Reads and writes objects as files, without the store."""

    def raw_path(self, store: Store, key: bytes) -> Path:
        assert isinstance(store, DiskStore)
        return Path(store._path(key))

    def raw_write(self, store: Store, key: bytes, data: bytes) -> None:
        path = self.raw_path(store, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_read(self, store: Store, key: bytes) -> bytes | None:
        path = self.raw_path(store, key)
        return path.read_bytes() if path.exists() else None


class TestDisk(FileBypass, StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = DiskStore([str(tmp_path / "cache")], ROOM_BYTES)
        yield store
        store.close()


class TestUnboundedDisk(FileBypass, StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = DiskStore([str(tmp_path)], None)
        yield store
        store.close()


class TestThreeRoots(FileBypass, StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = DiskStore([str(tmp_path / name) for name in "abc"], 3 * ROOM_BYTES)
        yield store
        store.close()


def test_the_constructor_touches_nothing(tmp_path: Path) -> None:
    DiskStore([str(tmp_path / "cache")], 100)
    assert not (tmp_path / "cache").exists()


def test_the_path_of_an_object_is_as_documented(tmp_path: Path) -> None:
    DiskStore([str(tmp_path)], None).put(NAMESPACE + b"\xab\xcd", views(b"x"))
    assert files(tmp_path) == [tmp_path / "000102030405060708090a0b0c0d0e0f" / "ab" / "abcd.kv"]


def test_files_are_for_the_group_as_far_as_the_umask_goes_and_never_for_others(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        DiskStore([str(tmp_path)], 10_000).put(key_of("a"), views(b"x"))
    finally:
        os.umask(before)
    path = files(tmp_path)[0]
    assert [oct(p.stat().st_mode & 0o777) for p in (path, path.parent, path.parent.parent)] == [
        "0o660",
        "0o770",
        "0o770",
    ]


def test_a_restarted_process_finds_everything(tmp_path: Path) -> None:
    first = DiskStore([str(tmp_path)], ROOM_BYTES)
    first.put(key_of("a"), views(b"computed once"))
    first.close()
    assert get(DiskStore([str(tmp_path)], ROOM_BYTES), key_of("a"), 20) == b"computed once"


def test_a_second_store_sees_objects_at_once(tmp_path: Path) -> None:
    one, two = (DiskStore([str(tmp_path)], ROOM_BYTES) for _ in range(2))
    one.put(key_of("a"), views(b"1"))
    assert two.exists([key_of("a")]) == [True]
    two.put(key_of("a"), views(b"22"))
    assert get(one, key_of("a"), 2) == b"22"
    two.delete([key_of("a")])
    assert one.exists([key_of("a")]) == [False]


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], 4 * KIB)
    for index, name in enumerate("abcd"):
        put_aged(store, tmp_path, name, KIB, seconds=1000 - index)
    reader = DiskStore([str(tmp_path)], 4 * KIB)  # another process: it has not marked them yet
    assert get(reader, key_of("a"), KIB) is not None
    store.put(key_of("e"), views(b"e" * KIB))
    assert store.exists([key_of(name) for name in "abcde"]) == [True, False, True, True, True]


def test_a_hit_marks_its_object_at_most_once_a_minute(tmp_path: Path) -> None:
    now = [1000.0]
    store = DiskStore([str(tmp_path)], None, clock=lambda: now[0])
    put_aged(store, tmp_path, "a", 10, seconds=5000)
    path = files(tmp_path)[0]
    stamps = []
    for step_s in (0.0, TOUCH_S - 1, 1.0):
        now[0] += step_s
        age(path, 5000)
        before = path.stat().st_mtime
        get(store, key_of("a"), 10)
        stamps.append(path.stat().st_mtime > before)
    assert stamps == [True, False, True]


def test_exists_marks_nothing(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], None)
    put_aged(store, tmp_path, "a", 10, seconds=5000)
    before = files(tmp_path)[0].stat().st_mtime
    assert store.exists([key_of("a")]) == [True]
    assert files(tmp_path)[0].stat().st_mtime == before


def test_objects_of_an_old_model_make_room(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], 3 * KIB)
    old = key_of("a", OTHER_NAMESPACE)
    store.put(old, views(b"x" * KIB))
    age(files(tmp_path)[0], 5000)
    for name in "abc":
        store.put(key_of(name), views(b"x" * KIB))
    assert store.exists([old, key_of("a"), key_of("b"), key_of("c")]) == [False, True, True, True]


def test_overwriting_does_not_eat_capacity(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], 10 * KIB)
    store.put(key_of("other"), views(b"x" * KIB))
    for _ in range(50):
        store.put(key_of("same"), views(b"x" * KIB))
    assert store.exists([key_of("other"), key_of("same")]) == [True, True]
    assert num_bytes(tmp_path) == 2 * KIB


def test_an_object_larger_than_the_capacity_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], KIB)
    store.put(key_of("a"), views(b"x" * 512))
    with pytest.raises(StoreFull, match=r"1025 bytes, capacity is 1024"):
        store.put(key_of("b"), views(b"x" * 1025))
    assert store.exists([key_of("a")]) == [True]


def test_lowering_the_capacity_evicts_at_once_and_raising_it_gives_room(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], 8 * KIB)
    for index in range(8):
        put_aged(store, tmp_path, str(index), KIB, seconds=100 - index)
    store.set_capacity(3 * KIB)
    assert store.exists([key_of(str(index)) for index in range(8)]) == [False] * 5 + [True] * 3
    assert store.usage().capacity_bytes == 3 * KIB
    store.set_capacity(None)
    for index in range(20):
        store.put(key_of(str(index)), views(b"x" * KIB))
    assert num_bytes(tmp_path) == 20 * KIB


def test_usage_counts_what_is_there(tmp_path: Path) -> None:
    DiskStore([str(tmp_path)], None).put(key_of("a"), views(b"x" * 300))
    store = DiskStore([str(tmp_path)], 100 * KIB)
    assert (store.usage().used_bytes, store.usage().num_objects) == (300, 1)
    store.put(key_of("b"), views(b"x" * 200))
    assert (store.usage().used_bytes, store.usage().num_objects) == (500, 2)


def test_usage_does_not_walk_the_tree_every_time(tmp_path: Path) -> None:
    now = [0.0]
    store = DiskStore([str(tmp_path)], None, clock=lambda: now[0])
    assert store.usage().num_objects == 0
    DiskStore([str(tmp_path)], None).put(key_of("a"), views(b"x"))
    assert store.usage().num_objects == 0
    now[0] += 61
    assert store.usage().num_objects == 1


def test_a_truncated_file_tells_its_length(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], None)
    store.put(key_of("a"), views(b"x" * 100))
    os.truncate(files(tmp_path)[0], 63)
    assert get(store, key_of("a"), 100) == b"x" * 63


def test_things_that_are_not_files_are_misses(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], None)
    for name, make in (("dir", os.mkdir), ("pipe", os.mkfifo)):
        path = object_path(str(tmp_path), key_of(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        make(path)
        assert store.get_into(key_of(name), [memoryview(bytearray(4))]) is None


def test_files_that_are_not_ours_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    foreign = [
        *("precious.kv", "precious.tmp", "sub/ab/ab.kv", ".leases/other.lease", ".leases/README"),
        *(f"{NAMESPACE.hex()}/README", f"{NAMESPACE.hex()}/ab/notes.txt", f"{NAMESPACE.hex()}/ab/xyz.kv"),
    ]
    for name in foreign:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 2000)
        age(path, 2 * STALE_S)
    store = DiskStore([str(tmp_path)], KIB)
    for index in range(5):
        store.put(key_of(str(index)), views(b"x" * 600))
    assert all((tmp_path / name).exists() for name in foreign)
    assert store.usage().used_bytes == 600


@pytest.mark.parametrize("length", [16, 129])
def test_a_key_of_a_wrong_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes, expected 17 to 128"):
        DiskStore([str(tmp_path)], None).put(b"k" * length, [])


def test_a_comma_list_spreads_keys_and_survives_a_new_order(tmp_path: Path) -> None:
    roots = [str(tmp_path / name) for name in "abcd"]
    store = DiskStore(roots, 400 * KIB)
    for index in range(100):
        store.put(key_of(str(index)), views(b"x" * 10))
    counts = [len(files(Path(root))) for root in roots]
    assert sum(counts) == 100
    assert min(counts) > 10
    again = DiskStore(roots[::-1], 400 * KIB)
    assert all(again.exists([key_of(str(index)) for index in range(100)]))
    usage = again.usage()
    assert (usage.used_bytes, usage.capacity_bytes, usage.num_objects) == (1000, 400 * KIB, 100)


def test_no_directory_at_all_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="at least one directory"):
        DiskStore([], None)


@pytest.mark.parametrize("capacity", [None, 1024 * KIB])
def test_directories_deleted_under_our_feet_are_made_again(tmp_path: Path, capacity: int | None) -> None:
    root = tmp_path / "cache"
    store = DiskStore([str(root)], capacity)
    store.put(key_of("a"), views(b"1"))
    os.rename(root, tmp_path / "gone")
    assert store.exists([key_of("a")]) == [False]
    assert get(store, key_of("a"), 1) is None
    store.delete([key_of("a")])
    store.put(key_of("a"), views(b"2"))
    assert get(store, key_of("a"), 1) == b"2"
    assert len(files(root, "*.lease")) == (0 if capacity is None else 1)
    assert store.ping() >= 0


@pytest.mark.parametrize(("num_times", "is_written"), [(3, True), (MAX_DIRECTORY_ATTEMPTS, False)])
def test_a_directory_pruned_as_soon_as_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_times: int, is_written: bool
) -> None:
    made: list[str] = []

    def make_and_lose(root: str, path: str) -> None:
        make_directory(root, path)
        made.append(path)
        if len(made) <= num_times:
            os.rmdir(path)
            os.rmdir(os.path.dirname(path))

    monkeypatch.setattr(disk, "make_directory", make_and_lose)
    store = DiskStore([str(tmp_path)], None)
    expected = nullcontext() if is_written else pytest.raises(StoreUnavailable, match="vanished 8 times")
    with expected:
        store.put(key_of("a"), views(b"x"))
    assert store.exists([key_of("a")]) == [is_written]


def test_a_root_that_is_a_file_is_unavailable_not_a_crash(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_bytes(b"")
    store = DiskStore([str(root)], 1000)
    for call in (
        lambda: store.put(key_of("a"), views(b"x")),
        lambda: store.exists([key_of("a")]),
        lambda: store.get_into(key_of("a"), []),
        lambda: store.delete([key_of("a")]),
        lambda: store.ping(),
    ):
        with pytest.raises(StoreUnavailable, match=r"ENOTDIR|EEXIST"):
            call()
