"""Who asked for what: every key of the values ends up on one of two lists, mapped or not mapped and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests import chart
from lmcache_ext.manifests.nodes import Node
from lmcache_ext.manifests.text import Place

Values = dict[str, Any]


class Entry(NamedTuple):
    """One key of the values; ``target`` says where it went, or why it went nowhere."""

    place: Place
    path: str
    mapped: bool
    target: str


@dataclass
class Ledger:
    """All entries, and what is said beside them."""

    entries: dict[str, Entry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def unmapped(self) -> list[Entry]:
        return sorted(entry for entry in self.entries.values() if not entry.mapped)

    @property
    def mapped(self) -> list[Entry]:
        return sorted(entry for entry in self.entries.values() if entry.mapped)


class Section:
    """A mapping of the values. Asking for a key enters it in the ledger; ``close`` enters what nobody asked for."""

    def __init__(self, node: Node | None, path: str, ledger: Ledger) -> None:
        self.node = node
        self.path = path
        self.ledger = ledger
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self.node is not None and self.node.at(name) is not None

    def take(self, name: str, target: str, default: Any = None) -> Any:  # noqa: ANN401 - whatever the values hold
        """The value of a key that goes to ``target``; ``default`` where it is absent or null."""
        node = self._ask(name, mapped=True, target=target)
        value = node.value() if node is not None else None
        if isinstance(value, dict | list) and name not in chart.COMPOSITE:
            raise self._wrong(name, "a single value")
        return default if value is None else value

    def whole(self, name: str, target: str, default: int) -> int:
        """A whole number. Raises ManifestError for anything else."""
        value = self.take(name, target, default)
        if isinstance(value, bool) or not re.fullmatch("[0-9]{1,9}", str(value)):
            raise self._wrong(name, "a whole number")
        return int(value)

    def port(self, name: str, target: str, default: int) -> int:
        """A port; ``default`` where it is absent or empty. Raises ManifestError for anything else."""
        if self.peek(name, "") == "":
            self.take(name, target)
            return default
        port = self.whole(name, target, default)
        if not 0 < port < 65536:
            raise self._wrong(name, "a port, 1 to 65535,")
        return port

    def mapping(self, name: str, target: str, default: Values | None = None) -> Values:
        """A mapping, empty where there is none. Raises ManifestError for anything else."""
        value = self.take(name, target, default or {})
        if not isinstance(value, dict):
            if value == "":
                return {}
            raise self._wrong(name, "a mapping")
        return value

    def resources(self, target: str) -> Values:
        """``resources``, whose requests and limits are mappings. Raises ManifestError for anything else."""
        value = {part: each for part, each in self.mapping("resources", target).items() if each is not None}
        if not all(isinstance(value.get(part, {}), dict) for part in ("requests", "limits")):
            raise self._wrong("resources", "requests and limits, each a mapping,")
        return {part: each for part, each in value.items() if part in ("requests", "limits")}

    def items(self, name: str, target: str, default: list[Any] | None = None) -> list[Any]:
        """A list, empty where there is none. Raises ManifestError for anything else."""
        value = self.take(name, target, default or [])
        if not isinstance(value, list):
            if value == "":
                return []
            raise self._wrong(name, "a list")
        return value

    def words(self, name: str, target: str) -> list[str]:
        """A list of texts; one alone may stand without the list. Raises ManifestError for anything else."""
        value = self.take(name, target, [])
        found = value if isinstance(value, list) else [value] if value != "" else []
        if not all(isinstance(item, str) for item in found):
            raise self._wrong(name, "a text or a list of texts")
        return found

    def mappings(self, name: str, target: str) -> list[Values]:
        """A list of mappings. Raises ManifestError for anything else."""
        value = self.items(name, target)
        if not all(isinstance(item, dict) for item in value):
            raise self._wrong(name, "a list of mappings")
        return value

    def _wrong(self, name: str, wanted: str) -> ManifestError:
        node = self.node.at(name) if self.node is not None else None
        place = f"{node.place}: " if node is not None else ""
        return ManifestError(f"{place}{self._path(name)}: {wanted} is expected here")

    def peek(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """The value, without a word in the ledger."""
        node = self.node.at(name) if self.node is not None else None
        value = node.value() if node is not None else None
        return default if value is None else value

    def refuse(self, why: str, *names: str) -> None:
        """Enter keys as not mapped."""
        for name in names:
            self._ask(name, mapped=False, target=why)

    def inner(self, name: str) -> Section:
        """The mapping under a key, an empty one if there is none."""
        self._asked.add(name)
        node = self.node.at(name) if self.node is not None else None
        if node is not None and not any(node.pairs()):
            empty = node.is_null or node.is_mapping
            self._enter(node, mapped=empty, target="nothing: it is empty" if empty else "a mapping is expected here")
        return Section(node if node is not None and node.is_mapping else None, self._path(name), self.ledger)

    def each(self, name: str) -> Iterator[Section]:
        """The mappings of a list."""
        self._asked.add(name)
        items = self.node.items_at(name) if self.node is not None else iter(())
        for index, item in enumerate(items):
            yield Section(item, f"{self._path(name)}[{index}]", self.ledger)

    def close(self, why: str = "the chart knows no such key") -> None:
        """Nobody will ask for more."""
        for pair in self.node.pairs() if self.node is not None else ():
            if pair.name not in self._asked:
                self._enter(pair, mapped=False, target=why)

    def _ask(self, name: str, *, mapped: bool, target: str) -> Node | None:
        self._asked.add(name)
        node = self.node.at(name) if self.node is not None else None
        if node is not None:
            self._enter(node, mapped=mapped, target=target)
        return node

    def _enter(self, node: Node, *, mapped: bool, target: str) -> None:
        path = self._path(node.name)
        self.ledger.entries[path] = Entry(node.place, path, mapped, target)

    def _path(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name
