"""``lmcache-ext tune``: read, propose, show, and apply only when told to."""

from __future__ import annotations

import difflib
import http.client
import re
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from lmcache_ext.config_urls import is_secret, mask_url
from lmcache_ext.config_values import MASK
from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.bundle import read_bundle
from lmcache_ext.manifests.nodes import Node, documents
from lmcache_ext.manifests.text import File, apply
from lmcache_ext.manifests.tune.facts import Facts
from lmcache_ext.manifests.tune.plan import Plan, Wishes, propose
from lmcache_ext.manifests.tune.target import Target, find_target

FIELD_MANAGER = "lmcache-ext-tune"
DEADLINE_S = 30.0
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"']+")
_MAX_METRICS_BYTES = 32 * 1024 * 1024
Manifest = dict[str, Any]


class Tuned(NamedTuple):
    """A plan over files, before and after."""

    target: Target
    facts: Facts
    plan: Plan
    before: dict[str, str]
    after: dict[str, str]

    def diff(self) -> Iterator[str]:
        for name, text in self.before.items():
            lines = difflib.unified_diff(
                text.splitlines(), self.after[name].splitlines(), f"{name} (now)", f"{name} (proposed)", lineterm=""
            )
            yield from (_masked(line) for line in lines)


def _masked(line: str) -> str:
    """A line of YAML without the passwords in it."""
    key, mark, _ = line.partition(": ")
    if mark and is_secret(key.lstrip("+- ")):
        return f"{key}{mark}{MASK}"
    return _URL.sub(lambda found: mask_url(found[0]), line)


def tune(files: list[File], config_map: str, service: str, facts: Facts, wishes: Wishes) -> Tuned:
    """Propose changes to the ConfigMap and its InferenceService; nothing is written."""
    bundle = read_bundle(files)
    if bundle.unreadable:
        raise ManifestError(bundle.unreadable[0])
    target = find_target(bundle, config_map, service)
    plan = propose(target, facts, wishes)
    before = {file.name: file.text for file in files}
    after = {name: apply(text, [edit for edit in plan.edits if edit.file == name]) for name, text in before.items()}
    return Tuned(target, facts, plan, before, after)


def fetch_metrics(url: str) -> str:
    """``/metrics`` of a server. Raises ManifestError."""
    if not url.startswith(("http://", "https://")):
        raise ManifestError(f"{url}: write http://host:port/metrics")
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            return str(answer.read(_MAX_METRICS_BYTES).decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException) as error:
        raise ManifestError(f"{url}: cannot be read ({error})") from None


# --- what is applied ----------------------------------------------------------------------


class Applies(Protocol):
    """Of ``cluster.Cluster``, what applying needs."""

    def apply(self, patch: Manifest, *, manager: str, force: bool, dry_run: bool) -> None: ...


def patches(tuned: Tuned) -> list[Manifest]:
    """For server-side apply: of each changed object the fields this program wants to own, and no other."""
    found = []
    for name, text in tuned.after.items():
        if text != tuned.before[name]:
            (node,) = documents(File(name, text).window())
            found.append(
                _config_map_patch(node, tuned) if node.text_at("kind") == "ConfigMap" else _service_patch(node, tuned)
            )
    return found


def _identity(node: Node) -> Manifest:
    metadata = {"name": node.text_at("metadata", "name"), "namespace": node.text_at("metadata", "namespace")}
    return {"apiVersion": node.text_at("apiVersion"), "kind": node.text_at("kind"), "metadata": metadata}


def _config_map_patch(node: Node, tuned: Tuned) -> Manifest:
    key = tuned.target.settings.key
    return {**_identity(node), "data": {key: node.text_at("data", key)}}


def _service_patch(node: Node, tuned: Tuned) -> Manifest:
    """Memory by its two names; volumes as the whole list, which KServe's schema does not merge."""
    changed = {change.what for change in tuned.plan.changes}
    predictor: Manifest = {}
    model = node.at("spec", "predictor", "model")
    if "memory" in changed and model is not None:
        resources = {part: {"memory": model.text_at("resources", part, "memory")} for part in ("limits", "requests")}
        predictor["model"] = {"resources": resources}
    volumes = node.at("spec", "predictor", "volumes")
    if "/dev/shm" in changed and volumes is not None and model is not None:
        predictor["volumes"] = volumes.value()
        mounts = [item.value() for item in model.items_at("volumeMounts") if item.text_at("mountPath") == "/dev/shm"]
        if mounts:
            predictor.setdefault("model", {})["volumeMounts"] = mounts
    return {**_identity(node), "spec": {"predictor": predictor}}


def apply_all(cluster: Applies, wanted: list[Manifest], *, manager: str, force: bool) -> None:
    """All or, as far as the server can say beforehand, nothing: every patch is tried without effect first."""
    for dry_run in (True, False):
        for patch in wanted:
            cluster.apply(patch, manager=manager, force=force, dry_run=dry_run)
