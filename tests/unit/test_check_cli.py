"""`lmcache-ext check` as a program: what it reads, how it answers, how it exits."""

import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_ext.cli import main
from lmcache_ext.manifests.check import check, mend
from lmcache_ext.manifests.rules import RULES
from lmcache_ext.manifests.text import File
from tests.traps import EMPTY_DIR, ENGINE, RUNTIME, SENTINEL, STORES, VALUES, Trap, changed, failures, spring
from tests.traps import checked as check_text
from tests.unit.test_check_engine import TRAPS
from tests.unit.test_check_stores import HELM_TRAPS, STORE_TRAPS

DATA = Path(__file__).parents[1] / "data"
GOOD = "chunk_size: 256\n"
BAD = "chunk_size: 250\nlocal_cpu: true\n"
REQUEST = '{"model": "m", "prompt": "Hello there"}\n'
LONG = '{"model": "m", "prompt": "' + "word " * 400 + '"}\n'

REQUEST_TRAPS = [
    Trap("prompt-short", LONG, (("word " * 400, "Hello"), ('"prompt": ', '"prompt": §')), None),
    Trap(
        "file-name",
        "values-06-remote-storage.yaml # as values-06-remote-storage.yaml\n",
        (("values-06-remote-storage.yaml #", "§values-06-storage.yaml #"),),
        (),
    ),
    Trap("route", "http://h:30080/v1/completions\n", (("http://h:30080/v1", "§http://h:30080"),), ()),
]


@pytest.mark.parametrize("trap", REQUEST_TRAPS, ids=lambda trap: trap.id)
def test_trap_is_found_where_it_is_and_mended(trap):
    spring(trap)


def test_every_rule_has_a_trap():
    tested = {trap.rule for trap in (*TRAPS, *STORE_TRAPS, *HELM_TRAPS, *REQUEST_TRAPS)}
    assert {rule.id for rule in RULES} == tested


def test_every_rule_has_a_name_of_its_own_and_says_why():
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert all(len(rule.why) > 20 for rule in RULES)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(BAD)
    return tmp_path


def test_exit_codes(folder, capsys):
    assert main(["check", "good.yaml"]) == 0
    assert capsys.readouterr().out == "nothing found\n"
    assert main(["check", "bad.yaml"]) == 1
    assert main(["check", "bad.yaml", "none.yaml"]) == 2
    assert capsys.readouterr().err == "none.yaml: cannot be read (No such file or directory)\n"


def test_a_note_is_no_failure(folder, capsys):
    (folder / "note.yaml").write_text("use_layerwise: true\n")
    assert main(["check", "note.yaml"]) == 0
    assert "note.yaml:1:1: note: use_layerwise has no effect here [setting-no-effect]\n" in capsys.readouterr().out


def test_a_finding_says_where_what_why_and_what_to_do(folder, capsys):
    main(["check", "bad.yaml"])
    assert capsys.readouterr().out == (
        "bad.yaml:1:13: error: a chunk of 250 tokens is not a multiple of any block of vLLM [chunk-block]\n"
        "    why: a chunk is made of whole blocks of vLLM: 16 tokens on GPU, 128 on CPU\n"
        "    fix: write 240, or auto; on CPU a multiple of 128 (--fix writes it)\n"
        "1 error; --fix mends 1\n"
    )


def test_a_line_can_be_excused_from_a_rule_or_from_all(folder, capsys):
    for comment in ("# lmcache-ext: ignore", "# odd, lmcache-ext: ignore[chunk-block, kind]"):
        (folder / "bad.yaml").write_text(f"chunk_size: 250 {comment}\n")
        assert main(["check", "bad.yaml"]) == 0
    (folder / "bad.yaml").write_text("chunk_size: 250 # lmcache-ext: ignore[kind]\n")
    assert main(["check", "bad.yaml"]) == 1


def test_a_file_of_one_typo_is_still_an_lmcache_file(folder, capsys):
    (folder / "x.yaml").write_text("chunksize: 256\n")
    assert main(["check", "x.yaml"]) == 1
    assert "chunksize is not a known setting [setting-unknown]" in capsys.readouterr().out


