"""Files, the pieces of text within them, and edits by position.

A ConfigMap holds an LMCache file as a block of text, and a guide holds manifests in code blocks. A
``Window`` is such a piece: its own text, and for each of its lines where that line stands in the
file, so that a finding points into the file the reader has open and a fix is written there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Place(NamedTuple):
    """A position in a file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Edit(NamedTuple):
    """Replace the characters ``[start, end)`` of a file."""

    file: str
    start: int
    end: int
    text: str


def line_starts(text: str) -> list[int]:
    """Offsets at which the lines of ``text`` start; never empty."""
    starts, position = [0], text.find("\n")
    while position >= 0:
        starts.append(position + 1)
        position = text.find("\n", position + 1)
    return starts


@dataclass(frozen=True, eq=False)
class File:
    """One file as it was read; ``name`` is how the user named it."""

    name: str
    text: str

    @cached_property
    def _starts(self) -> list[int]:
        return line_starts(self.text)

    def place(self, offset: int) -> Place:
        line = bisect_right(self._starts, offset)
        return Place(self.name, line, offset - self._starts[line - 1] + 1)

    def line(self, number: int) -> str:
        """A line by its number, from 1."""
        start = self._starts[number - 1]
        end = self.text.find("\n", start)
        return self.text[start:] if end < 0 else self.text[start:end]

    def window(self) -> Window:
        """The whole file."""
        return Window(self, self.text, tuple(self._starts), "")


@dataclass(frozen=True, eq=False)
class Window:
    """Text within a file.

    ``outer[i]`` is the offset in the file of line ``i``, whose indentation ``pad`` is not part of ``text``.
    ``exact`` is false where only the beginning is known (text in quotes): nothing can be edited there.
    """

    file: File
    text: str
    outer: tuple[int, ...]
    pad: str
    exact: bool = True

    @cached_property
    def _starts(self) -> list[int]:
        return line_starts(self.text)

    def offset(self, inner: int) -> int:
        """Where the character ``inner`` of this text stands in the file."""
        if not self.exact:
            return self.outer[0]
        line = bisect_right(self._starts, inner) - 1
        return self.outer[line] + inner - self._starts[line]

    def place(self, inner: int) -> Place:
        return self.file.place(self.offset(inner))

    def edit(self, start: int, end: int, text: str) -> tuple[Edit, ...]:
        """Replace ``[start, end)`` of this text; nothing where that cannot be done."""
        if not self.exact:
            return ()
        return (Edit(self.file.name, self.offset(start), self.offset(end), text.replace("\n", "\n" + self.pad)),)

    def lines(self, first: int, last: int, width: int) -> Window:
        """Lines ``[first, last)`` without their first ``width`` columns of blanks."""
        outer, texts = [], []
        for index in range(first, last):
            start = self._starts[index]
            end = self._starts[index + 1] - 1 if index + 1 < len(self._starts) else len(self.text)
            cut = min(start + width, end)
            outer.append(self.offset(cut))
            texts.append(self.text[cut:end])
        text = "\n".join(texts) + "\n" if texts else ""
        end_of_last = self.offset(len(self.text)) if last >= len(self._starts) else self.offset(self._starts[last])
        return Window(self.file, text, (*outer, end_of_last), self.pad + " " * width, self.exact)

    def inexact(self, inner: int, text: str) -> Window:
        """``text`` that stands somewhere at ``inner``, character by character unknown where."""
        return Window(self.file, text, (self.offset(inner),), "", exact=False)


def apply(text: str, edits: Iterable[Edit]) -> str:
    """``text`` with all edits made; of two that overlap the first stays, an edit given twice is made once.

    New lines end as those of the text do.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    free_from = 0
    parts = []
    for edit in sorted(set(edits)):
        if edit.start < free_from:
            continue
        parts += [text[free_from : edit.start], newline.join(edit.text.replace("\r\n", "\n").split("\n"))]
        free_from = edit.end
    return "".join(parts) + text[free_from:]
