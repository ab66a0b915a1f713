"""The verb ``tune``: from files, or from a cluster."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_ext.config_values import size_bytes
from lmcache_ext.errors import ConfigError, ManifestError
from lmcache_ext.manifests.check import read_files
from lmcache_ext.manifests.text import File
from lmcache_ext.manifests.tune.facts import Facts, model_bytes_per_token, read_facts
from lmcache_ext.manifests.tune.plan import Wishes
from lmcache_ext.manifests.tune.run import FIELD_MANAGER, Tuned, apply_all, fetch_metrics, patches, tune
from lmcache_ext.manifests.tune.target import split_name

if TYPE_CHECKING:
    from lmcache_ext.manifests.tune.cluster import Cluster

OK, REFUSED = 0, 2
_SIZES = "such as 64Gi"


def add_to(verbs: Any) -> None:  # noqa: ANN401 - argparse keeps the type to itself
    """Add ``tune`` to ``lmcache-ext``'s verbs."""
    defaults = Wishes()
    verb = verbs.add_parser(
        "tune",
        help="propose chunk size, capacities, memory and /dev/shm by what a server has seen",
        description="Shows a diff; changes nothing without --apply.",
    )
    verb.add_argument("files", nargs="*", metavar="FILE", help="with --dry-run: manifests instead of a cluster")
    verb.add_argument("--configmap", required=True, metavar="NS/NAME", help="the ConfigMap with the LMCache file")
    verb.add_argument("--inferenceservice", default="", metavar="NAME", help="where more than one mounts it")
    verb.add_argument("--apply", action="store_true", help="apply what is proposed, server-side")
    verb.add_argument("--dry-run", action="store_true", help="no cluster: read FILEs and show the diff")
    verb.add_argument("--field-manager", default=FIELD_MANAGER, help="who owns what is applied; default %(default)s")
    verb.add_argument("--force-conflicts", action="store_true", help="take over fields that others own")
    seen = verb.add_argument_group("what the server has seen")
    seen.add_argument("--metrics", metavar="URL|FILE", help="default: the predictor's Service, through the API server")
    seen.add_argument("--service", metavar="NAME[:PORT]", default="", help="that Service, if it is another")
    seen.add_argument("--kv-bytes-per-token", type=float, help="default: by the bytes that hits have loaded")
    seen.add_argument("--model-config", type=Path, metavar="FILE", help="the model's config.json, to compute the same")
    wishes = verb.add_argument_group("how long, and at what cost")
    wishes.add_argument("--retention", type=float, default=defaults.retention_s, metavar="S", help="in host memory")
    wishes.add_argument("--disk-retention", type=float, default=defaults.disk_retention_s, metavar="S")
    wishes.add_argument("--max-host", type=_size, default=defaults.max_host_bytes, metavar="SIZE", help=_SIZES)
    wishes.add_argument("--max-disk", type=_size, default=defaults.max_disk_bytes, metavar="SIZE", help=_SIZES)
    cluster = verb.add_argument_group("the cluster")
    cluster.add_argument("--kubeconfig", help="default: as kubectl, or the pod's service account")
    cluster.add_argument("--context")
    verb.set_defaults(run=run_tune)


def _size(text: str) -> int:
    try:
        return size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def run_tune(arguments: argparse.Namespace) -> int:
    """0: proposed, and applied if told to; 2: something could not be read or was refused."""
    try:
        if arguments.dry_run:
            _show(_from_files(arguments))
            return OK
        return _with_cluster(arguments)
    except (ManifestError, ConfigError) as error:
        print(error, file=sys.stderr)
        return REFUSED


def _from_files(arguments: argparse.Namespace) -> Tuned:
    if arguments.apply or not arguments.files:
        raise ManifestError("--dry-run takes FILEs, and no --apply")
    files, problems = read_files(arguments.files)
    if problems:
        raise ManifestError(problems[0])
    text = _given_metrics(arguments.metrics) if arguments.metrics else ""
    return _tuned(arguments, files, arguments.configmap, text)


