"""What `convert` writes, and what `check --fix` mends, an API server with KServe takes whole."""

from pathlib import Path

import pytest
import yaml

from lmcache_ext.manifests.check import mend, read_files
from lmcache_ext.manifests.convert.convert import as_text, convert
from lmcache_ext.manifests.convert.options import Options
from tests.deploy.manifests import load, problems

SEEDS = Path(__file__).resolve().parents[1] / "data" / "seeds"
CHARTS = SEEDS.parent / "charts"


def values(name):
    files, _ = read_files([str(SEEDS / name)])
    return files[0]


@pytest.mark.parametrize("name", ["000_values.yaml", "002_values.yaml"])
def test_converted_values_are_valid(name):
    objects = load(as_text(convert(values(name), Options()), name))
    assert {"InferenceService", "ConfigMap", "Secret", "Service"} <= {each["kind"] for each in objects}
    assert [line for each in objects for line in problems(each)] == []


@pytest.mark.parametrize("path", sorted(CHARTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_converted_values_with_the_keys_of_the_charts_tutorials_are_valid(path):
    (file,), _ = read_files([str(path)])
    objects = load(as_text(convert(file, Options()), path.name))
    assert "InferenceService" in {each["kind"] for each in objects}
    assert [line for each in objects for line in problems(each)] == []


@pytest.mark.parametrize("name", ["004_inferenceservice.yaml", "004_lm_server_deployment.yaml", "004_redis.yaml"])
def test_a_seed_is_valid_once_mended(name):
    file = values(name)
    if name != "004_redis.yaml":  # which is valid as it is
        assert [line for each in yaml.safe_load_all(file.text) for line in problems(each)] != []
    (fixed,) = mend([file]).fixed
    assert [line for each in load(fixed.text) for line in problems(each)] == []
