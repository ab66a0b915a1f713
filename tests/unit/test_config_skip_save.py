"""LMCACHE_FORCE_SKIP_SAVE, a variable that is no setting of LMCache and decides whether anything is stored."""

from __future__ import annotations

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError


def load(text, skip_save):
    return load_config(path="lmcache_config.yaml", content=text, environ={"LMCACHE_FORCE_SKIP_SAVE": skip_save})


@pytest.mark.parametrize(
    ("written", "value", "freezes", "note"),
    [
        ("chunk_size: 256", "1", True, "LMCACHE_FORCE_SKIP_SAVE: is read as freeze: true"),
        ("chunk_size: 256", "false", False, None),
        (
            "freeze: false",
            "True",
            False,
            "LMCACHE_FORCE_SKIP_SAVE: is shadowed by lmcache_config.yaml:1 (freeze: False)",
        ),
    ],
)
def test_the_variable_that_forbids_to_store_is_freeze(written, value, freezes, note):
    config = load(f"{written}\n", value)
    assert config.live.freeze is freezes
    assert config.notes == (() if note is None else (note,))
    assert (config.origin("freeze").text == "LMCACHE_FORCE_SKIP_SAVE") is freezes


def test_the_variable_that_forbids_to_store_is_a_yes_or_a_no():
    with pytest.raises(ConfigError, match="LMCACHE_FORCE_SKIP_SAVE: freeze: 'perhaps' is not a yes or a no"):
        load("chunk_size: 256\n", "perhaps")
