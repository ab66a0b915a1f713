"""The argument vector as KServe hands it over, before any parser."""

from __future__ import annotations

import pytest

from runtime.argv import (
    Notes,
    Token,
    UsageError,
    check_known,
    take_kv_transfer,
    tokenize,
    uses_our_cache,
    wire_connector,
)

SEED_004 = """--kv-transfer-config='{"kv_connector":"LMCacheConnectorV1", "kv_role":"kv_both"}'"""
LMCACHE = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


def kv_of(*argv: str):
    notes = Notes()
    rest, config = take_kv_transfer(tokenize(argv, notes), notes)
    return rest, config, notes.lines


def test_underscores_become_dashes_but_not_in_values_or_dotted_keys():
    tokens = tokenize(["--max_model_len=8_000", "--a_b.c_d", "x_y"], Notes())
    assert tokens == [Token("--max-model-len", "8_000"), Token("--a-b.c_d", None), Token(None, "x_y")]


def test_negative_numbers_are_values():
    assert tokenize(["--swap", "-1"], Notes()) == [Token("--swap", None), Token(None, "-1")]


def test_equals_sign_without_value_is_an_empty_value():
    assert tokenize(["--chat-template="], Notes()) == [Token("--chat-template", "")]


@pytest.mark.parametrize(
    "argv",
    [
        [SEED_004],
        ["--kv-transfer-config", """'{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'"""],
        ["""--kv-transfer-config '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'"""],
        ["""--kv_transfer_config={"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}"""],
        ["--kv-transfer-config.kv_connector=LMCacheConnectorV1", "--kv-transfer-config.kv_role", "kv_both"],
        ["--kv-transfer-config", '{"kv_connector":"LMCacheConnectorV1"}', "--kv-transfer-config.kv_role=kv_both"],
    ],
)
def test_every_spelling_of_kv_transfer_config(argv):
    rest, config, _ = kv_of("--x", *argv, "--y", "1")
    assert config == LMCACHE
    assert rest == [Token("--x", None), Token("--y", None), Token(None, "1")]


def test_literal_quotes_are_noted():
    _, _, notes = kv_of(SEED_004)
    assert len(notes) == 1
    assert "literal ' quotes" in notes[0]


def test_json_string_values_keep_their_quotes():
    assert tokenize(['--x="a"'], Notes()) == [Token("--x", '"a"')]


def test_last_kv_transfer_config_wins():
    _, config, _ = kv_of("--kv-transfer-config", '{"kv_connector":"A"}', "--kv-transfer-config", '{"kv_connector":"B"}')
    assert config == {"kv_connector": "B"}


def test_removed_fields_are_dropped_with_one_note():
    _, config, notes = kv_of("--kv-transfer-config", '{"kv_connector":"A","kv_rank":0,"kv_buffer_size":1e9}')
    assert config == {"kv_connector": "A"}
    assert notes == ["--kv-transfer-config: ignored kv_buffer_size, kv_rank (not used since vLLM's V1 connectors)"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kv-transfer-config", "{kv_connector:X}"], "not JSON"),
        (["--kv-transfer-config", "[1]"], "must be a JSON object"),
        (["--kv-transfer-config"], "needs a value"),
        (["--kv-transfer-config", "--enforce-eager"], "needs a value"),
        (["--kv-transfer-config", '{"a":1}', "--kv-transfer-config.a.b=1"], "a is not an object"),
    ],
)
def test_bad_kv_transfer_config(argv, words):
    with pytest.raises(UsageError, match=words):
        kv_of(*argv)


@pytest.mark.parametrize(
    "written",
    [
        '{"kv_connector_extra_config": {"lmcache.extra_config": {"password": "hunter2", "x": 1}}',
        '{"lmcache.remote_url": "redis://u:hunter2@h:6379"',
        "{kv_connector: LMCacheConnectorV1, lmcache.password: hunter2}",
        "{'sentinel_password': 'hunter2'}",
        '["redis://:hunter2@h:6379"]',
        '{"token": "hunter2',
    ],
)
def test_bad_kv_transfer_config_is_shown_without_its_passwords(written):
    with pytest.raises(UsageError, match="JSON") as refused:
        take_kv_transfer(tokenize(["--kv-transfer-config", written], Notes()), Notes())
    assert "hunter2" not in str(refused.value)
    assert "***" in str(refused.value)


@pytest.mark.parametrize("name", ["LMCacheConnectorV1", "LMCacheConnector", "LMCacheMPConnector"])
def test_lmcache_names_are_wired_to_our_connector(name):
    wired = wire_connector({"kv_connector": name, "kv_role": "kv_consumer"}, ours=True)
    assert wired == {
        "kv_connector": "LMCacheConnectorV1",
        "kv_connector_module_path": "lmcache_ext.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lmcache_ext.kv_load_failure_policy": "recompute"},
    }
    assert uses_our_cache(wired)


def test_the_users_failure_policy_stays():
    wired = wire_connector({**LMCACHE, "kv_load_failure_policy": "fail"}, ours=True)
    assert wired["kv_load_failure_policy"] == "fail"
    assert wired["kv_connector_extra_config"] == {"lmcache_ext.kv_load_failure_policy": "fail"}


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        (LMCACHE, False),  # the real lmcache is installed
        ({**LMCACHE, "kv_connector_module_path": "my.module"}, True),
        ({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, True),
    ],
)
def test_other_connectors_are_left_alone(config, ours):
    assert wire_connector(config, ours=ours) == config
    assert not uses_our_cache(config)


def test_unknown_flag_names_the_nearest():
    with pytest.raises(UsageError, match=r"unknown flag --max-modl-len; did you mean --max-model-len\?"):
        check_known(tokenize(["--max_modl_len=5"], Notes()), {"--max-model-len", "--model"})


def test_unknown_flag_without_a_near_one():
    with pytest.raises(UsageError, match="unknown flag --zzz; --help lists all flags"):
        check_known(tokenize(["--zzz"], Notes()), {"--max-model-len"})


def test_dotted_and_short_flags_are_known_by_their_root():
    check_known(
        tokenize(["--compilation-config.level=3", "-tp", "2", "-O3"], Notes()), {"--compilation-config", "-tp", "-O"}
    )
