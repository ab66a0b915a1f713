"""What `convert` writes as command lines, the programs it is for take as they are."""

from pathlib import Path

import pytest

from lmcache_ext.daemons import lm_args
from lmcache_ext.manifests.check import read_files
from lmcache_ext.manifests.convert.convert import convert
from lmcache_ext.manifests.convert.options import Options
from runtime import args as runtime_args

SEEDS = Path(__file__).resolve().parents[1] / "data" / "seeds"


def objects(name):
    files, _ = read_files([str(SEEDS / name)])
    return {each["kind"]: each["spec"] for each in convert(files[0], Options()).objects if "spec" in each}


@pytest.mark.parametrize("name", ["000_values.yaml", "002_values.yaml"])
def test_the_model_server_takes_its_arguments(name, monkeypatch):
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)
    monkeypatch.setattr(runtime_args, "takes_over", lambda: True)
    settings = runtime_args.parse(objects(name)["InferenceService"]["predictor"]["model"]["args"])
    assert settings.model_names == (
        "mistral",
        "mistralai/Mistral-7B-Instruct-v0.2",
    )  # the tutorial's curl says the second
    assert settings.model == "mistralai/Mistral-7B-Instruct-v0.2"
    assert settings.engine.max_model_len == 16384
    assert settings.engine.enable_prefix_caching is False
    assert settings.engine.enable_chunked_prefill is False
    assert settings.our_cache
    assert settings.notes == ()


def test_the_cache_server_takes_its_arguments():
    (container,) = objects("000_values.yaml")["Deployment"]["template"]["spec"]["containers"]
    arguments = lm_args.parse(container["args"], "lmcache_server")
    assert (arguments.host, arguments.port, arguments.http_port) == ("0.0.0.0", 8080, 9090)
