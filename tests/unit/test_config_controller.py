"""The keys of the controller and of peers, held against each other."""

from __future__ import annotations

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError


def load(text):
    return load_config(path="lmcache_config.yaml", content=text, environ={})


def test_one_address_of_the_controller_is_enough():
    config = load("enable_controller: true\ncontroller_url: controller:9001\n")
    assert (config.controller.pull_url, config.controller.reply_url) == ("controller:9001", "controller:9001")


def test_a_controller_without_an_address_is_refused():
    with pytest.raises(ConfigError, match=r":1: enable_controller: .*controller_pull_url and controller_reply_url"):
        load("enable_controller: true\n")
    assert not load("enable_controller: false\n").controller.enabled


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("enable_p2p: true\n", "needs enable_controller: true"),
        ("enable_p2p: true\nenable_controller: true\ncontroller_pull_url: c:1\n", "p2p_host and p2p_init_ports"),
    ],
)
def test_peers_without_what_they_need_are_refused(text, said):
    with pytest.raises(ConfigError, match=rf":1: enable_p2p: .*{said}"):
        load(text)
