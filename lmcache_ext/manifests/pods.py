"""Pods as they will run: an InferenceService over its runtime, a runtime by itself, a Deployment.

KServe merges an InferenceService into its runtime: arguments one after the other, environment and
mounts by name, volumes of both. A ``Container`` is therefore a list of nodes, lowest first.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lmcache_ext.manifests.bundle import Bundle, Document
from lmcache_ext.manifests.nodes import Node

RUNTIMES = ("ClusterServingRuntime", "ServingRuntime")
TEMPLATED = ("Deployment", "StatefulSet", "DaemonSet", "Job")
ENGINE_CONTAINER = "kserve-container"


class Arg(NamedTuple):
    text: str
    node: Node


class Env(NamedTuple):
    """A variable; ``value`` is None where it comes from a Secret, a field or another object."""

    name: str
    value: str | None
    node: Node


class Mount(NamedTuple):
    volume: str
    path: str
    sub_path: str
    read_only: bool
    node: Node


@dataclass(frozen=True, eq=False)
class Container:
    """One container of a pod, ``nodes`` lowest first: the last is where the user writes."""

    nodes: tuple[Node, ...]
    own: Node

    @cached_property
    def args(self) -> list[Arg]:
        """The command and all arguments; a ``sh -c`` line is taken apart."""
        commands = [node.at("command") for node in self.nodes if node.at("command")]
        lists = [*commands[-1:], *(node.at("args") for node in self.nodes)]
        return [arg for each in lists if each is not None for item in each.items() for arg in _words(item)]

    def flag(self, name: str) -> Arg | None:
        """The value of ``--name``, the last one given; dashes and underscores are alike."""
        found = None
        for index, arg in enumerate(self.args):
            written, mark, value = arg.text.partition("=")
            if not written.startswith("--") or written[2:].replace("_", "-") != name.replace("_", "-"):
                continue
            if mark:
                found = Arg(value, arg.node)
            elif index + 1 < len(self.args) and not self.args[index + 1].text.startswith("--"):
                found = self.args[index + 1]
            else:
                found = Arg("", arg.node)
        return found

    @cached_property
    def env(self) -> dict[str, Env]:
        found = {}
        for item in self._items("env"):
            value = item.at("value")
            text = value.text if value is not None else (None if item.at("valueFrom") else "")
            found[item.text_at("name")] = Env(item.text_at("name"), text, item)
        return found

    @cached_property
    def mounts(self) -> list[Mount]:
        return [
            Mount(
                item.text_at("name"),
                item.text_at("mountPath").rstrip("/") or "/",
                item.text_at("subPath") or item.text_at("subPathExpr"),
                item.text_at("readOnly") == "true",
                item,
            )
            for item in self._items("volumeMounts")
        ]

    def mount_of(self, path: str) -> Mount | None:
        """The innermost mount that a path is in."""
        within = [mount for mount in self.mounts if path == mount.path or path.startswith(mount.path.rstrip("/") + "/")]
        return max(within, key=lambda mount: len(mount.path), default=None)

    def resource(self, part: str, name: str) -> Node | None:
        """``resources.<part>.<name>`` of the topmost layer that says it."""
        found = [node.at("resources", part, name) for node in self.nodes]
        return next((node for node in reversed(found) if node is not None), None)

    @property
    def name(self) -> str:
        return next((name for node in reversed(self.nodes) if (name := node.text_at("name"))), ENGINE_CONTAINER)

    def _items(self, name: str) -> Iterator[Node]:
        for node in self.nodes:
            yield from node.items_at(name)


def _words(item: Node) -> list[Arg]:
    if " --" not in item.text and "\n" not in item.text:
        return [Arg(item.text, item)]
    try:
        return [Arg(word, item) for word in shlex.split(item.text)]
    except ValueError:
        return [Arg(item.text, item)]


@dataclass(frozen=True, eq=False)
class Pod:
    """The pods of one document. ``complete`` is false where a runtime that was not given adds to it."""

    document: Document
    spec: Node  # where volumes and terminationGracePeriodSeconds are written
    containers: tuple[Container, ...]
    volume_lists: tuple[Node, ...]
    replicas: int
    complete: bool

    @cached_property
    def volumes(self) -> dict[str, Node]:
        return {item.text_at("name"): item for node in self.volume_lists for item in node.items()}

    @property
    def is_template(self) -> bool:
        """A runtime: each InferenceService adds its own."""
        return self.document.kind in RUNTIMES

    @property
    def namespace(self) -> str:
        return self.document.namespace


def pods(bundle: Bundle) -> list[Pod]:
    """The pods of every document that makes some."""
    return bundle.once(_pods)


def _pods(bundle: Bundle) -> list[Pod]:
    found = []
    for document in bundle.documents:
        pod = _pod(bundle, document)
        if pod is not None:
            found.append(pod)
    return found


def _pod(bundle: Bundle, document: Document) -> Pod | None:
    spec = document.node.at("spec")
    if spec is None:
        return None
    if document.kind == "InferenceService":
        return _service_pod(bundle, document)
    if document.kind in RUNTIMES or document.kind == "Pod":
        return _plain_pod(document, spec)
    if document.kind in TEMPLATED and (template := spec.at("template", "spec")) is not None:
        return _plain_pod(document, template)
    return None


def _plain_pod(document: Document, spec: Node) -> Pod:
    volumes = spec.at("volumes")
    replicas = document.node.text_at("spec", "replicas")
    return Pod(
        document,
        spec,
        tuple(Container((item,), item) for item in spec.items_at("containers")),
        (volumes,) if volumes else (),
        int(replicas) if re.fullmatch("[0-9]{1,6}", replicas) else 1,
        document.kind not in RUNTIMES,
    )


def _service_pod(bundle: Bundle, document: Document) -> Pod | None:
    predictor = document.node.at("spec", "predictor")
    if predictor is None:
        return None
    model = predictor.at("model")
    runtime = runtime_of(bundle, document)
    base = runtime.node.items_at("spec", "containers") if runtime else iter(())
    engine = next((item for item in base if item.text_at("name") == ENGINE_CONTAINER), None)
    containers = [Container((item,), item) for item in predictor.items_at("containers")]
    if model is not None:
        containers.insert(0, Container((engine, model) if engine is not None else (model,), model))
    volumes = [node.at("volumes") for node in (runtime.node.at("spec") if runtime else None, predictor) if node]
    replicas = predictor.text_at("minReplicas")
    return Pod(
        document,
        predictor,
        tuple(containers),
        tuple(node for node in volumes if node is not None),
        int(replicas) if re.fullmatch("[0-9]{1,6}", replicas) else 1,
        model is None or runtime is not None,
    )


def runtime_of(bundle: Bundle, document: Document) -> Document | None:
    """The runtime an InferenceService names, or the only given one that serves its model format by itself."""
    model = document.node.at("spec", "predictor", "model")
    if model is None:
        return None
    name = model.text_at("runtime")
    given = bundle.of(*RUNTIMES)
    if name:
        return next((runtime for runtime in given if runtime.name == name), None)
    wanted = model.text_at("modelFormat", "name")
    fitting = [runtime for runtime in given if wanted in _selected_formats(runtime)]
    return fitting[0] if len(fitting) == 1 else None


def _selected_formats(runtime: Document) -> list[str]:
    formats = runtime.node.items_at("spec", "supportedModelFormats")
    return [item.text_at("name") for item in formats if item.text_at("autoSelect") == "true"]