def _tuned(arguments: argparse.Namespace, files: list[File], config_map: str, metrics: str) -> Tuned:
    wishes = Wishes(arguments.retention, arguments.disk_retention, arguments.max_host, arguments.max_disk)
    return tune(files, config_map, arguments.inferenceservice, _facts(arguments, metrics), wishes)


def _facts(arguments: argparse.Namespace, metrics: str) -> Facts:
    size = arguments.kv_bytes_per_token
    if size is None and arguments.model_config is not None:
        size = model_bytes_per_token(arguments.model_config)
    return read_facts(metrics, now_s=time.time(), kv_bytes_per_token=size)


def _given_metrics(place: str) -> str:
    if "://" in place:
        return fetch_metrics(place)
    files, problems = read_files([place])
    if problems:
        raise ManifestError(problems[0])
    return files[0].text


def _with_cluster(arguments: argparse.Namespace) -> int:
    if arguments.files:
        raise ManifestError("FILEs are for --dry-run; without it the cluster is read")
    try:
        # an extra of this package, and slow to import: only this path needs it
        from lmcache_ext.manifests.tune.cluster import as_file, connect
    except ImportError:
        raise ManifestError(
            "the package kubernetes is not installed: pip install 'kserve-lmcache-runtime[kubernetes]'"
        ) from None
    cluster = connect(arguments.kubeconfig, arguments.context)
    namespace, name = split_name(arguments.configmap)
    namespace = namespace or "default"
    manifests = [cluster.config_map(namespace, name), *_services(cluster, namespace, name, arguments.inferenceservice)]
    metrics = _given_metrics(arguments.metrics) if arguments.metrics else _proxied(cluster, arguments, manifests)
    tuned = _tuned(arguments, [as_file(each) for each in manifests], f"{namespace}/{name}", metrics)
    _show(tuned)
    wanted = patches(tuned)
    if arguments.apply and wanted:
        apply_all(cluster, wanted, manager=arguments.field_manager, force=arguments.force_conflicts)
        _lines(f"{each['kind']} {each['metadata']['name']}: applied" for each in wanted)
    elif wanted:
        print("nothing was changed: --apply writes it")
    return OK


def _services(cluster: Cluster, namespace: str, config_map: str, wanted: str) -> list[dict[str, Any]]:
    """The InferenceServices that mount the ConfigMap, and their runtimes."""
    found: list[dict[str, Any]] = []
    for service in cluster.services(namespace):
        predictor = service.get("spec", {}).get("predictor", {})
        mounted = {(volume.get("configMap") or {}).get("name") for volume in predictor.get("volumes") or []}
        if config_map not in mounted or wanted not in ("", service["metadata"]["name"]):
            continue
        found.append(service)
        name = (predictor.get("model") or {}).get("runtime")
        runtime = cluster.runtime(namespace, name) if name else None
        found += [runtime] if runtime is not None and runtime not in found else []
    return found


def _proxied(cluster: Cluster, arguments: argparse.Namespace, manifests: Sequence[dict[str, Any]]) -> str:
    """``/metrics`` of the predictor: one replica's, whichever the Service chooses."""
    services = [each["metadata"] for each in manifests if each["kind"] == "InferenceService"]
    if not arguments.service and len(services) != 1:
        raise ManifestError("whose metrics? give --metrics URL, --service NAME or --inferenceservice NAME")
    name, _, port = (arguments.service or f"{services[0]['name']}-predictor").partition(":")
    namespace = str(manifests[0]["metadata"]["namespace"])
    return cluster.metrics(namespace, name, port or "80")


def _show(tuned: Tuned) -> None:
    _lines(tuned.facts.lines())
    for change in tuned.plan.changes:
        print(f"{change.what}: {change.old} -> {change.new}: {change.why}")
    _lines(f"note: {remark}" for remark in tuned.plan.remarks)
    diff = list(tuned.diff())
    _lines(diff or ["nothing to change"])


def _lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
