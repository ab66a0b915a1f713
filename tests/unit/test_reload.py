"""A changed LMCache file: seen however it was changed, taken as far as it can be, refused by name. No engine."""

from __future__ import annotations

import hashlib
import os

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.config_diff import differences, is_live, merged
from lmcache_ext.errors import ConfigError
from lmcache_ext.reload import INTERVAL_S, SETTLE_S, ConfigWatcher
from tests.kubelet import ConfigMapVolume
from tests.servers import until

NAME = "lmcache_config.yaml"
BEFORE = "chunk_size: 256\nlocal_cpu: true\nmin_retrieve_tokens: 1\n"
AFTER = "chunk_size: 256\nlocal_cpu: true\nmin_retrieve_tokens: 2\n"


class Watched:
    """A file and a watcher that looks when told."""

    def __init__(self, path, text=BEFORE, **options):
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.config = self.load()
        self.watcher = ConfigWatcher(self.config, self.load, **options)
        self.settle()

    def load(self):
        return load_config(path=str(self.path), environ={})

    def settle(self):
        """Look until the watcher would wait for a whole interval; returns what it found."""
        while self.watcher.look() != INTERVAL_S:
            pass
        return self.watcher.take()

    def write(self, text):
        self.path.write_text(text)
        return self.settle()

    @property
    def status(self):
        return self.watcher.status


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path / NAME)


