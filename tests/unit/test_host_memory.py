"""A size that cannot fit is refused at the start, with both numbers and the field to change."""

from __future__ import annotations

import os

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.host_memory import HostMemory, check_host_bytes, fitting_bytes, read_host_memory

GIB = 1024**3


def cgroup(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_host_memory(str(tmp_path), str(tmp_path)).cgroup_limit_bytes


class TestCgroup:
    def test_v2_limit_is_read(self, tmp_path):
        assert cgroup(tmp_path, {"memory.max": "1073741824\n"}) == GIB

    def test_v2_max_is_no_limit(self, tmp_path):
        assert cgroup(tmp_path, {"memory.max": "max\n"}) is None

    def test_v1_limit_is_read(self, tmp_path):
        assert cgroup(tmp_path, {"memory/memory.limit_in_bytes": "2147483648\n"}) == 2 * GIB

    def test_v1_number_for_no_limit_is_none(self, tmp_path):
        assert cgroup(tmp_path, {"memory/memory.limit_in_bytes": "9223372036854771712"}) is None

    def test_without_files_there_is_no_limit(self, tmp_path):
        assert cgroup(tmp_path, {}) is None


class TestMount:
    def test_free_and_size_are_those_of_the_mount(self, tmp_path):
        memory, stat = read_host_memory(str(tmp_path), str(tmp_path)), os.statvfs(tmp_path)
        assert memory.shm_size_bytes == stat.f_blocks * stat.f_frsize
        assert 0 < memory.shm_free_bytes <= memory.shm_size_bytes

    def test_what_this_engine_has_taken_counts_as_free(self, tmp_path):
        rows = tmp_path / "rows.mmap"
        rows.write_bytes(b"x" * (64 << 20))
        taken = rows.stat().st_blocks * 512
        assert taken >= 64 << 20
        without = read_host_memory(str(tmp_path), str(tmp_path)).shm_free_bytes
        own = read_host_memory(str(tmp_path), str(tmp_path), own_rows=str(rows)).shm_free_bytes
        assert own - without == pytest.approx(taken, abs=32 << 20)  # others write to this mount too

    def test_rows_that_are_not_there_yet_add_nothing(self, tmp_path):
        assert read_host_memory(str(tmp_path), str(tmp_path), own_rows=str(tmp_path / "none")).shm_free_bytes > 0


class TestRefusal:
    def test_beyond_the_memory_limit_names_both_numbers_and_the_field(self):
        with pytest.raises(ConfigError) as refused:
            check_host_bytes(3 * GIB, HostMemory(8 * GIB, 8 * GIB, 2 * GIB), origin="cache.yaml:3")
        for part in ("3.00 GiB", "2.00 GiB", "cache.yaml:3", "resources.limits.memory", "max_local_cpu_size"):
            assert part in str(refused.value)

    def test_beyond_the_free_shared_memory_names_both_numbers_and_the_field(self):
        with pytest.raises(ConfigError) as refused:
            check_host_bytes(3 * GIB, HostMemory(1 * GIB, 8 * GIB, None), origin="cache.yaml:3")
        for part in ("3.00 GiB", "1.00 GiB", "cache.yaml:3", "emptyDir", "sizeLimit", "/dev/shm"):
            assert part in str(refused.value)

    @pytest.mark.parametrize("limit", [None, GIB])
    def test_exactly_what_is_there_is_taken(self, limit):
        check_host_bytes(GIB, HostMemory(GIB, GIB, limit), origin="default")


class TestDefaultSize:
    def test_is_half_of_the_smaller_bound_where_that_is_less(self):
        assert fitting_bytes(5 * GIB, HostMemory(8 * GIB, 8 * GIB, 2 * GIB)) == GIB
        assert fitting_bytes(5 * GIB, HostMemory(4 * GIB, 4 * GIB, None)) == 2 * GIB

    def test_is_what_was_wanted_where_that_fits(self):
        assert fitting_bytes(GIB, HostMemory(8 * GIB, 8 * GIB, None)) == GIB

    def test_is_the_same_for_the_next_process_of_an_engine_that_has_filled_it(self):
        assert fitting_bytes(5 * GIB, HostMemory(GIB, 4 * GIB, None)) == 2 * GIB
