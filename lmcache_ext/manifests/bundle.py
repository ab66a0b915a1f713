"""All that was given, together: files, the documents in them, and who refers to whom."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from lmcache_ext.config_keys import KEYS, RENAMED, nearest
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.guides import code_blocks, is_guide
from lmcache_ext.manifests.nodes import Node, documents, inner_window
from lmcache_ext.manifests.text import File, Window

LMCACHE, HELM, REQUEST, URL, FILE = "LMCache file", "Helm values", "request", "URL", "file name"
UNKNOWN = "unknown"
_SETTINGS = {*KEYS, *RENAMED, "local_device", "extra_config"}
_HELM = ("servingEngineSpec", "cacheserverSpec", "routerSpec")
T = TypeVar("T")
DEFAULT_NAMESPACE = ""  # none written: whatever kubectl is told


@dataclass(frozen=True, eq=False)
class Document:
    """One document: a manifest, an LMCache file (of its own or in a ConfigMap), Helm values or a request."""

    node: Node
    kind: str
    holder: Document | None = None  # the ConfigMap an LMCache file is in
    key: str = ""  # and the key it is under there

    @property
    def name(self) -> str:
        return self.node.text_at("metadata", "name")

    @property
    def namespace(self) -> str:
        return self.node.text_at("metadata", "namespace")


@dataclass(frozen=True, eq=False)
class Bundle:
    """Everything one run of ``check`` sees."""

    documents: tuple[Document, ...] = ()
    unreadable: tuple[str, ...] = ()  # one line each
    _made: dict[object, Any] = field(default_factory=dict, repr=False)

    def once(self, make: Callable[[Bundle], T]) -> T:
        """What ``make`` makes of this bundle; every rule asks for the same."""
        if make not in self._made:
            self._made[make] = make(self)
        found: T = self._made[make]
        return found

    def of(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document.kind in kinds]

    def find(self, kind: str, name: str, namespace: str) -> Document | None:
        """The named object in that namespace; an object without a namespace is in everybody's."""
        for document in self.of(kind):
            if document.name == name and same_namespace(document.namespace, namespace):
                return document
        return None

    @cached_property
    def settings(self) -> list[Document]:
        """The LMCache files."""
        return self.of(LMCACHE)

    def settings_in(self, config_map: Document) -> list[Document]:
        return [document for document in self.settings if document.holder is config_map]


def same_namespace(one: str, other: str) -> bool:
    return DEFAULT_NAMESPACE in (one, other) or one == other


def read_bundle(files: Iterable[File]) -> Bundle:
    """Read all documents of all files. What is not YAML is one line of ``unreadable``; the rest is still read."""
    found: list[Document] = []
    unreadable: list[str] = []
    for file in files:
        windows = code_blocks(file) if is_guide(file.name) else [_window(file)]
        for window in windows:
            try:
                for node in documents(window):
                    found += _documents(node)
            except ManifestError as error:
                unreadable.append(str(error))
    return Bundle(tuple(found), tuple(unreadable))


def _window(file: File) -> Window:
    """The whole file. In JSON a tab is only ever a blank, which YAML does not take for one."""
    whole = file.window()
    return replace(whole, text=file.text.replace("\t", " ")) if file.name.endswith(".json") else whole


def _documents(node: Node) -> list[Document]:
    kind = kind_of(node)
    if kind == "List":
        return [document for item in node.items_at("items") for document in _documents(item)]
    document = Document(node, kind)
    return [document, *(_within(document) if kind == "ConfigMap" else ())]


def kind_of(node: Node) -> str:
    """A manifest's ``kind``, or what else the document is."""
    names = {pair.name for pair in node.pairs()}
    if "kind" in names and names & {"apiVersion", "metadata", "spec", "items"}:
        return node.text_at("kind")
    if node.is_scalar and node.text.startswith(("http://", "https://")):
        return URL
    if node.is_scalar and node.text.endswith((".yaml", ".yml")):
        return FILE
    if names & {*_HELM}:
        return HELM
    if "prompt" in names or {"model", "messages"} <= names:
        return REQUEST
    return LMCACHE if names & _SETTINGS or _all_misspelt(names) else UNKNOWN


def _all_misspelt(names: set[str]) -> bool:
    """Whether every key looks like a setting: a file of one line with a typo is still an LMCache file."""
    return bool(names) and all(_looks_like_setting(name) for name in names)


def _looks_like_setting(name: str) -> bool:
    near = nearest(name)
    return near is not None and difflib.SequenceMatcher(None, name, near).ratio() > 0.8


def _within(config_map: Document) -> list[Document]:
    """The LMCache files in a ConfigMap: what is named so, and what has a setting of LMCache."""
    found = []
    for pair in config_map.node.pairs_at("data"):
        if not pair.is_string or not pair.name.endswith((".yaml", ".yml")):
            continue
        for node in documents(inner_window(pair)):
            if kind_of(node) == LMCACHE or (node.is_mapping and "lmcache" in pair.name.lower()):
                found.append(Document(node, LMCACHE, config_map, pair.name))
    return found
