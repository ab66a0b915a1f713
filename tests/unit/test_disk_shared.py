"""One directory, one limit, many processes: the lease protocol of `lmcache_ext.stores.disk_space`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache_ext.errors import StoreFull
from lmcache_ext.stores import disk_space
from lmcache_ext.stores.disk import DiskStore
from lmcache_ext.stores.disk_scan import STALE_S, Listing, list_files, list_leases, object_path
from lmcache_ext.stores.disk_space import Lease, Space
from tests.contracts.store_contract import NAMESPACE, get, key_of, views

KIB = 1024
NUM_WRITES = 120
REPOSITORY = Path(__file__).resolve().parents[2]

WRITER = """
import json, random, sys, threading
from lmcache_ext.errors import StoreFull
from lmcache_ext.stores.disk import DiskStore

root, capacity, seed, num_writes = sys.argv[1], *map(int, sys.argv[2:])
store = DiskStore([root], capacity)
outcomes = {"written": 0, "full": 0}
lock = threading.Lock()
print("ready", flush=True)

def write(thread):
    rng = random.Random(seed * 100 + thread)
    for turn in range(num_writes):
        data = memoryview(bytes(rng.randrange(4096, 65536)))
        key = bytes(16) + rng.randrange(400).to_bytes(2, "big")
        try:
            store.put(key, [data[:64], data[64:]])
            outcome = "written"
        except StoreFull:
            outcome = "full"
        with lock:
            outcomes[outcome] += 1
        if turn % 5 == 0:
            store.delete([bytes(16) + rng.randrange(400).to_bytes(2, "big")])

threads = [threading.Thread(target=write, args=(index,)) for index in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(outcomes), flush=True)
if seed % 2:
    store.close()
"""


def start_writer(root: Path, capacity: int, seed: int, num_writes: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(root), str(capacity), str(seed), str(num_writes)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )


def stored_bytes(root: Path) -> int:
    """Objects and temporary files together; exact only while nobody writes."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.suffix in (".kv", ".tmp"))


def stop(process: subprocess.Popen[str]) -> bool:
    """Freeze a process; False if it has ended already."""
    os.kill(process.pid, signal.SIGSTOP)
    status = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return status is not None and status.si_code == os.CLD_STOPPED


def still(processes: list[subprocess.Popen[str]]) -> bool:
    """Freeze all that still run; whether there was one."""
    stopped = [stop(process) for process in processes]
    return any(stopped)


