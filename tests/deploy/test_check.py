"""What `kubectl kustomize` builds of deploy/ has none of the traps that `lmcache-ext check` knows."""

import pytest
import yaml

from lmcache_ext.manifests.caches import caches
from lmcache_ext.manifests.check import check, read_files
from lmcache_ext.manifests.text import File
from tests.deploy.manifests import DEPLOY, EXAMPLES, build

FOLDERS = sorted({path.parent for path in EXAMPLES.rglob("*.yaml")})
OVERLAYS = sorted(path.parent for path in (DEPLOY / "overlays").glob("*/kustomization.yaml"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlay_over_its_runtime_has_no_trap(overlay):
    """The InferenceService is checked as it will run, merged into the cluster's runtime."""
    files = [File(path.name, yaml.safe_dump_all(build(path))) for path in (DEPLOY / "base", overlay)]
    checked = check(files)
    assert checked.unreadable == ()
    assert any(cache.pod.complete and cache.is_known for cache in caches(checked.bundle)), "nothing to check"
    assert [str(one.place) + " " + one.message for one in checked.findings if one.severity != "note"] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_example_has_no_trap(folder):
    files, problems = read_files([str(folder)])
    assert problems == []
    checked = check(files)
    assert checked.unreadable == ()
    assert [str(one.place) + " " + one.message for one in checked.findings if one.severity != "note"] == []


def test_directories_themselves_have_no_trap():
    """As a reader would try it: with what kustomize has not put together yet."""
    for folder in (DEPLOY, EXAMPLES):
        files, _ = read_files([str(folder)])
        assert [str(one.place) + " " + one.message for one in check(files).findings if one.severity == "error"] == []
