"""The host's libraries are built by g++ and by clang: without a warning, and to the same bytes."""

from __future__ import annotations

import ast
import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_ext.ops import cachegen, fixed, lossless, native, pages
from tests.device import CSRC
from tests.unit import test_cachegen, test_fixed, test_lossless, test_ops_pages

pytestmark = pytest.mark.e2e  # ten seconds of compilers

ROOT = Path(__file__).resolve().parents[2]
WARNINGS = {
    "g++": ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"],  # GCC's own AVX-512 headers set that one off
    "clang++": ["-Wall", "-Wextra", "-Werror"],
}


def found(compiler: str) -> str:
    """The compiler; the test is skipped where it is not installed."""
    if shutil.which(compiler):
        return compiler
    pytest.skip(f"no {compiler}: apt-get install g++ clang")


def flags() -> list[str]:
    """What `setup.py` builds with."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return ast.literal_eval(names["FLAGS"])


def compile_all(commands: list[list[str]]) -> list[str]:
    """What compilers said, of commands that ran side by side."""

    def run(command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.stderr if done.returncode == 0 else f"{done.returncode}: {done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        return [said for said in pool.map(run, commands) if said]


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_source_compiles_without_a_warning(compiler):
    sources = sorted([*CSRC.glob("*.cpp"), *CSRC.glob("*.cu")])  # kernels without a launch are plain C++
    base = [found(compiler), *flags(), *WARNINGS[compiler], "-fsyntax-only", "-x", "c++"]
    cuda_only = {source for source in sources if "#include <cuda_runtime.h>" in source.read_text()}
    assert compile_all([[*base, str(source)] for source in sources if source not in cuda_only]) == []


@pytest.fixture(scope="module")
def clang_libraries(tmp_path_factory):
    out = tmp_path_factory.mktemp("clang")
    base = [found("clang++"), *flags(), "-fPIC", "-shared"]
    sources = sorted(CSRC.glob("*.cpp"))
    assert compile_all([[*base, str(source), "-o", str(out / f"{source.stem}.so")] for source in sources]) == []
    return out


@pytest.fixture
def on_clang(clang_libraries, monkeypatch):
    """Every face on what clang has built."""

    def load(name: str, abi_function: str, abi: int) -> ctypes.CDLL:
        library = ctypes.CDLL(str(clang_libraries / f"{name.removeprefix('_')}.so"))
        assert getattr(library, abi_function)() == abi
        return library

    faces = (cachegen, fixed, lossless, pages)
    monkeypatch.setattr(native, "load", load)
    for face in faces:
        face._library.cache_clear()
    yield
    for face in faces:
        face._library.cache_clear()


@pytest.mark.parametrize(
    "agrees",
    [
        test_cachegen.test_both_write_the_same_payload_and_the_same_row,
        test_fixed.test_both_write_the_same_payload_and_the_same_row,
        test_lossless.test_both_write_the_same_bytes_and_read_them_back,
        test_ops_pages.test_scatter_brings_back_what_gather_took,
    ],
)
@pytest.mark.usefixtures("on_clang")
def test_what_clang_builds_agrees_with_the_plain_twin(agrees):
    agrees()