@pytest.mark.parametrize("capacity", [4 * KIB * KIB, 200 * KIB], ids=["roomy", "three_objects"])
def test_processes_writing_at_once_stay_under_the_limit(tmp_path: Path, capacity: int) -> None:
    """Frozen at many moments, the files never sum up to more than the capacity."""
    writers = [start_writer(tmp_path, capacity, seed, NUM_WRITES) for seed in range(3)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        samples = []
        while still(writers):
            samples.append(stored_bytes(tmp_path))
            for writer in writers:
                os.kill(writer.pid, signal.SIGCONT)
            time.sleep(0.002)  # or they hardly ever run
        outcomes = [json.loads(writer.stdout.read()) for writer in writers if writer.stdout is not None]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert samples
    assert [sum(outcome.values()) for outcome in outcomes] == [2 * NUM_WRITES] * len(writers)
    assert max(samples) <= capacity
    assert stored_bytes(tmp_path) <= capacity
    assert not list(tmp_path.rglob("*.tmp"))
    if capacity > KIB * KIB:
        assert sum(outcome["full"] for outcome in outcomes) == 0
        assert stored_bytes(tmp_path) > capacity * 0.6


def test_room_is_published_before_anybody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers at the same moment: the second publishes while the first walks, and both fit."""
    first, second = Space(str(tmp_path), 10 * KIB), Space(str(tmp_path), 10 * KIB)
    walk = list_files
    published: list[list[int]] = []

    def walk_late(root: str, now: float | None) -> Listing:
        listing = walk(root, now)
        if not published:
            published.append(sorted(list_leases(root, 0.0).values()))
            with pytest.raises(StoreFull):
                second.reserve(6 * KIB)
        return listing

    monkeypatch.setattr(disk_space, "list_files", walk_late)
    lease = first.reserve(6 * KIB)
    assert published == [[6 * KIB]]
    assert lease is not None
    first.settle(lease, 6 * KIB, unused=False)
    assert second.reserve(4 * KIB) is not None


def test_a_lease_stays_until_its_last_write_is_done(tmp_path: Path) -> None:
    """A write in flight is covered by a file that others see, even after its process took a new lease."""
    space = Space(str(tmp_path), 100 * KIB)
    slow = space.reserve(5 * KIB)
    assert isinstance(slow, Lease)
    fast = space.reserve(6 * KIB)
    assert isinstance(fast, Lease)
    assert (slow.path != fast.path, os.path.exists(slow.path)) == (True, True)
    space.settle(slow, 5 * KIB, unused=False)
    assert (os.path.exists(slow.path), os.path.exists(fast.path)) == (False, True)
    space.close()
    assert not os.listdir(tmp_path / ".leases")


def test_small_writes_share_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[str] = []
    walk = list_files

    def counted(root: str, now: float | None) -> Listing:
        walks.append(root)
        return walk(root, now)

    monkeypatch.setattr(disk_space, "list_files", counted)
    store = DiskStore([str(tmp_path)], 1600 * KIB)
    for index in range(200):
        store.put(key_of(str(index)), views(b"x" * KIB))
    assert len(walks) == 2


@pytest.mark.parametrize(
    ("capacity", "num_others", "size", "expected"),
    [
        (160 * KIB, 0, KIB, [10 * KIB, KIB]),
        (160 * KIB, 0, 10 * KIB, [10 * KIB]),
        (160 * KIB, 3, KIB, [10 * KIB, KIB]),
        (160 * KIB, 9, KIB, [4 * KIB, KIB]),
        (8 * KIB**3, 0, KIB, [256 * KIB**2, KIB]),
        (1024 * KIB**3, 0, KIB, [16 * KIB**3, KIB]),
    ],
)
def test_a_lease_is_a_share_of_the_capacity(
    tmp_path: Path, capacity: int, num_others: int, size: int, expected: list[int]
) -> None:
    (tmp_path / ".leases").mkdir()
    for index in range(num_others):
        (tmp_path / ".leases" / f"{index:032x}-1.lease").touch()
    assert list(Space(str(tmp_path), capacity)._lease_sizes(size, capacity)) == expected


def test_leases_of_others_are_not_paid_for_with_everything_stored(tmp_path: Path) -> None:
    """Sixteen engines start at once: their leases may not evict more than half."""
    store = DiskStore([str(tmp_path)], 1600 * KIB)
    for index in range(150):
        store.put(key_of(str(index)), views(b"x" * 10 * KIB))
    others = [DiskStore([str(tmp_path)], 1600 * KIB) for _ in range(16)]
    for index, other in enumerate(others):
        other.put(key_of(f"other-{index}"), views(b"x" * KIB))
    assert stored_bytes(tmp_path) >= 700 * KIB


def test_leases_that_fill_the_capacity_drop_writes_and_evict_nothing(tmp_path: Path) -> None:
    DiskStore([str(tmp_path)], 10 * KIB).put(key_of("a"), views(b"x" * KIB))
    (tmp_path / ".leases" / f"{0:032x}-{9 * KIB}.lease").touch()
    with pytest.raises(StoreFull, match="leases of others"):
        DiskStore([str(tmp_path)], 10 * KIB).put(key_of("b"), views(b"x" * 2 * KIB))
    assert get(DiskStore([str(tmp_path)], None), key_of("a"), KIB) is not None


def test_a_killed_process_leaves_nothing_that_the_next_does_not_collect(tmp_path: Path) -> None:
    leaf = Path(object_path(str(tmp_path), key_of("a"))).parent
    leases = tmp_path / ".leases"
    empty = tmp_path / f"{1:032x}" / "ab"
    for directory in (leaf, leases, empty):
        directory.mkdir(parents=True)
    dead = [leaf / f"{1:032x}.tmp", leases / f"{1:032x}-4000.lease", leases / f"{2:032x}.tmp"]
    alive = [leaf / f"{3:032x}.tmp", leases / f"{3:032x}-1000.lease"]
    for path in (*dead, *alive):
        path.write_bytes(b"" if path.suffix == ".lease" else b"x" * KIB)
    for path in (*dead, empty, empty.parent):
        at = path.stat().st_mtime - STALE_S - 5
        os.utime(path, (at, at))
    store = DiskStore([str(tmp_path)], 100 * KIB)
    store.put(key_of("b"), views(b"x" * 100))
    assert [path.exists() for path in dead] == [False] * 3
    assert [path.exists() for path in alive] == [True] * 2
    assert not empty.exists()
    assert leaf.exists()


def test_an_unbounded_store_collects_too(tmp_path: Path) -> None:
    leaf = Path(object_path(str(tmp_path), key_of("a"))).parent
    leaf.mkdir(parents=True)
    dead = leaf / f"{1:032x}.tmp"
    dead.write_bytes(b"x")
    os.utime(dead, (1, 1))
    assert DiskStore([str(tmp_path)], None).usage().used_bytes == 0
    assert not dead.exists()


def test_age_is_judged_by_the_file_server_and_not_by_our_clock(tmp_path: Path) -> None:
    """A node whose clock is an hour ahead must not collect the leases of the living."""
    store = DiskStore([str(tmp_path)], 100 * KIB)
    store.put(key_of("a"), views(b"x"))
    ahead = DiskStore([str(tmp_path)], 100 * KIB, clock=lambda: 3600.0 * 24 * 365 * 100)
    ahead.put(key_of("b"), views(b"x"))
    assert len(os.listdir(tmp_path / ".leases")) == 2


@pytest.mark.parametrize(
    ("idle_s", "is_kept"), [(disk_space.REFRESH_S - 1, True), (disk_space.REFRESH_S + 1, True), (STALE_S, False)]
)
def test_a_lease_is_touched_while_used_and_not_trusted_after_a_long_sleep(
    tmp_path: Path, idle_s: float, is_kept: bool
) -> None:
    now = [0.0]
    store = DiskStore([str(tmp_path)], 1600 * KIB, clock=lambda: now[0])
    store.put(key_of("a"), views(b"x"))
    (before,) = (tmp_path / ".leases").iterdir()
    os.utime(before, (1, 1))
    now[0] += idle_s
    store.put(key_of("a"), views(b"x"))
    (after,) = (tmp_path / ".leases").iterdir()
    assert (after == before) is is_kept
    assert (after.stat().st_mtime > 1) is (idle_s > disk_space.REFRESH_S)


def test_a_lease_that_was_collected_is_replaced_before_anything_is_written(tmp_path: Path) -> None:
    now = [0.0]
    store = DiskStore([str(tmp_path)], 1600 * KIB, clock=lambda: now[0])
    store.put(key_of("a"), views(b"x"))
    (lost,) = (tmp_path / ".leases").iterdir()
    lost.unlink()
    now[0] += disk_space.REFRESH_S + 1
    store.put(key_of("a"), views(b"x"))
    (new,) = (tmp_path / ".leases").iterdir()
    assert new != lost


def test_a_file_that_vanishes_during_the_walk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process evicts what we are about to: each finds the other's work done."""
    store = DiskStore([str(tmp_path)], 4 * KIB)
    for name in "abcd":
        store.put(key_of(name), views(b"x" * KIB))
    walk = list_files

    def walk_then_lose(root: str, now: float | None) -> Listing:
        listing = walk(root, now)
        os.unlink(min(listing.objects).path)
        return listing

    monkeypatch.setattr(disk_space, "list_files", walk_then_lose)
    store.put(key_of("e"), views(b"x" * KIB))
    assert store.exists([key_of("e")]) == [True]
    assert stored_bytes(tmp_path) == 4 * KIB


def test_a_failed_grant_leaves_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(root: str, now: float | None) -> Listing:
        raise OSError(5, f"{root} broke at {now}")

    monkeypatch.setattr(disk_space, "list_files", broken)
    space = Space(str(tmp_path), 100 * KIB)
    with pytest.raises(OSError, match="broke"):
        space.reserve(KIB)
    assert os.listdir(tmp_path / ".leases") == []


@pytest.mark.parametrize("attack", [lambda space: space.close(), lambda space: space.set_capacity(50 * KIB)])
def test_a_write_in_flight_survives_what_happens_to_its_lease(tmp_path: Path, attack: Callable[[Space], None]) -> None:
    space = Space(str(tmp_path), 100 * KIB)
    lease = space.reserve(KIB)
    attack(space)
    space.settle(lease, KIB, unused=False)
    assert os.listdir(tmp_path / ".leases") == []


def test_the_namespace_directory_is_the_namespace(tmp_path: Path) -> None:
    store = DiskStore([str(tmp_path)], 100 * KIB)
    store.put(key_of("a"), views(b"x"))
    assert sorted(os.listdir(tmp_path)) == [NAMESPACE.hex(), ".leases"][::-1]
