"""What may stand under the name of kv_transfer_params.

vLLM's API checks its own field, not `vllm_xargs`, where it may be text: vLLM 0.32 fails on that in its API process,
with a 500 and before the engine hears of the request. The hook does not rely on it: what it raised would end the
engine.
"""

from __future__ import annotations

import pytest

from tests.unit.connector_engine import Engine
from tests.unit.test_connector import vllm_config  # noqa: F401  a fixture

BLOCKS, OTHERS = [1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17]


@pytest.fixture
def engine(vllm_config, tmp_path):  # noqa: F811
    engine = Engine(vllm_config, tmp_path)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "params", ["text", 7, 0.5, ["a", "b"], "", {"lmcache.skip_save": []}, {"max_load_tokens": "x"}]
)
def test_whatever_they_are_the_request_is_served_and_cached(engine, params):
    engine.compute("first", BLOCKS, params=params)
    assert engine.begin_load(engine.request("again", params=params), OTHERS) == 96
    assert not engine.scheduler._hooks.has_failures
