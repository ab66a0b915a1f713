"""Who creates, locks, unlinks and sweeps the file of rows. Real locks; real /dev/shm where vLLM insists."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import uuid

import pytest

from lmcache_ext.offload import rows as rows_module
from lmcache_ext.offload.rows import open_rows, rows_path, sweep_dead_rows

ROW_BYTES, NUM_ROWS = 8192, 4
NAME = "vllm_offload_lmcache_ext-{}.mmap"


@pytest.fixture
def engine_id():
    engine_id = f"test-{uuid.uuid4().hex}"
    yield engine_id
    if os.path.exists(rows_path(engine_id)):
        os.unlink(rows_path(engine_id))


def open_as(engine_id, rank, num_chunks=NUM_ROWS):
    return open_rows(
        engine_id=engine_id, num_chunks=num_chunks, rank=rank, row_bytes=ROW_BYTES, worker_bytes=ROW_BYTES // 2
    )


def write(directory, name, size=4096):
    path = directory / name
    path.write_bytes(b"x" * size)
    return path


class TestSweep:
    def test_unlinks_what_a_dead_engine_left_however_fresh(self, tmp_path):
        path = write(tmp_path, NAME.format("dead"))
        assert sweep_dead_rows(str(tmp_path)) == 4096
        assert not path.exists()

    def test_leaves_a_live_engine_its_rows(self, tmp_path):
        path = write(tmp_path, NAME.format("live"))
        with path.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH)
            assert sweep_dead_rows(str(tmp_path)) == 0
            assert path.exists()

    def test_knows_the_living_and_the_dead_by_the_lock_of_another_process(self, tmp_path):
        path = write(tmp_path, NAME.format("other"))
        code = "import fcntl,sys; f=open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            other.stdout.readline()
            sweep_dead_rows(str(tmp_path))
            assert path.exists()
            other.kill()
            other.wait()
        sweep_dead_rows(str(tmp_path))
        assert not path.exists()

    @pytest.mark.parametrize("name", ["vllm_offload_0123.mmap", "lmcache_ext-x.mmap", "psm_1234"])
    def test_never_touches_the_files_of_others(self, tmp_path, name):
        path = write(tmp_path, name)
        assert sweep_dead_rows(str(tmp_path)) == 0
        assert path.exists()

    def test_survives_what_it_may_not_open(self, tmp_path):
        (tmp_path / NAME.format("directory")).mkdir()
        dead = write(tmp_path, NAME.format("dead"))
        sweep_dead_rows(str(tmp_path))
        assert not dead.exists()


class TestLife:
    def test_the_name_is_gone_once_the_scheduler_has_mapped_it_and_all_see_the_same_bytes(self, engine_id):
        worker, other = open_as(engine_id, 0), open_as(engine_id, 1)
        assert os.path.exists(rows_path(engine_id))
        scheduler = open_as(engine_id, None)
        assert not os.path.exists(rows_path(engine_id))
        scheduler.mmap_obj[100] = 77
        assert worker.mmap_obj[100] == other.mmap_obj[100] == 77
        for region in (worker, other, scheduler):
            region.cleanup()

    def test_a_worker_that_leaves_before_the_scheduler_came_leaves_the_name_to_be_swept(self, engine_id):
        open_as(engine_id, 0).cleanup()
        assert os.path.exists(rows_path(engine_id))
        sweep_dead_rows()
        assert not os.path.exists(rows_path(engine_id))

    def test_rows_are_not_swept_while_their_pages_are_populated(self, engine_id, monkeypatch):
        real, swept = rows_module.SharedOffloadRegion, []

        def populating(**kwargs):
            region = real(**kwargs)
            swept.append(sweep_dead_rows())  # another engine starts meanwhile
            return region

        monkeypatch.setattr(rows_module, "SharedOffloadRegion", populating)
        region = open_as(engine_id, 0)
        assert os.path.exists(rows_path(engine_id))
        region.cleanup()

    def test_a_file_swept_between_open_and_lock_is_made_anew(self, engine_id, monkeypatch):
        real, path = rows_module.fcntl.flock, rows_path(engine_id)
        stale = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)

        def swept_first(fd, how):
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.fstat(stale)):
                os.unlink(path)
            return real(fd, how)

        monkeypatch.setattr(rows_module.fcntl, "flock", swept_first)
        region = open_as(engine_id, 1)
        assert os.path.samestat(os.fstat(region.fd), os.stat(path))
        region.cleanup()
        os.close(stale)

    def test_a_scheduler_never_makes_rows_that_no_worker_has(self, engine_id):
        with pytest.raises(FileNotFoundError, match=engine_id):
            open_as(engine_id, None)
        assert not os.path.exists(rows_path(engine_id))

    def test_the_name_agrees_with_vllm(self, engine_id):
        region = open_as(engine_id, 0)
        assert region.mmap_path == rows_path(engine_id)
        region.cleanup()
