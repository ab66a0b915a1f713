"""``lmcache-ext``: what it prints and how it exits."""

import subprocess
import sys

import pytest

from lmcache_ext.cli import main


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.delenv("LMCACHE_CHUNK_SIZE", raising=False)
    path = tmp_path / "lmcache_config.yaml"
    path.write_text("max_local_cpu_size: 2.0\nremote_url: redis://:hunter2@h:6379\n")
    return path


def test_check_config_prints_values_origins_and_notes(file, capsys):
    assert main(["check-config", str(file)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == [f"{file}:", "ok"]
    assert ["chunk_size", "256", "default"] in rows
    assert ["max_local_cpu_size", "2", "GiB", f"{file}:1"] in rows
    assert ["remote_url", "redis://:***@h:6379", f"{file}:2"] in rows
    assert f"note: {file}:1: max_local_cpu_size: 2 GiB for the whole engine (LMCache: for each rank)" in out
    assert "hunter2" not in out


def test_check_config_sees_the_environment_unless_told_not_to(file, capsys, monkeypatch):
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "64")
    assert main(["check-config", str(file)]) == 0
    assert "LMCACHE_CHUNK_SIZE" in capsys.readouterr().out
    assert main(["check-config", "--no-environment", str(file)]) == 0
    assert "LMCACHE_CHUNK_SIZE" not in capsys.readouterr().out


def test_check_config_of_a_bad_file_is_one_line_and_exit_code_2(file, capsys):
    bad = file.with_name("bad.yaml")
    bad.write_text("chunksize: 256\n")
    assert main(["check-config", str(bad), str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"{bad}:1: chunksize (here 256) is not a known setting: did you mean chunk_size?\n"
    assert f"{file}: ok" in captured.out


def test_check_config_of_a_missing_file(tmp_path, capsys):
    assert main(["check-config", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_keys_lists_every_setting(capsys):
    assert main(["keys"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["chunk_size"].split() == ["chunk_size", "honoured"]
    assert rows["freeze"].split()[:3] == ["freeze", "honoured", "live:"]
    assert "not needed" in rows["use_layerwise"]
    assert rows["peer_init_ports"].endswith("read as p2p_init_ports")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["check-config"]])
def test_wrong_arguments_exit_with_2(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_the_module_is_a_program(file):
    command = [sys.executable, "-m", "lmcache_ext.cli", "check-config", "--no-environment", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_serde_bench_hands_its_arguments_to_the_benchmark(capfd):
    assert main(["serde", "bench", "--help"]) == 0
    assert "--documents" in capfd.readouterr().out


def test_serde_bench_refuses_before_it_trains_what_it_cannot_measure(capfd):
    assert main(["serde", "bench", "--serdes", "fp8;zstd"]) == 2
    assert "--serdes: zstd: unknown, expected some of naive; lossless; fp8; int8; kivi; kivi2; cachegen" in (
        capfd.readouterr().err
    )


def test_serde_bench_says_where_it_is_not(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("lmcache_ext.cli.__file__", str(tmp_path / "lmcache_ext" / "cli.py"))
    assert main(["serde", "bench"]) == 2
    assert "come with a checkout" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m lmcache_ext.cli keys | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["chunk_size", "honoured"]
    assert done.stderr == ""
