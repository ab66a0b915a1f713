"""The codecs under AddressSanitizer and UBSan: no payload makes them read or write out of bounds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.device import compiler

NATIVE = Path(__file__).resolve().parents[1] / "native"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ROUNDS = {"lossless": 400, "fixed": 400, "cachegen": 150}  # about a second; give a program more to fuzz for longer


@pytest.mark.parametrize("codec", ROUNDS)
def test_damaged_payloads_are_refused_within_their_bounds(tmp_path, codec):
    program = tmp_path / codec
    command = [
        *compiler(),
        "-std=c++17",
        "-O0",
        "-g",
        *SANITIZERS,
        "-DKVX_STREAM_SYMBOLS=500",  # several streams in small parts
        str(NATIVE / f"fuzz_{codec}.cpp"),
        "-o",
        str(program),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("this compiler comes without AddressSanitizer")
    assert built.returncode == 0, built.stderr
    # without our environment: what vLLM puts into LD_PRELOAD must not come before the sanitizer's own library
    command = [program, str(ROUNDS[codec]), "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={})
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "unharmed\n"
