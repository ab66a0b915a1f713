"""The API server: what is read from it, and what is applied to it, server-side.

The only module that imports the ``kubernetes`` package. What it may do is what deploy/components/tune-rbac grants:
get and patch one ConfigMap, list InferenceServices and patch one, get a runtime, get through one Service's proxy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.text import File

Manifest = dict[str, Any]
GROUP, VERSION = "serving.kserve.io", "v1beta1"
RUNTIME_VERSION = "v1alpha1"
APPLY = "application/apply-patch+yaml"
DEADLINE_S = 30.0
_KEPT = ("name", "namespace", "labels", "annotations")


@dataclass(frozen=True)
class Cluster:
    """One API server; every call has a deadline, and raises ManifestError in one line."""

    api: client.ApiClient

    def config_map(self, namespace: str, name: str) -> Manifest:
        core = client.CoreV1Api(self.api)
        with _told(f"ConfigMap {namespace}/{name}"):
            found = core.read_namespaced_config_map(name, namespace, _request_timeout=DEADLINE_S)
        plain = self.api.sanitize_for_serialization(found)  # type: ignore[no-untyped-call]
        return _trimmed({"apiVersion": "v1", "kind": "ConfigMap", **plain})

    def services(self, namespace: str) -> list[Manifest]:
        """The InferenceServices of a namespace."""
        custom = client.CustomObjectsApi(self.api)
        with _told(f"InferenceServices in {namespace}"):
            found = custom.list_namespaced_custom_object(
                GROUP, VERSION, namespace, "inferenceservices", _request_timeout=DEADLINE_S
            )
        known = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "InferenceService"}  # a list does not repeat them
        return [_trimmed({**known, **each}) for each in _mapping(found)["items"]]

    def runtime(self, namespace: str, name: str) -> Manifest | None:
        """The runtime of that name, the namespace's before the cluster's; None where it is not to be seen."""
        custom = client.CustomObjectsApi(self.api)
        kinds: tuple[tuple[str, Callable[[], object]], ...] = (
            (
                "ServingRuntime",
                lambda: custom.get_namespaced_custom_object(
                    GROUP, RUNTIME_VERSION, namespace, "servingruntimes", name, _request_timeout=DEADLINE_S
                ),
            ),
            (
                "ClusterServingRuntime",
                lambda: custom.get_cluster_custom_object(
                    GROUP, RUNTIME_VERSION, "clusterservingruntimes", name, _request_timeout=DEADLINE_S
                ),
            ),
        )
        for kind, get in kinds:
            try:
                return _trimmed({"kind": kind, **_mapping(get())})
            except ApiException as error:
                if error.status not in (403, 404):
                    raise ManifestError(_line(f"{kind} {name}", error)) from None
        return None

    def metrics(self, namespace: str, service: str, port: str) -> str:
        """``/metrics`` of a Service, through the API server's proxy."""
        core = client.CoreV1Api(self.api)
        with _told(f"metrics of Service {namespace}/{service}"):
            return str(
                core.connect_get_namespaced_service_proxy_with_path(
                    f"{service}:{port}", namespace, "metrics", _request_timeout=DEADLINE_S
                )
            )

    def apply(self, patch: Manifest, *, manager: str, force: bool, dry_run: bool) -> None:
        """Server-side apply. Raises ManifestError that names the fields and their managers for a conflict."""
        name, namespace = patch["metadata"]["name"], patch["metadata"]["namespace"]
        options: dict[str, Any] = {"field_manager": manager, "force": force, "_content_type": APPLY}
        options |= {"dry_run": "All"} if dry_run else {}
        with _told(f"{patch['kind']} {namespace}/{name}"):
            if patch["kind"] == "ConfigMap":
                core = client.CoreV1Api(self.api)
                core.patch_namespaced_config_map(name, namespace, patch, _request_timeout=DEADLINE_S, **options)
            else:
                custom = client.CustomObjectsApi(self.api)
                custom.patch_namespaced_custom_object(
                    GROUP, VERSION, namespace, "inferenceservices", name, patch, _request_timeout=DEADLINE_S, **options
                )


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what the client raises into one line about ``what``."""
    try:
        yield
    except (ApiException, HTTPError) as error:
        raise ManifestError(_line(what, error)) from None


def _mapping(found: object) -> Manifest:
    if not isinstance(found, dict):
        raise ManifestError(f"the API server answered with {type(found).__name__}, an object was expected")
    return found


def _line(what: str, error: BaseException) -> str:
    if not isinstance(error, ApiException):
        return f"{what}: the API server cannot be reached ({' '.join(str(error).split())[:200]})"
    try:
        status = json.loads(error.body or "{}")
    except ValueError:
        status = {}
    message = " ".join(str(status.get("message") or error.reason).split())
    causes = "; ".join(_causes(status))
    hint = f" ({causes}); --force-conflicts takes them over" if error.status == 409 and causes else ""
    return f"{what}: {error.status}: {message}{hint}"


def _causes(status: Mapping[str, Any]) -> Iterator[str]:
    for cause in (status.get("details") or {}).get("causes") or []:
        yield f"{cause.get('field', '')} {cause.get('message', '')}".strip()


def _trimmed(manifest: Manifest) -> Manifest:
    """Without what the server adds: managed fields, versions, status."""
    metadata = {key: value for key, value in manifest.get("metadata", {}).items() if key in _KEPT and value}
    metadata.get("annotations", {}).pop("kubectl.kubernetes.io/last-applied-configuration", None)
    return {**{key: value for key, value in manifest.items() if key != "status"}, "metadata": metadata}


def connect(kubeconfig: str | None, context: str | None) -> Cluster:
    """By the kubeconfig, or from within a pod by its service account. Raises ManifestError."""
    try:
        if kubeconfig is None and context is None:
            try:
                config.load_incluster_config()  # type: ignore[no-untyped-call]
                return Cluster(client.ApiClient())
            except config.ConfigException:
                pass  # not in a pod
        return Cluster(config.new_client_from_config(kubeconfig, context))  # type: ignore[no-untyped-call]
    except (config.ConfigException, OSError, yaml.YAMLError) as error:
        raise ManifestError(f"no cluster: {' '.join(str(error).split())[:200]}") from None


class _Blocks(yaml.SafeDumper):
    """Text of several lines as a block, so that it can be edited line by line."""


_Blocks.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def as_file(manifest: Manifest) -> File:
    """A manifest as a file of its own, named kind/name."""
    text = yaml.dump(manifest, Dumper=_Blocks, sort_keys=False, width=2**31, allow_unicode=True)
    return File(f"{manifest['kind']}/{manifest['metadata']['name']}", str(text))
