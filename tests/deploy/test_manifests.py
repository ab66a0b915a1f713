"""Every manifest builds, and an API server would take all of it."""

from __future__ import annotations

import copy

import pytest

from tests.deploy.kserve_models import read, written
from tests.deploy.manifests import DEPLOY, build, kustomizations, of_kind, problems

BUILDS = kustomizations(DEPLOY)
OVERLAYS = kustomizations(DEPLOY / "overlays")
MODELS = {
    "ClusterServingRuntime": "V1alpha1ClusterServingRuntime",
    "ServingRuntime": "V1alpha1ServingRuntime",
    "InferenceService": "V1beta1InferenceService",
}
MAX_OVERLAY_LINES = 30


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(DEPLOY.parent)))


@named(BUILDS)
def test_api_server_would_take_all_of_it(path):
    built = build(path)
    assert built
    assert [line for one in built for line in problems(one)] == []


@named(BUILDS)
def test_kserves_own_models_load_it(path):
    for one in of_kind(build(path), *MODELS):
        assert written(read(MODELS[one["kind"]], one)) == one


@named(OVERLAYS)
def test_overlay_is_a_small_patch(path):
    assert sum(len(one.read_text().splitlines()) for one in path.iterdir()) <= MAX_OVERLAY_LINES


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda one: one["spec"].update(terminationGracePeriodSeconds=60), "terminationGracePeriodSeconds"),
        (lambda one: one["spec"]["containers"][0].update(readinesProbe={}), "readinesProbe"),
        (lambda one: one["spec"]["containers"][0]["args"].append(8080), "8080 is not of type 'string'"),
        (lambda one: one["spec"].pop("containers"), "containers"),
        (lambda one: one.pop("apiVersion"), "apiVersion"),
    ],
)
def test_mistake_in_a_runtime_is_found(change, why):
    runtime = copy.deepcopy(build(DEPLOY / "base")[0])
    change(runtime)
    assert any(why in line for line in problems(runtime))


def test_mistake_in_a_builtin_kind_is_found():
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": [{"port": 1}]}}
    assert problems(service)
