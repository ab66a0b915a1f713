"""The scripts that wait for a GPU run: with the codecs' kernels built for the host, as far as hosts go."""

from __future__ import annotations

import pytest

from benchmarks.gpu import codecs, run
from lmcache_ext.ops import cachegen, cachegen_cuda, fixed_cuda
from tests.device import CSRC, built

if not cachegen.available():
    pytest.skip("no compiler was there when the package was installed", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    out = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch:
        for face, source in ((cachegen_cuda, "cachegen.cu"), (fixed_cuda, "fixed.cu")):
            library = face.bind(built(CSRC / source, out / f"{source}.so"))
            patch.setattr(face, "_library", lambda library=library: library)
        yield


def test_codecs_are_checked_and_timed(kernels, monkeypatch, capsys):
    monkeypatch.setattr(codecs, "REPEATS", 1)
    monkeypatch.setattr(codecs, "TARGET_GB_S", 1e-6)
    assert codecs.main(["--device", "cpu", "--chunks", "2"]) == 0
    tables, lines = run.tables_and_lines(capsys.readouterr().out.splitlines())
    assert [row["codec"] for row in tables[0]] == [name for name in codecs.CODECS for _ in range(2)]
    assert sum("as the twin" in line for line in lines) == 3


def test_kernel_that_differs_from_its_twin_is_noticed(kernels, monkeypatch):
    monkeypatch.setattr(codecs.Codec, "twin_payload", lambda self, row: b"something else")
    with pytest.raises(AssertionError, match="differ from the twin's"):
        codecs.check(codecs.TINY[0], "bfloat16", "cpu")


def test_run_keeps_tables_lines_and_exit_status(tmp_path):
    script = tmp_path / "speaks.py"
    script.write_text("print('a line')\nprint('| a | b |\\n|---|---|\\n| 1 | - |')\nraise SystemExit(3)\n")
    assert run.run(script) == {"exit_status": 3, "tables": [[{"a": "1", "b": "-"}]], "lines": ["a line"]}


def test_run_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(run, "gpu", lambda: None)
    assert run.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
