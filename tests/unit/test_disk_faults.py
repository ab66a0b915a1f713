"""Disks that are full, read-only, or answer with errors: real file systems where the system lets us mount."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.errors import StoreFull, StoreUnavailable
from lmcache_ext.stores import disk_io
from lmcache_ext.stores.disk import DiskStore
from tests.contracts.store_contract import get, key_of, views

KIB = 1024
SPACE = 1024 * KIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SPACE}", "none", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def remount_read_only(path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)


def left_behind(root: Path) -> list[Path]:
    return list(root.rglob("*.tmp"))


@pytest.mark.parametrize("capacity", [None, 100 * SPACE])
def test_a_full_file_system_evicts_and_goes_on(small_disk: Path, capacity: int | None) -> None:
    store = DiskStore([str(small_disk)], capacity)
    for index in range(40):
        store.put(key_of(str(index)), views(bytes([index]) * 64, bytes([index]) * 60 * KIB))
    assert get(store, key_of("39"), 64 + 60 * KIB) == bytes([39]) * (64 + 60 * KIB)
    assert store.exists([key_of("0")]) == [False]
    assert not left_behind(small_disk)


def test_a_file_system_filled_by_others_drops_writes_and_serves_reads(small_disk: Path) -> None:
    store = DiskStore([str(small_disk)], None)
    store.put(key_of("a"), views(b"x" * 50 * KIB))
    with (small_disk / "foreign").open("wb") as foreign:
        foreign.truncate(0)
        os.posix_fallocate(foreign.fileno(), 0, 900 * KIB)
    with pytest.raises(StoreFull, match="ENOSPC"):
        store.put(key_of("b"), views(b"x" * 500 * KIB))
    assert not left_behind(small_disk)
    (small_disk / "foreign").unlink()
    store.put(key_of("b"), views(b"x" * 500 * KIB))
    assert store.exists([key_of("b")]) == [True]


def test_a_read_only_file_system_refuses_writes_and_serves_reads(small_disk: Path) -> None:
    store = DiskStore([str(small_disk)], 500 * KIB)
    store.put(key_of("a"), views(b"kept"))
    remount_read_only(small_disk)
    again = DiskStore([str(small_disk)], 500 * KIB)
    for either in (store, again):
        with pytest.raises(StoreUnavailable, match="EROFS"):
            either.put(key_of("b"), views(b"x"))
        with pytest.raises(StoreUnavailable, match="EROFS"):
            either.delete([key_of("a")])
        assert get(either, key_of("a"), 4) == b"kept"
        assert either.exists([key_of("a"), key_of("b")]) == [True, False]
        assert either.usage().num_objects == 1
        assert either.ping() >= 0
        either.close()


def test_a_file_size_limit_is_a_full_store(tmp_path: Path) -> None:
    """A real EFBIG: RLIMIT_FSIZE. The first part of the file was written, and is gone again."""
    store = DiskStore([str(tmp_path)], None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * KIB, hard))
    try:
        with pytest.raises(StoreFull, match="EFBIG"):
            store.put(key_of("a"), views(b"x" * 200 * KIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def failing(code: int) -> Callable[..., Any]:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("function", ["writev", "replace"])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        *((code, StoreUnavailable) for code in (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT)),
        *((code, StoreFull) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    ],
)
def test_each_errno_of_a_write_has_its_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int, expected: type[Exception]
) -> None:
    store = DiskStore([str(tmp_path)], 100 * KIB)
    store.put(key_of("a"), views(b"old"))
    with monkeypatch.context() as broken:
        broken.setattr(os, function, failing(code))
        with pytest.raises(expected, match=errno.errorcode[code]):
            store.put(key_of("b"), views(b"new"))
    assert not left_behind(tmp_path)
    assert store.exists([key_of("b")]) == [False]
    store.put(key_of("b"), views(b"new"))


def test_a_close_that_fails_is_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and quotas report a failed write when the file is closed."""
    store = DiskStore([str(tmp_path)], None)
    store.put(key_of("warm"), views(b"x"))
    close = os.close

    def close_badly(fd: int) -> None:
        close(fd)
        raise OSError(errno.EDQUOT, "over quota")

    with monkeypatch.context() as broken:
        broken.setattr(os, "close", close_badly)
        with pytest.raises(StoreFull, match="EDQUOT"):
            store.put(key_of("warm2"), views(b"x"))
    assert not left_behind(tmp_path)
    assert store.exists([key_of("warm2")]) == [False]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_each_errno_of_a_read_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = DiskStore([str(tmp_path)], None)
    store.put(key_of("a"), views(b"x"))
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", failing(code))
        with pytest.raises(StoreUnavailable, match=errno.errorcode[code]):
            get(store, key_of("a"), 1)


def test_an_object_evicted_by_another_nfs_client_while_read_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore([str(tmp_path)], None)
    store.put(key_of("a"), views(b"x"))
    monkeypatch.setattr(os, "preadv", failing(errno.ESTALE))
    assert get(store, key_of("a"), 1) is None


def test_marking_a_hit_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore([str(tmp_path)], None)
    store.put(key_of("a"), views(b"x"))
    monkeypatch.setattr(os, "utime", failing(errno.EROFS))
    assert get(store, key_of("a"), 1) == b"x"


def test_objects_that_may_not_be_removed_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore([str(tmp_path)], 3 * KIB)
    for index, name in enumerate("abc"):
        store.put(key_of(name), views(b"x" * KIB))
        path = store._path(key_of(name))
        os.utime(path, (index + 1, index + 1))
    theirs = store._path(key_of("a"))
    unlink = os.unlink

    def unlink_ours(path: str) -> None:
        if path == theirs:
            raise PermissionError(errno.EPERM, "sticky")
        unlink(path)

    monkeypatch.setattr(os, "unlink", unlink_ours)
    store.put(key_of("d"), views(b"x" * KIB))
    assert store.exists([key_of(name) for name in "abcd"]) == [True, False, True, True]


@pytest.mark.parametrize("step", [1, 7, 64])
def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    writev, preadv = os.writev, os.preadv

    def first(parts: Sequence[memoryview]) -> list[memoryview]:
        return [parts[0][:step]]

    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, first(parts)))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: preadv(fd, first(parts), offset))
    store = DiskStore([str(tmp_path)], None)
    data = os.urandom(300)
    store.put(key_of("a"), views(data[:64], b"", data[64:65], data[65:]))
    landing = bytearray(300)
    view = memoryview(landing)
    assert store.get_into(key_of("a"), [view[:10], view[10:10], view[10:]]) == 300
    assert bytes(landing) == data


def test_a_write_that_moves_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "writev", lambda fd, parts: 0)
    with pytest.raises(StoreUnavailable, match=r"wrote 0 bytes, expected 4"):
        DiskStore([str(tmp_path)], None).put(key_of("a"), views(b"data"))


def test_an_unknown_errno_is_named_all_the_same() -> None:
    with pytest.raises(StoreUnavailable, match="reading: OSError"), disk_io.os_errors("reading"):
        raise OSError("no number")
