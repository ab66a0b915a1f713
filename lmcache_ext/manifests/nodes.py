"""YAML as nodes that know their place, and the edits one can make of them.

PyYAML's own nodes carry marks; a ``Node`` adds the window they count in. Edits are made on the
text, so comments, quotes and blank lines stay as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.text import Edit, Place, Window

Edits = tuple[Edit, ...]
_STRING = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """One value in a document; ``key`` is what it stands under, ``parent`` what it stands in."""

    window: Window
    raw: yaml.Node
    key: yaml.ScalarNode | None = None
    parent: Node | None = None

    def __repr__(self) -> str:
        return f"Node({self.place})"  # PyYAML's own writes out every alias, which a few lines can make endless

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.raw, yaml.MappingNode)

    @property
    def is_scalar(self) -> bool:
        return isinstance(self.raw, yaml.ScalarNode)

    @property
    def is_string(self) -> bool:
        return self.raw.tag == _STRING

    @property
    def is_null(self) -> bool:
        return self.raw.tag == _NULL

    @property
    def text(self) -> str:
        """A scalar as written, without quotes; empty for anything else."""
        return str(self.raw.value) if isinstance(self.raw, yaml.ScalarNode) else ""

    @property
    def name(self) -> str:
        """The key this stands under."""
        return str(self.key.value) if self.key is not None else ""

    @property
    def place(self) -> Place:
        """Where the key is, or the value where there is none."""
        return self.window.place((self.key or self.raw).start_mark.index)

    @property
    def value_place(self) -> Place:
        return self.window.place(self.raw.start_mark.index)

    def pairs(self) -> Iterator[Node]:
        """The values of a mapping, each with its key; nothing for anything else."""
        if isinstance(self.raw, yaml.MappingNode):
            for key, value in self.raw.value:
                if isinstance(key, yaml.ScalarNode):
                    yield Node(self.window, value, key, self)

    def items(self) -> Iterator[Node]:
        """The elements of a list; nothing for anything else."""
        if isinstance(self.raw, yaml.SequenceNode):
            for item in self.raw.value:
                yield Node(self.window, item, None, self)

    def at(self, *path: str) -> Node | None:
        """The value under nested keys, the last of equal ones as every YAML reader has it; None if absent."""
        node: Node | None = self
        for name in path:
            node = next((pair for pair in reversed([*node.pairs()]) if pair.name == name), None) if node else None
        return node

    def items_at(self, *path: str) -> Iterator[Node]:
        """The elements of the list under nested keys; nothing if absent."""
        node = self.at(*path)
        return node.items() if node is not None else iter(())

    def pairs_at(self, *path: str) -> Iterator[Node]:
        """The values of the mapping under nested keys; nothing if absent."""
        node = self.at(*path)
        return node.pairs() if node is not None else iter(())

    def text_at(self, *path: str) -> str:
        node = self.at(*path)
        return node.text if node is not None and not node.is_null else ""

    def value(self) -> Any:  # noqa: ANN401 - whatever YAML holds
        """As Python objects. Raises ManifestError for what no reader can construct."""
        try:
            return yaml.constructor.SafeConstructor().construct_document(self.raw)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ManifestError(f"{self.place}: cannot be read: {_one_line(error)}") from None

    @property
    def source(self) -> str:
        """The text of this node alone, on the lines it stands on in its window."""
        start, end = self.raw.start_mark, self.raw.end_mark
        return "\n" * start.line + " " * start.column + self.window.text[start.index : end.index]

    def walk(self) -> Iterator[Node]:
        """This node and all below it, each once however often an alias names it."""
        seen: set[int] = set()
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if id(node.raw) in seen and not node.is_scalar:
                continue
            seen.add(id(node.raw))
            yield node
            waiting += reversed([*node.pairs(), *node.items()])


def documents(window: Window) -> list[Node]:
    """The documents of a text, empty ones left out. Raises ManifestError with the place of what is no YAML."""
    try:
        return [Node(window, raw) for raw in yaml.compose_all(window.text, yaml.SafeLoader) if raw.tag != _NULL]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = window.place(mark.index) if mark else window.place(0)
        raise ManifestError(f"{place}: not valid YAML: {error.problem or 'syntax error'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ManifestError(f"{window.place(0)}: not valid YAML: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def inner_window(node: Node) -> Window:
    """The text of a scalar as a window of its own; exact for a literal block (``|``)."""
    start = node.raw.start_mark.index
    text = node.window.text
    header = text[start : text.find("\n", start)] if "\n" in text[start:] else text[start:]
    style = node.raw.style if isinstance(node.raw, yaml.ScalarNode) else None
    if style != "|" or any(char.isdigit() for char in header.partition("#")[0]):
        return node.window.inexact(start, node.text)
    first = node.raw.start_mark.line + 1
    count = len(node.text.rstrip("\n").split("\n"))
    body = text.split("\n")[first : first + count]
    width = next((len(line) - len(line.lstrip(" ")) for line in body if line.strip()), 0)
    return node.window.lines(first, min(first + count, first + len(body)), width)


# --- edits --------------------------------------------------------------------------------


def scalar(value: object) -> str:
    """A value on one line of YAML."""
    dumped = str(yaml.safe_dump(value, width=2**31, default_flow_style=True))
    return dumped.removesuffix("\n").removesuffix("\n...")


def replace(node: Node, value: object) -> Edits:
    """Write another value there, in the quotes of the old one if it had any."""
    raw = node.raw
    style = raw.style if isinstance(raw, yaml.ScalarNode) and isinstance(value, str) else None
    in_flow = node.parent is not None and bool(getattr(node.parent.raw, "flow_style", False))
    as_json = style == '"' or (in_flow and isinstance(value, dict | list))  # the file may be JSON, which is YAML too
    text = json.dumps(value, ensure_ascii=False) if as_json else scalar(value)
    if style == "'":
        text = "'" + str(value).replace("'", "''") + "'"
    gap = " " if raw.start_mark.index == raw.end_mark.index else ""  # a key without a value
    return node.window.edit(raw.start_mark.index, _end(node), gap + text)


def quote(node: Node) -> Edits:
    """Make a string of a number or a boolean, as written."""
    return node.window.edit(node.raw.start_mark.index, _end(node), json.dumps(node.text))


def rename(node: Node, name: str) -> Edits:
    """Write another key."""
    if node.key is None:
        return ()
    new = json.dumps(name) if node.key.style else scalar(name)
    return node.window.edit(node.key.start_mark.index, node.key.end_mark.index, new)


def _end(node: Node) -> int:
    """Just behind the last character that belongs to a value, comments and blank lines left out."""
    raw = node.raw
    if isinstance(raw, yaml.CollectionNode) and raw.value and not raw.flow_style:
        last = raw.value[-1][1] if isinstance(raw, yaml.MappingNode) else raw.value[-1]
        return _end(Node(node.window, last))
    end = int(raw.end_mark.index)
    if isinstance(raw, yaml.ScalarNode) and raw.style in ("|", ">"):
        return len(node.window.text[:end].rstrip())
    return end


def _line_end(window: Window, index: int) -> int:
    end = window.text.find("\n", index)
    return len(window.text) if end < 0 else end


def insert(parent: Node, name: str, value: object) -> Edits:
    """Add a pair to a mapping, behind its last."""
    raw, window = parent.raw, parent.window
    if parent.is_null or (isinstance(raw, yaml.MappingNode) and not raw.value and not raw.flow_style):
        return ()
    if not isinstance(raw, yaml.MappingNode):
        return ()
    if raw.flow_style:
        comma = ", " if raw.value else ""
        return window.edit(raw.end_mark.index - 1, raw.end_mark.index - 1, f'{comma}"{name}": {json.dumps(value)}')
    return _append_lines(parent, raw.value[0][0].start_mark.column, {name: value})


def append(sequence: Node, value: object) -> Edits:
    """Add an element to a list, behind its last."""
    raw, window = sequence.raw, sequence.window
    if not isinstance(raw, yaml.SequenceNode):
        return ()
    if raw.flow_style:
        comma = ", " if raw.value else ""
        return window.edit(raw.end_mark.index - 1, raw.end_mark.index - 1, comma + json.dumps(value))
    return _append_lines(sequence, raw.start_mark.column, [value])


def _append_lines(node: Node, column: int, value: object) -> Edits:
    dumped = str(yaml.safe_dump(value, sort_keys=False, width=2**31)).rstrip("\n")
    text = "".join(f"\n{' ' * column}{line}" for line in dumped.split("\n"))
    at = _line_end(node.window, _end(node))
    at -= node.window.text[at - 1 : at] == "\r"
    return node.window.edit(at, at, text)


def remove(node: Node) -> Edits:
    """Take a pair out of its mapping; nothing if it is the only one there."""
    parent, key = node.parent, node.key
    if parent is None or key is None or len(parent.raw.value) < 2:
        return ()
    raw, window = parent.raw, node.window
    keys = [pair[0] for pair in raw.value]
    index = keys.index(key)
    start = key.start_mark.index
    line_start = start - key.start_mark.column
    flow = bool(getattr(raw, "flow_style", False))
    if not flow and not window.text[line_start:start].strip():
        end = _line_end(window, _end(node))
        if line_start:  # with the break before it: the indentation of the next line is not always in the window
            return window.edit(line_start - 1, end, "")
        return window.edit(0, min(end + 1, len(window.text)), "")
    if index + 1 < len(keys):  # the first of "- name: x" or of a flow mapping
        return window.edit(start, keys[index + 1].start_mark.index, "")
    return window.edit(raw.value[index - 1][1].end_mark.index, node.raw.end_mark.index, "")


def add_item(parent: Node, name: str, item: object) -> Edits:
    """Append to the list under ``name``, which is made if it is not there."""
    there = parent.at(name)
    return insert(parent, name, [item]) if there is None else append(there, item)


def put(parent: Node, name: str, value: object) -> Edits:
    """Write ``name: value``, in place of what is there."""
    there = parent.at(name)
    return insert(parent, name, value) if there is None else replace(there, value)
