"""A damaged, full, read-only or vanished disk costs the hit, never the answer."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.cache import CHUNK, ROW_BYTES, ask, cache_server, cached_tokens, chunk_files, evict, logprobs, prompt
from tests.e2e.server import Server

pytestmark = pytest.mark.e2e

TOKENS = 4 * CHUNK + 100
MIB = 1 << 20
FILLER, FILLER_TOKENS = 900, 4000


@pytest.fixture(scope="module")
def mount(tmp_path_factory):
    """A small file system of its own: it can be filled and made read-only for real."""
    directory = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.fixture(scope="module")
def server(mount):
    """Host memory stages 32 chunks only, so that an evicted prefix can come from the disk alone."""
    cache = {
        "LMCACHE_LOCAL_CPU": "false",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": f"{32 * ROW_BYTES // MIB}Mi",
        "LMCACHE_MAX_LOCAL_DISK_SIZE": "1",
    }
    with cache_server(mount / "kv", gpu_blocks=40, cache=cache) as running:
        for num_fillers in (1, 2, 3):  # one by one: of what comes faster than it is written, some is dropped
            fill(running, mount / "kv", num_fillers)
        yield running


def compute(server: Server, directory: Path, seed: int) -> tuple[list[dict[str, float]], list[Path]]:
    """Compute a prompt for the first time; its logprobs, and the files of its four chunks."""
    forget(server)
    before = set(chunk_files(directory))
    cold = ask(server, prompt(seed, TOKENS))
    assert cached_tokens(cold) == 0
    server.wait_for(lambda: len(set(chunk_files(directory)) - before) >= 4, 30, "write the chunks")
    return logprobs(cold), sorted(set(chunk_files(directory)) - before)


def fill(server: Server, directory: Path, num_fillers: int) -> None:
    """Compute the last of so many prompts that `forget` asks for, and wait for its chunks."""
    evict(server, FILLER + num_fillers - 1, prompts=1, num_tokens=FILLER_TOKENS)
    num_files = num_fillers * (FILLER_TOKENS // CHUNK)
    server.wait_for(lambda: len(chunk_files(directory)) == num_files, 30, "write the filler's chunks")


def forget(server: Server) -> None:
    """Push every other prefix out of the GPU pool and of the staging rows."""
    evict(server, FILLER, prompts=3, num_tokens=FILLER_TOKENS)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def damage_header(files: list[Path]) -> None:
    for path, offset in zip(files, (5, 20, 30, 55), strict=True):
        flip(path, offset)


def damage_payload(files: list[Path]) -> None:
    for path, offset in zip(files, (64, 1 * MIB, 1 * MIB + 7, -1), strict=True):
        flip(path, offset)


def truncate(files: list[Path]) -> None:
    for path, length in zip(files, (0, 10, 64, files[3].stat().st_size - 1), strict=True):
        os.truncate(path, length)


def swap(files: list[Path]) -> None:
    held = [path.read_bytes() for path in files]
    for path, data in zip(files, held[1:] + held[:1], strict=True):
        path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_header, damage_payload, truncate, swap])
def test_damaged_files_are_misses_that_delete_themselves(server, mount, damage):
    cold, files = compute(server, mount / "kv", 20 + DAMAGES.index(damage))
    forget(server)
    damage(files)
    damaged = {path: path.stat().st_ino for path in files}
    before = metric(server, CORRUPT)
    answer = ask(server, prompt(20 + DAMAGES.index(damage), TOKENS))
    assert cached_tokens(answer) == 0
    assert logprobs(answer) == cold
    assert metric(server, CORRUPT) > before
    assert all(not path.exists() or path.stat().st_ino != inode for path, inode in damaged.items())


def test_undamaged_prefix_comes_back_from_disk(server, mount):
    compute(server, mount / "kv", 30)
    forget(server)
    before = metric(server, "vllm:kv_offload_tiering_read_bytes_total")
    assert cached_tokens(ask(server, prompt(30, TOKENS))) == 4 * CHUNK
    assert metric(server, "vllm:kv_offload_tiering_read_bytes_total") > before


def test_read_only_disk_still_serves_and_nothing_fails(server, mount):
    compute(server, mount / "kv", 31)
    forget(server)
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    try:
        assert cached_tokens(ask(server, prompt(31, TOKENS))) == 4 * CHUNK
        assert cached_tokens(ask(server, prompt(32, TOKENS))) == 0
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)


def test_full_disk_fails_no_request_and_is_used_again_when_there_is_room(server, mount):
    filler = mount / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB))
    for seed in (40, 41, 42):
        assert cached_tokens(ask(server, prompt(seed, TOKENS))) == 0
    filler.unlink()
    server.wait_for(lambda: stores_again(server, mount / "kv"), 120, "store again")


def test_directory_deleted_under_our_feet_fails_no_request(server, mount):
    while (mount / "kv").exists():  # the server may be writing into it
        shutil.rmtree(mount / "kv", ignore_errors=True)
    forget(server)
    answer = ask(server, prompt(31, TOKENS))
    assert cached_tokens(answer) == 0
    server.wait_for(lambda: stores_again(server, mount / "kv"), 120, "store again")


def stores_again(server: Server, directory: Path) -> bool:
    """Compute something new and see whether a file appears for it."""
    before = set(chunk_files(directory))
    ask(server, prompt(random.randrange(10**6, 10**9), TOKENS), max_tokens=1)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        if set(chunk_files(directory)) - before:
            return True
        time.sleep(0.05)
    return False


def metric(server: Server, name: str) -> float:
    return server.metrics().get(name, 0.0)


DAMAGES = (damage_header, damage_payload, truncate, swap)
CORRUPT = "lmcache_ext:corrupt_chunks_total"
