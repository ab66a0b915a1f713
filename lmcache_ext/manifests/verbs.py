"""The verbs of ``lmcache-ext`` that read manifests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from lmcache_ext.manifests.check import STDIN, Checked, check, mend, read_files
from lmcache_ext.manifests.findings import SEVERITIES, Finding, as_github, as_json, as_text
from lmcache_ext.manifests.rules import RULES

CLEAN, FINDINGS, UNREADABLE = 0, 1, 2


def add_to(verbs: Any) -> None:  # noqa: ANN401 - argparse keeps the type to itself
    """Add the verbs to ``lmcache-ext``'s own."""
    verb = verbs.add_parser(
        "check",
        help="find what will not work in LMCache files, manifests, Helm values and guides, and mend it",
        description="Exit code: 0 nothing found but notes, 1 errors or warnings, 2 something could not be read.",
    )
    verb.add_argument("files", nargs="*", metavar="FILE", help="file, directory, or - for the standard input")
    verb.add_argument("--fix", action="store_true", help="write the fixes; - is written to the standard output")
    verb.add_argument("--format", choices=("text", "json", "github"), default="text")
    verb.add_argument("--rules", action="store_true", help="list what is looked for, and why")
    verb.set_defaults(run=run_check)


def run_check(arguments: argparse.Namespace) -> int:
    """Check the files together; print what was found."""
    if arguments.rules:
        for rule in RULES:
            print(f"{rule.id} ({rule.severity}): {rule.why}")
        return CLEAN
    if not arguments.files:
        print("lmcache-ext check: name a file, a directory, or -", file=sys.stderr)
        return UNREADABLE
    files, problems = read_files(arguments.files)
    checked = mend(files) if arguments.fix else check(files)
    to_stdout = STDIN in arguments.files and arguments.fix
    if arguments.fix:
        _write(checked, {file.name: file.text for file in files})
    _print(checked.findings, arguments.format, sys.stderr if to_stdout else sys.stdout)
    for problem in (*problems, *checked.unreadable):
        print(problem, file=sys.stderr)
    return _code(checked.findings, [*problems, *checked.unreadable])


def _write(checked: Checked, texts: dict[str, str]) -> None:
    for file in checked.fixed:
        texts[file.name] = file.text
        if file.name != STDIN:
            with open(file.name, "w", encoding="utf-8") as out:
                out.write(file.text)
            print(f"{file.name}: fixed", file=sys.stderr)
    if STDIN in texts:
        sys.stdout.write(texts[STDIN])


def _print(findings: Sequence[Finding], form: str, out: TextIO) -> None:
    if form == "json":
        print(as_json(findings), file=out)
        return
    _lines(as_github(findings) if form == "github" else as_text(findings), out)
    counts = [(severity, sum(one.severity == severity for one in findings)) for severity in SEVERITIES]
    summary = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts if count)
    fixable = sum(one.fixable and one.severity != "note" for one in findings)
    print(f"{summary or 'nothing found'}{f'; --fix mends {fixable}' if fixable else ''}", file=out)


def _lines(lines: Iterable[str], out: TextIO) -> None:
    for line in lines:
        print(line, file=out)


def _code(findings: Iterable[Finding], problems: Sequence[str]) -> int:
    if problems:
        return UNREADABLE
    return FINDINGS if any(one.severity != "note" for one in findings) else CLEAN
