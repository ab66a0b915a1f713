"""The scripts that wait for a GPU run: with kernels that were built for the host, as far as hosts go."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu import codecs, device, launches, pages_fp8, run, worker
from lmcache_ext.offload import cuda_copier
from lmcache_ext.ops import cachegen, cachegen_cuda, fixed_cuda
from tests.device import CSRC, built, page_kernels

if not cachegen.available():
    pytest.skip("no compiler was there when the package was installed", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    out = tmp_path_factory.mktemp("device")
    with page_kernels(), pytest.MonkeyPatch.context() as patch:
        for face, name in ((cachegen_cuda, "cachegen"), (fixed_cuda, "fixed")):
            library = face.bind(built(CSRC / f"{name}.cu", out / f"{name}.so"))
            patch.setattr(face, "_library", lambda library=library: library)
        yield


def test_codecs_are_checked_and_timed(kernels, monkeypatch, capsys):
    monkeypatch.setattr(device, "REPEATS", 1)
    monkeypatch.setattr(codecs, "TARGET_GB_S", 1e-6)
    assert codecs.main(["--device", "cpu", "--chunks", "2"]) == 0
    tables, lines = run.tables_and_lines(capsys.readouterr().out.splitlines())
    assert [row["codec"] for row in tables[0]] == [name for name in codecs.CODECS for _ in range(2)]
    assert sum("as the twin" in line for line in lines) == 3


def test_kernel_that_differs_from_its_twin_is_noticed(kernels, monkeypatch):
    monkeypatch.setattr(codecs.Codec, "twin_payload", lambda self, row: b"something else")
    with pytest.raises(AssertionError, match="differ from the twin's"):
        codecs.check(codecs.TINY[0], "bfloat16", "cpu")


def test_pages_of_eight_bits_are_checked_and_timed(kernels, monkeypatch, capsys):
    monkeypatch.setattr(device, "REPEATS", 1)
    monkeypatch.setattr(pages_fp8, "CTAS", (pages_fp8.DEFAULT_CTAS,))
    monkeypatch.setattr(pages_fp8, "TARGET_RATIO", 1e-6)
    assert pages_fp8.main(["--device", "cpu", "--mib", "1"]) == 0
    (table,), lines = run.tables_and_lines(capsys.readouterr().out.splitlines())
    timed = [f"{form.name}, {dtype}" for form in pages_fp8.TIMED for dtype in pages_fp8.TIMED_DTYPES]
    assert [row["pages"] for row in table] == [name for name in timed for _ in range(2)]
    assert sum("as the twin" in line for line in lines) == len(pages_fp8.CHECKED)


@pytest.mark.parametrize(("twin", "difference"), [("gather_pages", "gathered rows"), ("scatter_pages", "scattered")])
def test_copy_that_differs_from_its_twin_is_noticed(kernels, monkeypatch, twin, difference):
    monkeypatch.setattr(pages_fp8.pages_fp8_numpy, twin, lambda *arguments: 0)
    with pytest.raises(AssertionError, match=difference):
        pages_fp8.check(pages_fp8.CHECKED[0], "bfloat16", "cpu")


def test_copies_of_a_step_are_checked_and_timed(kernels, monkeypatch, capsys):
    monkeypatch.setattr(device, "REPEATS", 1)
    monkeypatch.setattr(launches, "FORMS", launches.FORMS[:2])
    monkeypatch.setattr(launches, "TIMED", launches.FORMS[0])
    assert launches.main(["--device", "cpu", "--mib", "1"]) == 0
    (table,), lines = run.tables_and_lines(capsys.readouterr().out.splitlines())
    assert [row["8 requests'"] for row in table] == ["stores", "loads", "stores and loads"] * 2
    assert sum("as the twin" in line for line in lines) == 4


@pytest.mark.parametrize(("twin", "difference"), [("gather_pages", "stored rows"), ("scatter_pages", "loaded pages")])
@pytest.mark.parametrize("script", [launches, worker])
def test_step_that_differs_from_its_twin_is_noticed(kernels, monkeypatch, script, twin, difference):
    monkeypatch.setattr(cuda_copier, "pin_mmap_region", pretend_to_pin)
    monkeypatch.setattr(script.pages_numpy, twin, lambda *arguments: 0)
    with pytest.raises(AssertionError, match=difference):
        script.check(pages_fp8.CHECKED[0], False if script is launches else "kernels", "cpu")


def pretend_to_pin(region):
    region.is_pinned = True


def test_worker_of_an_engine_is_checked_and_timed(kernels, monkeypatch, capsys):
    monkeypatch.setattr(cuda_copier, "pin_mmap_region", pretend_to_pin)
    monkeypatch.setattr(device, "REPEATS", 1)
    monkeypatch.setattr(worker, "PAGES", worker.PAGES[:1])
    assert worker.main(["--device", "cpu", "--mib", "1"]) == 0
    (table,), lines = run.tables_and_lines(capsys.readouterr().out.splitlines())
    assert [row["page"] for row in table] == ["4 KiB", "4 KiB"]
    assert sum("as the twin" in line for line in lines) == 4
    assert lines[-1].startswith("faster than vLLM's own: ")


def test_worker_without_vllm_is_skipped_with_a_word(monkeypatch, capsys):
    monkeypatch.setattr(worker, "LACKING", "vLLM is not here (No module named 'vllm')")
    assert worker.main([]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert run.verdicts({"exit_status": 0, "tables": [], "lines": [line]}) == [line]
    assert line.startswith("skipped: vLLM is not here")


def test_what_stands_beside_copies_is_judged_by_our_own(monkeypatch, capsys):
    monkeypatch.setattr(device, "matmul_loss", lambda copy: copy())
    ours, theirs = {"gather": 0.01, "scatter": 0.03}, {"gather": 0.5, "scatter": 0.5}
    copiers = {"ours": lambda way: lambda: ours[way], "theirs": lambda way: lambda: theirs[way]}
    assert device.time_beside(copiers) == 0.03
    (table,), _ = run.tables_and_lines(capsys.readouterr().out.splitlines())
    assert [(row["ours"], row["theirs"]) for row in table] == [("+1.0%", "+50.0%"), ("+3.0%", "+50.0%")]


def test_run_keeps_tables_lines_and_exit_status(tmp_path):
    script = tmp_path / "speaks.py"
    script.write_text("print('a line')\nprint('| a | b |\\n|---|---|\\n| 1 | - |')\nraise SystemExit(3)\n")
    assert run.run(script) == {"exit_status": 3, "tables": [[{"a": "1", "b": "-"}]], "lines": ["a line"]}


def test_run_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(run, "gpu", lambda: None)
    assert run.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_script_without_a_gpu_says_what_torch_sees(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert codecs.main([]) == 2
    assert "no CUDA device here, as torch" in capsys.readouterr().err


@pytest.fixture
def without_nvcc(monkeypatch, tmp_path):
    """A machine with a GPU and no compiler; the place of its library."""
    monkeypatch.setattr(run, "gpu", lambda: "A GPU, 1.2")
    monkeypatch.setattr(run.build_cuda, "find_nvcc", lambda: None)
    monkeypatch.setattr(run.native, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    return tmp_path / "_cuda.so"


def test_run_with_neither_a_compiler_nor_a_library_says_what_to_bring(without_nvcc, capsys):
    assert run.main([]) == 2
    assert "install CUDA's compiler, or bring a library" in capsys.readouterr().err


def test_run_takes_a_library_that_is_there_and_tells_what_became_of_every_target(
    without_nvcc, monkeypatch, capsys, tmp_path
):
    without_nvcc.touch()
    said = "  as the twin: one\n\n| a | b |\n|---|---|\n| 1 | - |\n\ntarget, so fast: missed"
    (tmp_path / "pages.py").write_text(f"print({said!r})\nraise SystemExit(1)\n")
    (tmp_path / "codecs.py").write_text("raise AssertionError('a payload differs')\n")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "SCRIPTS", ("pages", "codecs"))
    assert run.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  pages: target, so fast: missed",
        "  codecs: ended with 1: AssertionError: a payload differs",
    ]
    assert json.loads((tmp_path / "gpu.json").read_text())["scripts"]["pages"]["tables"] == [[{"a": "1", "b": "-"}]]
    section = (tmp_path / "gpu.md").read_text()
    assert section.startswith("### A GPU, 1.2\n")
    assert "| a | b |\n|---|---|\n| 1 | - |\n" in section
    assert "* target, so fast: missed" in section


def test_script_that_hangs_is_ended(monkeypatch, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text("print('begun')\nimport threading\nthreading.Event().wait()\n")
    monkeypatch.setattr(run, "LIMIT_S", 1.0)
    told = run.run(script)
    assert told["exit_status"] < 0
    assert run.verdicts(told) == ["ended with -9: begun"]
