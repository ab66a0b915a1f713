"""``lmcache-ext check``: read, find, mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.bundle import Bundle, read_bundle
from lmcache_ext.manifests.findings import Finding, run
from lmcache_ext.manifests.rules import RULES
from lmcache_ext.manifests.text import Edit, File, apply

STDIN = "-"
MAX_FILE_BYTES = 8 * 1024 * 1024
_MANIFESTS = (".yaml", ".yml")  # in directories; a file that is named is read whatever its name
_MAX_ROUNDS = 20  # a fix can bring up another finding; none ever took more than four


class Checked(NamedTuple):
    """All that a check knows in the end; ``fixed`` holds the files that ``mend`` changed."""

    findings: list[Finding]
    unreadable: tuple[str, ...]
    bundle: Bundle
    fixed: tuple[File, ...] = ()


def read_files(names: Sequence[str], stdin: TextIO | None = None) -> tuple[list[File], list[str]]:
    """The files named, those within directories, and ``-``; and one line for each that cannot be read."""
    files, problems = [], []
    for name in names:
        try:
            files += [_read_stdin(stdin or sys.stdin)] if name == STDIN else [_read(path) for path in _paths(name)]
        except ManifestError as error:
            problems.append(str(error))
    return files, problems


def _paths(name: str) -> Iterator[str]:
    if not os.path.isdir(name):
        yield name
        return
    found = sorted(str(path) for path in Path(name).rglob("*") if path.suffix in _MANIFESTS and path.is_file())
    if not found:
        raise ManifestError(f"{name}: no .yaml or .yml file in it")
    yield from found


def _read(name: str) -> File:
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read ({error.strerror})") from None
    return File(name, _decoded(name, content))


def _read_stdin(stdin: TextIO) -> File:
    buffer = getattr(stdin, "buffer", None)
    return File(STDIN, _decoded(STDIN, buffer.read(MAX_FILE_BYTES + 1)) if buffer is not None else stdin.read())


def _decoded(name: str, content: bytes) -> str:
    if len(content) > MAX_FILE_BYTES:
        raise ManifestError(f"{name}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ManifestError(f"{name}:{line}: is not UTF-8") from None


def check(files: Iterable[File]) -> Checked:
    """All findings in all files, seen together."""
    bundle = read_bundle(files)
    return Checked(run(RULES, bundle), bundle.unreadable, bundle)


def mend(files: Iterable[File]) -> Checked:
    """Write every fix there is, until none is left; what remains is for the reader. Files stay as they are."""
    before = {file.name: file for file in files}
    now = dict(before)
    checked = check(now.values())
    for _ in range(_MAX_ROUNDS):
        edits = _compatible(checked.findings)
        if not edits:
            break
        for name in {edit.file for edit in edits}:
            now[name] = File(name, apply(now[name].text, [edit for edit in edits if edit.file == name]))
        checked = check(now.values())
    changed = tuple(file for name, file in now.items() if file.text != before[name].text)
    return checked._replace(fixed=changed)


def _compatible(findings: Iterable[Finding]) -> list[Edit]:
    """The edits of as many findings as can be made at once: each finding's all or none, no two in one place."""
    taken: list[Edit] = []
    for finding in findings:
        if finding.severity != "note" and not any(_touch(edit, other) for edit in finding.edits for other in taken):
            taken += finding.edits
    return taken


def _touch(one: Edit, other: Edit) -> bool:
    return one.file == other.file and one.start <= other.end and other.start <= one.end