def test_json_manifests_stay_json(folder):
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "c", "args": [1], "env": [{"name": "HF_TOKEN", "value": "hf_1"}]}]},
    }
    (folder / "x.json").write_text(json.dumps(manifest, indent="\t"))
    assert main(["check", "--fix", "x.json"]) == 0
    (container,) = json.loads((folder / "x.json").read_text())["spec"]["containers"]
    assert container["args"] == ["1"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"]["key"] == "HF_TOKEN"


def test_json(folder, capsys):
    assert main(["check", "--format", "json", "bad.yaml", "good.yaml"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["file"], row["line"], row["column"]) == ("bad.yaml", 1, 13)
    assert (row["rule"], row["severity"], row["fixable"]) == ("chunk-block", "error", True)
    assert row["fix"].startswith("write 240")


def test_github_annotations(folder, capsys):
    (folder / "a,b.yaml").write_text(BAD)
    main(["check", "--format", "github", "a,b.yaml"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("::error file=a%2Cb.yaml,line=1,col=13,title=chunk-block::a chunk of 250 tokens is not")


def test_a_directory_is_read_to_the_bottom(folder, capsys):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x.yml").write_text(BAD)
    (folder / "deep" / "README.md").write_text("```yaml\nchunk_size: 1\n```\n")
    assert main(["check", "deep"]) == 1
    assert capsys.readouterr().out.startswith("deep/er/x.yml:1:13: error")
    (folder / "empty").mkdir()
    assert main(["check", "empty"]) == 2


def test_all_documents_of_a_file_are_read(folder, capsys):
    (folder / "many.yaml").write_text("# first\n---\nchunk_size: 256\n---\n---\nchunk_size: 250\n")
    assert main(["check", "many.yaml"]) == 1
    assert capsys.readouterr().out.startswith("many.yaml:6:13:")


def test_a_list_is_its_items(folder, capsys):
    (folder / "list.yaml").write_text("apiVersion: v1\nkind: List\nitems:\n- kind: Secret\n  metadata: {name: a}\n")
    assert main(["check", "list.yaml"]) == 1
    assert capsys.readouterr().out.startswith("list.yaml:4:3: error: Secret has no apiVersion")


def test_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(BAD))
    assert main(["check", "-"]) == 1
    assert capsys.readouterr().out.startswith("-:1:13: error")


def test_fix_of_the_standard_input_goes_to_the_standard_output(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(BAD))
    assert main(["check", "--fix", "-"]) == 0
    captured = capsys.readouterr()
    assert captured.out == BAD.replace("250", "240")
    assert "nothing found" in captured.err


def test_fix_writes_what_can_be_mended_and_names_the_rest(folder, capsys):
    (folder / "bad.yaml").write_text(BAD + "max_local_cpu_size: none of it\n")
    assert main(["check", "--fix", "bad.yaml", "good.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "bad.yaml: fixed\n"
    assert "bad.yaml:3:21: error: max_local_cpu_size: 'none of it' is not a size" in captured.out
    assert (folder / "bad.yaml").read_text().startswith("chunk_size: 240\n")
    assert (folder / "good.yaml").read_text() == GOOD


def test_a_file_that_cannot_be_written_is_said_so(folder, capsys, monkeypatch):
    def refuse(name, mode="r", *rest, **named):
        if mode == "w":
            raise PermissionError(13, "Permission denied")
        return open(name, mode, *rest, **named)

    monkeypatch.setattr("lmcache_ext.manifests.verbs.open", refuse, raising=False)
    assert main(["check", "--fix", "bad.yaml"]) == 2
    assert capsys.readouterr().err == "bad.yaml: cannot be written (Permission denied)\n"
    assert (folder / "bad.yaml").read_text() == BAD


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1\n", "x.yaml:2:1: not valid YAML: expected ',' or ']'"),
        ("a:\n\t- b\n", "x.yaml:2:1: not valid YAML: found character '\\t'"),
        ("kind: ConfigMap\nmetadata: {}\ndata:\n  lmcache.yaml: |\n    a: 1\n    b: ]\n", "x.yaml:6:8: not valid YAML"),
    ],
)
def test_what_is_no_yaml_is_unreadable_with_its_place(folder, capsys, text, problem):
    (folder / "x.yaml").write_text(text)
    assert main(["check", "x.yaml"]) == 2
    assert capsys.readouterr().err.startswith(problem)


def test_bytes_that_are_no_text_are_unreadable(folder, capsys):
    (folder / "x.yaml").write_bytes(b"a: 1\nb: \xff\n")
    assert main(["check", "x.yaml"]) == 2
    assert capsys.readouterr().err == "x.yaml:2: is not UTF-8\n"


def test_a_bomb_of_aliases_and_a_pit_of_lists_are_survived():
    rows = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    found = check_text("\n".join(rows) + "\n")
    assert [one.rule for one in found.findings] == ["unknown-document"]
    assert len(repr(found.bundle)) < 1000
    (line,) = check([File("pit.yaml", "[" * 1000)]).unreadable
    assert line.startswith("pit.yaml:1:1: not valid YAML")


def damaged(text, rng):
    """The text with a line or three gone, doubled, emptied, moved or given another value."""
    lines = text.split("\n")
    for _ in range(rng.randint(1, 3)):
        index = rng.randrange(len(lines))
        name = lines[index].partition(":")[0]
        lines[index : index + 1] = rng.choice(
            [
                [],
                [lines[index]] * 2,
                [f"{name}:"],
                ["  " + lines[index]],
                [f"{name}: {rng.choice(['{}', '[]', 'null', 'true', '12', '|', '{a: b}'])}"],
            ]
        )
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_manifests_are_survived_and_mended_once_and_for_all(seed):
    rng = random.Random(seed)
    for base in (ENGINE, EMPTY_DIR, RUNTIME, STORES, SENTINEL, VALUES) * 3:
        before = [File("x.yaml", damaged(base, rng))]
        result = mend(before)
        assert bool(result.unreadable) == bool(check(before).unreadable), before[0].text
        assert mend(result.fixed or before).fixed == (), before[0].text


def test_secrets_in_a_value_are_not_shown():
    result = check_text("remote_url: redis://:hunter2@h:x\n")
    assert [one[0] for one in failures(result)] == ["setting-value"]
    assert "hunter2" not in result.findings[0].message


def test_a_number_in_a_secret_is_not_shown():
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData:\n  pin: 123456\n"
    result = check_text(secret)
    assert [one[0] for one in failures(result)] == ["not-a-string"]
    assert "123456" not in result.findings[0].message + result.findings[0].fix


def test_windows_line_ends_are_no_obstacle():
    result = check_text(ENGINE.replace("sizeLimit: 3Gi", "sizeLimit: 1Gi").replace("\n", "\r\n"))
    assert failures(result) == [("shm-small", 49, 22)]


@pytest.mark.parametrize("path", sorted(DATA.glob("*/*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
def test_fixing_twice_is_fixing_once_and_loses_nothing_but_what_is_wrong(path, newline):
    text = path.read_text().replace("\n", newline)
    fixed = mended(path.name, text)
    assert mended(path.name, fixed) == fixed
    assert re.findall(r"#.*", fixed) == re.findall(r"#.*", text)
    assert re.findall(r"\r?\n", fixed) == [newline] * fixed.count("\n")


def test_fixing_keeps_what_nobody_knows():
    text = changed(ENGINE, (("sizeLimit: 3Gi", "sizeLimit: 1Gi  # kept\n          x-ours: [1, two]"),))
    assert mended("x.yaml", text) == text.replace("sizeLimit: 1Gi", "sizeLimit: 3Gi")


def mended(name: str, text: str) -> str:
    return next((file.text for file in mend([File(name, text)]).fixed), text)


def test_rules_are_listed(capsys):
    assert main(["check", "--rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RULES)
    assert any(line.startswith("resource-name (error): ") for line in lines)


def test_without_a_file_it_says_so(capsys):
    assert main(["check"]) == 2
    assert "name a file" in capsys.readouterr().err


def test_the_program_checks_without_torch_or_a_cluster(folder):
    code = (
        "import sys; from lmcache_ext.cli import main; code = main(['check', 'bad.yaml']);"
        "assert not {'torch', 'vllm', 'kserve', 'kubernetes'} & set(sys.modules); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
