"""The verbs of ``lmcache-ext`` that read manifests."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.check import STDIN, Checked, check, mend, read_files
from lmcache_ext.manifests.convert.convert import as_text as as_manifests
from lmcache_ext.manifests.convert.convert import convert
from lmcache_ext.manifests.convert.options import Options
from lmcache_ext.manifests.findings import SEVERITIES, Finding, as_github, as_json, as_text
from lmcache_ext.manifests.rules import RULES
from lmcache_ext.manifests.text import File
from lmcache_ext.manifests.tune import verb as tune_verb

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
    _add_convert(verbs)
    tune_verb.add_to(verbs)


def _add_convert(verbs: Any) -> None:  # noqa: ANN401
    verb = verbs.add_parser(
        "convert",
        help="turn Helm values of production-stack into KServe manifests",
        description="Manifests go to the standard output, what was not mapped to the standard error, and what will not "
        "work of the result, too. Exit code: 0, 1 where there is such, 2 where the values could not be converted.",
    )
    defaults = Options()
    verb.add_argument("values", metavar="VALUES", help="the values file, or - for the standard input")
    verb.add_argument(
        "--release", default=defaults.release, help="helm's release name, which begins the Services' names"
    )
    verb.add_argument("-n", "--namespace", default=defaults.namespace, help="written into every object if given")
    verb.add_argument("--runtime", default=defaults.runtime, help="serving runtime; default lmcache-vllm, on CPU -cpu")
    verb.add_argument("--server-image", default=defaults.server_image, help="image of the cache server")
    verb.add_argument("--explain", action="store_true", help="say on the standard error where every key went")
    verb.set_defaults(run=run_convert)


def run_convert(arguments: argparse.Namespace) -> int:
    """Print the manifests of one values file; name every key that has no place in them."""
    options = Options(
        release=arguments.release,
        namespace=arguments.namespace,
        runtime=arguments.runtime,
        server_image=arguments.server_image,
    )
    files, problems = read_files([arguments.values])
    try:
        converted = convert(files[0], options) if files else None
    except ManifestError as error:
        problems.append(str(error))
        converted = None
    if converted is None:
        _lines(problems, sys.stderr)
        return UNREADABLE
    text = as_manifests(converted, files[0].name)
    sys.stdout.write(text)
    if arguments.explain:
        _lines((f"{entry.place}: {entry.path} -> {entry.target}" for entry in converted.ledger.mapped), sys.stderr)
    unmapped = (f"{entry.place}: {entry.path} not mapped: {entry.target}" for entry in converted.ledger.unmapped)
    _lines([*unmapped, *(f"note: {note}" for note in converted.ledger.notes)], sys.stderr)
    flaws = [one for one in check([File("output", text)]).findings if one.severity == "error"]
    _lines(as_text(flaws), sys.stderr)
    return FINDINGS if flaws else CLEAN


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
        problems += _write(checked, {file.name: file.text for file in files})
    _print(checked.findings, arguments.format, sys.stderr if to_stdout else sys.stdout)
    for problem in (*problems, *checked.unreadable):
        print(problem, file=sys.stderr)
    return _code(checked.findings, [*problems, *checked.unreadable])


def _write(checked: Checked, texts: dict[str, str]) -> list[str]:
    """Write what was mended; one line for each file that cannot be written."""
    problems = []
    for file in checked.fixed:
        texts[file.name] = file.text
        if file.name == STDIN:
            continue
        try:
            with open(file.name, "w", encoding="utf-8", newline="") as out:
                out.write(file.text)
        except OSError as error:
            problems.append(f"{file.name}: cannot be written ({error.strerror})")
        else:
            print(f"{file.name}: fixed", file=sys.stderr)
    if STDIN in texts:
        sys.stdout.write(texts[STDIN])
    return problems


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
