"""Code blocks of Markdown and reStructuredText: the manifests and requests that a guide shows."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lmcache_ext.manifests.text import File, Window

_GUIDES = (".md", ".rst", ".txt", ".mdx")
_YAML = {"yaml", "yml"}
_SHELL = {"sh", "bash", "shell", "console", ""}
_FENCE = re.compile(r"( *)(```+) *([A-Za-z]*)")
_DIRECTIVE = re.compile(r"( *)\.\. (?:code-block|code|sourcecode):: *([A-Za-z]*)")
# curl's -d '...' or --data '...', whose body is JSON: what is sent to a server
# the values or manifest a command is given
_FILE = re.compile(r"(?<=-f )[\w./-]+\.ya?ml\b|(?<=--values )[\w./-]+\.ya?ml\b")
_URL = re.compile(r"https?://[^\s'\"\\]+/completions")
_BODY = re.compile(r"(?:-d|--data|--data-raw) +'(\{.*?\})'", re.DOTALL)


def is_guide(name: str) -> bool:
    return name.endswith(_GUIDES)


def code_blocks(file: File) -> list[Window]:
    """The YAML blocks of a guide, and the bodies of the requests in its shell blocks."""
    found = []
    for language, block in _blocks(file.window()):
        if language in _YAML:
            found.append(block)
        elif language in _SHELL:
            for words in (_URL, _FILE):
                found += [_span(block, *match.span()) for match in words.finditer(block.text)]
            found += [_span(block, *match.span(1)) for match in _BODY.finditer(block.text)]
    return found


def _blocks(window: Window) -> Iterator[tuple[str, Window]]:
    lines = window.text.split("\n")
    index = 0
    while index < len(lines):
        fence, directive = _FENCE.match(lines[index]), _DIRECTIVE.match(lines[index])
        first, indent = index + 1, fence[1] if fence else ""
        if fence:
            last = next((i for i in range(first, len(lines)) if lines[i].strip().startswith(fence[2])), len(lines))
            yield fence[3].lower(), window.lines(first, last, len(indent))
            index = last + 1
        elif directive:
            last = _end_of_directive(lines, first, len(directive[1]))
            width = min((len(line) - len(line.lstrip()) for line in lines[first:last] if line.strip()), default=0)
            yield directive[2].lower(), window.lines(first, last, width)
            index = last
        else:
            index += 1


def _end_of_directive(lines: list[str], first: int, indent: int) -> int:
    """The first line that is not blank and not deeper than the directive."""
    for index in range(first, len(lines)):
        line = lines[index]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return index
    return len(lines)


def _span(block: Window, start: int, end: int) -> Window:
    """A piece of a block, from the beginning of its first line to the end of its last."""
    first = block.text.count("\n", 0, start)
    last = block.text.count("\n", 0, end) + 1
    whole = block.lines(first, last, 0)
    offset = block.text.rfind("\n", 0, start) + 1
    # blanks stand for what is around it: every character keeps its place
    head = " " * (start - offset)
    body = block.text[start:end]
    tail = " " * (len(whole.text) - len(head) - len(body) - 1)
    return Window(whole.file, head + body + tail + "\n", whole.outer, whole.pad, whole.exact)