class TestSees:
    """Every way in which the file comes to hold something else."""

    def test_kubelets_swap_of_the_directory_above(self, tmp_path):
        volume = ConfigMapVolume(tmp_path / "mount", {NAME: BEFORE})
        watched = Watched(tmp_path / "mount" / NAME)
        link = os.lstat(watched.path)
        for step in volume.steps({NAME: AFTER}):
            found = watched.settle()
            assert (found is not None) == (step == "renamed it to ..data"), step
        assert watched.status.config.live.min_retrieve_tokens == 2
        assert os.lstat(watched.path).st_ino == link.st_ino  # the visible name was never touched

    def test_a_key_that_left_the_configmap_and_came_back(self, tmp_path):
        volume = ConfigMapVolume(tmp_path / "mount", {NAME: BEFORE})
        watched = Watched(tmp_path / "mount" / NAME)
        volume.write({"other.yaml": ""})
        assert watched.settle() is None
        assert "no such file" in watched.status.refusal.reasons[0]
        volume.write({NAME: AFTER})
        assert watched.settle().after.live.min_retrieve_tokens == 2

    def test_an_editors_rename(self, watched, tmp_path):
        new = tmp_path / ".lmcache_config.yaml.swp"
        new.write_text(AFTER)
        new.replace(watched.path)
        assert watched.settle().after.live.min_retrieve_tokens == 2

    def test_an_editors_rename_with_a_moment_without_a_file(self, watched, tmp_path):
        watched.path.rename(tmp_path / "backup~")
        assert watched.watcher.look() == SETTLE_S
        watched.path.write_text(AFTER)
        assert watched.settle().after.live.min_retrieve_tokens == 2
        assert watched.status.refusal is None

    def test_a_write_in_place_that_keeps_length_inode_and_times(self, watched):
        stat = watched.path.stat()
        with watched.path.open("r+") as file:
            file.write(AFTER)
        os.utime(watched.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        after = watched.path.stat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        assert watched.settle().after.live.min_retrieve_tokens == 2

    def test_a_write_in_parts_only_once_it_has_ended(self, watched):
        with watched.path.open("w") as file:
            for part in ("chunk_size: 256\nlocal", "_cpu: true\nmin_ret", "rieve_tokens: 2\n"):
                file.write(part)
                file.flush()
                assert watched.watcher.look() == SETTLE_S
        assert watched.settle().after.live.min_retrieve_tokens == 2
        assert watched.status.refusal is None

    def test_a_change_between_the_look_and_the_reading(self, watched, monkeypatch):
        watched.path.write_text(AFTER)
        real = watched.watcher._load

        def overtaken():
            config = real()
            watched.path.write_text(AFTER.replace("2\n", "3\n"))
            monkeypatch.setattr(watched.watcher, "_load", real)
            return config

        monkeypatch.setattr(watched.watcher, "_load", overtaken)
        assert watched.settle() is None
        assert watched.settle().after.live.min_retrieve_tokens == 3

    def test_a_change_before_the_first_look(self, tmp_path):
        path = tmp_path / NAME
        path.write_text(BEFORE)
        config = load_config(path=str(path), environ={})
        path.write_text(AFTER)
        watched = Watched(path)
        watched.watcher = ConfigWatcher(config, watched.load)
        assert watched.settle().after.live.min_retrieve_tokens == 2

    def test_several_changes_in_their_order(self, watched):
        for tokens in (5, 6, 7):
            watched.path.write_text(f"min_retrieve_tokens: {tokens}\nchunk_size: 256\n")
            while watched.watcher.look() != INTERVAL_S:
                pass
        found = [watched.watcher.take().after.live.min_retrieve_tokens for _ in range(3)]
        assert found == [5, 6, 7]
        assert watched.watcher.take() is None

    def test_nothing_in_a_comment_but_another_file(self, watched):
        text = BEFORE + "# tuned by nobody\n"
        assert watched.write(text) is None
        assert watched.status.generation == 1
        assert watched.status.digest == hashlib.sha256(text.encode()).hexdigest()[:8]


class TestTakes:
    def test_the_first_file_as_it_is_and_says_which(self, tmp_path, caplog):
        caplog.set_level("INFO")
        watched = Watched(tmp_path / NAME)
        digest = hashlib.sha256(BEFORE.encode()).hexdigest()[:8]
        assert caplog.messages == [f"LMCache configuration 1 is in effect [file={digest} generation=1]"]
        assert watched.status.digest == digest

    def test_a_live_change_and_says_what_it_is(self, watched):
        found = watched.write(AFTER + "freeze: true\n")
        assert found.changes == ("min_retrieve_tokens: 1 -> 2", "freeze: false -> true")
        assert (found.before.live.freeze, found.after.live.freeze) == (False, True)
        assert watched.status.generation == 2
        assert watched.watcher.take_counts() == {"applied": 1}
        digest = hashlib.sha256((AFTER + "freeze: true\n").encode()).hexdigest()[:8]
        assert str(found) == (
            "LMCache configuration 2 is in effect: min_retrieve_tokens: 1 -> 2; freeze: false -> true "
            f"[file={digest} generation=2]"
        )

    def test_a_key_that_was_removed_as_its_default(self, watched):
        found = watched.write("chunk_size: 256\nlocal_cpu: true\n")
        assert found.changes == ("min_retrieve_tokens: 1 -> 0",)
        assert found.after.origin("min_retrieve_tokens").kind == "default"

    def test_nothing_of_a_file_that_is_not_valid_and_names_key_file_and_line(self, watched, caplog):
        assert watched.write(BEFORE + "freeze: maybe\n") is None
        assert watched.status.config == watched.config
        assert watched.watcher.take_counts() == {"invalid": 1}
        (line,) = [record.getMessage() for record in caplog.records]
        assert f"{watched.path}:4: freeze: 'maybe' is not a yes or a no: write true or false" in line
        assert "stays as it is" in line
        assert "\n" not in line

    @pytest.mark.parametrize("text", ["", "- a\n", "chunk_size: [\n", "chunk_sise: 256\n"])
    def test_nothing_of_what_is_no_such_file(self, watched, text):
        assert watched.write(text) is None
        assert watched.status.generation == 1
        assert not watched.status.whole

    @pytest.mark.parametrize(
        ("put", "why"),
        [
            (lambda path: os.mkfifo(path), "is not a regular file"),
            (lambda path: path.mkdir(), "is a directory"),
            (lambda path: path.symlink_to("/nowhere/lmcache_config.yaml"), "no such file"),
            (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
            (lambda path: path.write_bytes(b"#" * (2 << 20)), "is larger than 1048576 bytes"),
        ],
    )
    def test_nothing_of_what_is_put_in_its_place_and_cannot_be_read(self, watched, put, why):
        watched.path.unlink()
        put(watched.path)
        assert watched.settle() is None
        assert watched.status.config == watched.config
        assert why in watched.status.refusal.reasons[0]

    def test_a_bad_file_is_told_once(self, watched, caplog):
        watched.write("freeze: maybe\n")
        for _ in range(5):
            watched.watcher.look()
        assert len(caplog.records) == 1

    def test_the_old_file_again_and_says_so(self, watched, caplog):
        caplog.set_level("INFO")
        watched.write("freeze: maybe\n")
        assert watched.write(BEFORE) is None
        assert watched.status.whole
        assert watched.status.refusal is not None  # the last one is remembered
        assert "agrees with it again" in caplog.messages[-1]

    def test_nothing_for_which_the_preparation_fails(self, tmp_path):
        def prepare(before, after):
            raise ConfigError("remote_url: no store for scheme 'x'")

        watched = Watched(tmp_path / NAME, prepare=prepare)
        assert watched.write(AFTER) is None
        assert watched.status.refusal.reasons == ("remote_url: no store for scheme 'x'",)
        assert watched.status.config == watched.config

    def test_what_was_prepared_along_with_the_change(self, tmp_path):
        watched = Watched(tmp_path / NAME, prepare=lambda before, after: (before.live, after.live))
        found = watched.write(AFTER)
        assert found.prepared == (found.before.live, found.after.live)


class TestRefuses:
    def test_a_fixed_setting_by_name_and_nothing_else_changes(self, watched, caplog):
        assert watched.write(BEFORE.replace("256", "128")) is None
        assert watched.status.config == watched.config
        assert watched.status.refusal.reasons == (f"{watched.path}:1: chunk_size: 256 -> 128 needs a restart",)
        assert watched.watcher.take_counts() == {"refused": 1}
        assert "stays as it is" in caplog.text

    def test_the_fixed_part_of_a_mixed_change_and_takes_the_live_part(self, watched, caplog):
        found = watched.write(AFTER.replace("256", "128"))
        assert found.changes == ("min_retrieve_tokens: 1 -> 2",)
        assert found.after.chunk_size == 256
        assert watched.watcher.take_counts() == {"partly": 1}
        assert "chunk_size: 256 -> 128 needs a restart" in caplog.text

    def test_a_fixed_setting_cannot_hold_up_a_later_live_one(self, watched):
        watched.write(BEFORE.replace("256", "128"))
        found = watched.write(BEFORE.replace("256", "128") + "freeze: true\n")
        assert found.after.live.freeze
        assert not watched.status.whole

    def test_no_key_without_an_effect(self, watched):
        assert watched.write(BEFORE + "enable_blending: true\ninternal_api_server_enabled: true\n") is None
        assert watched.status.whole

    def test_with_the_secret_masked(self, watched, caplog):
        text = (
            BEFORE + "remote_url: 'redis://:hunter2@h:1'\nextra_config: {password: hunter3, sentinel_password: hunter4}"
        )
        found = watched.write(text)
        watched.write(BEFORE.replace("256", "128") + "lmcache_instance_id: redis://:hunter2@h")
        assert "hunter" not in str(found) + caplog.text


class TestMerged:
    def configs(self, tmp_path, before, after):
        made = []
        for text in (before, after):
            (tmp_path / NAME).write_text(text)
            made.append(load_config(path=str(tmp_path / NAME), environ={}))
        return made

    def test_keeps_the_size_of_a_disk_that_it_keeps(self, tmp_path):
        old, new = self.configs(tmp_path, "local_disk: /a\nmax_local_disk_size: 3\n", "chunk_size: 256\n")
        assert merged(old, new).live.disk_capacity_bytes == 3 * 2**30
        assert differences(old, new)[1] == ["local_disk: /a -> none needs a restart"]

    def test_keeps_the_remote_store_that_a_directory_would_replace(self, tmp_path):
        old, new = self.configs(tmp_path, "remote_url: redis://h\n", "remote_url: file:///kv\n")
        assert merged(old, new).live.remote_url == "redis://h"
        assert "local_disk: none -> /kv needs a restart" in differences(old, new)[1][0]

    def test_keeps_the_size_of_host_memory_with_what_it_is_for(self, tmp_path):
        old, new = self.configs(tmp_path, "max_local_cpu_size: 2\n", "local_cpu: false\nmax_local_cpu_size: 0\n")
        assert merged(old, new).live.host_capacity_bytes == 2 * 2**30

    def test_shows_for_each_setting_where_its_value_came_from(self, tmp_path):
        old, new = self.configs(
            tmp_path, "chunk_size: 256\nfreeze: false\n", "# one line more\nchunk_size: 128\nfreeze: true\n"
        )
        rows = {key: (value, origin) for key, value, origin in merged(old, new).describe()}
        assert rows["chunk_size"] == ("256", f"{tmp_path / NAME}:1")
        assert rows["freeze"] == ("true", f"{tmp_path / NAME}:3")

    def test_keeps_an_option_that_is_read_at_the_start_only(self, tmp_path):
        old, new = self.configs(
            tmp_path, "extra_config: {disk_io_threads: 2, a: 1}\n", "extra_config: {disk_io_threads: 3, a: 2}\n"
        )
        assert dict(merged(old, new).live.extra_config) == {"disk_io_threads": 2, "a": 2}
        live, fixed = differences(old, new)
        assert live == ["extra_config.a: 1 -> 2"]
        assert fixed == [f"{tmp_path / NAME}:1: extra_config.disk_io_threads: 2 -> 3 needs a restart"]

    def test_keeps_what_rows_hold(self, tmp_path):
        old, new = self.configs(tmp_path, "freeze: true\n", "extra_config: {host_kv_dtype: fp8}\n")
        assert merged(old, new).host_kv_dtype == "auto"
        assert differences(old, new)[1] == [
            f"{tmp_path / NAME}:1: extra_config.host_kv_dtype: auto -> fp8 needs a restart"
        ]


@pytest.mark.parametrize(
    ("key", "live"),
    [
        ("freeze", True),
        ("remote_url", True),
        ("chunk_size", False),
        ("enable_blending", False),
        ("extra_config.valkey_ttl_sec", True),
        ("extra_config.lm_anything", True),
        ("extra_config.disk_io_threads", False),
    ],
)
def test_a_setting_is_live_by_its_place(key, live):
    assert is_live(key) is live


class TestThread:
    def test_finds_a_change_by_itself_and_ends(self, tmp_path):
        path = tmp_path / NAME
        path.write_text(BEFORE)
        config = load_config(path=str(path), environ={})
        watcher = ConfigWatcher(
            config, lambda: load_config(path=str(path), environ={}), interval_s=0.01, settle_s=0.01
        ).open()
        until(lambda: watcher.status.digest != "", "first look")
        path.write_text(AFTER)
        until(lambda: watcher.status.generation == 2, "seen")
        assert watcher.take().after.live.min_retrieve_tokens == 2
        watcher.close()
        assert not watcher._thread.is_alive()
        watcher.close()

    def test_survives_a_bug_tells_it_once_and_tries_again(self, tmp_path, caplog):
        path = tmp_path / NAME
        path.write_text(BEFORE)
        calls = []

        def load():
            calls.append(1)
            if len(calls) < 5:
                raise RuntimeError("a bug")
            return load_config(path=str(path), environ={})

        watcher = ConfigWatcher(load_config(path=str(path), environ={}), load, interval_s=0.01, settle_s=0.01).open()
        until(lambda: watcher.status.digest != "", "a look without the bug")
        watcher.close()
        assert [record.getMessage().endswith("it is tried again") for record in caplog.records if record.exc_info] == [
            True
        ]

    def test_is_not_needed_without_a_file(self):
        config = load_config(environ={"LMCACHE_CHUNK_SIZE": "256"})
        watcher = ConfigWatcher(config, lambda: config).open()
        assert watcher._thread is None
        assert watcher.take() is None
        watcher.close()
