"""What a rule found, and how it is shown: as text, as JSON, or as annotations of a GitHub workflow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lmcache_ext.manifests.bundle import Bundle
from lmcache_ext.manifests.nodes import Edits, Node
from lmcache_ext.manifests.text import Place

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Found(NamedTuple):
    """What a rule yields: where, what is wrong there, what to write instead, and the edits that write it."""

    node: Node
    message: str
    fix: str
    edits: Edits = ()
    at_value: bool = False  # point at the value, not at its key


class Rule(NamedTuple):
    """One trap. ``error``: does not work; ``warning``: works until it hurts; ``note``: good to know, no failure."""

    id: str
    severity: Severity
    why: str
    find: Callable[[Bundle], Iterator[Found]]


@dataclass(frozen=True, order=True)
class Finding:
    """One trap that somebody stepped into."""

    place: Place
    rule: str
    severity: Severity
    message: str
    why: str
    fix: str
    edits: Edits = ()

    @property
    def fixable(self) -> bool:
        return bool(self.edits)


_IGNORE = re.compile(r"#.*\blmcache-ext: ignore(?:\[([\w, -]*)\])?")


def run(rules: Iterable[Rule], bundle: Bundle) -> list[Finding]:
    """All findings of all rules, by place; what two documents share is reported once.

    A line that ends in ``# lmcache-ext: ignore[rule]`` has none of that rule, without ``[rule]`` none at all.
    """
    found = {
        Finding(_place(each), rule.id, rule.severity, each.message, rule.why, each.fix, each.edits)
        for rule in rules
        for each in rule.find(bundle)
        if not _is_ignored(each, rule.id)
    }
    return sorted(found, key=lambda one: (one.place, SEVERITIES.index(one.severity), one.rule, one.message))


def _is_ignored(found: Found, rule: str) -> bool:
    ignored = _IGNORE.search(found.node.window.file.line(_place(found).line))
    return ignored is not None and (ignored[1] is None or rule in re.split("[, ]+", ignored[1]))


def _place(found: Found) -> Place:
    return found.node.value_place if found.at_value else found.node.place


def as_text(findings: Iterable[Finding]) -> Iterator[str]:
    for one in findings:
        yield f"{one.place}: {one.severity}: {one.message} [{one.rule}]"
        yield f"    why: {one.why}"
        yield f"    fix: {one.fix}{' (--fix writes it)' if one.fixable else ''}"


def as_json(findings: Iterable[Finding]) -> str:
    rows = [
        {
            **{"file": one.place.file, "line": one.place.line, "column": one.place.column},
            **{"rule": one.rule, "severity": one.severity, "message": one.message},
            **{"why": one.why, "fix": one.fix, "fixable": one.fixable},
        }
        for one in findings
    ]
    return json.dumps(rows, indent=2)


def as_github(findings: Iterable[Finding]) -> Iterator[str]:
    """Workflow commands: ``::error file=...,line=...,col=...,title=...::message``."""
    for one in findings:
        level = "notice" if one.severity == "note" else one.severity
        where = f"file={_property(one.place.file)},line={one.place.line},col={one.place.column},title={one.rule}"
        message = f"{one.message}. Fix: {one.fix}"
        yield f"::{level} {where}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
