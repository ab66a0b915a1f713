"""extra_config.quotas: what may be written, what it amounts to, and that no salt is ever shown."""

from __future__ import annotations

import hashlib
import json

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.config_diff import differences, is_live
from lmcache_ext.config_quotas import OTHERS, UNSALTED, Quota, quotas, tenant_of_salt
from lmcache_ext.config_values import GIB
from lmcache_ext.errors import ConfigError

MIB = 2**20
SALT = "s3cr3t-of-team-a"
DIGEST = hashlib.sha256(SALT.encode()).hexdigest()
NAME = f"sha256:{DIGEST[:8]}"


def read(text, **environ):
    return load_config(path="/x/lmcache_config.yaml", content=text, environ=environ)


class TestReads:
    @pytest.mark.parametrize(
        ("key", "written", "expected"),
        [
            (SALT, "2Gi", Quota(DIGEST, NAME, 2 * GIB)),
            (SALT, 2, Quota(DIGEST, NAME, 2 * GIB)),
            (SALT, {"host": "500Mi"}, Quota(DIGEST, NAME, 500 * MIB)),
            (SALT, {"host": "500Mi", "name": "team-a"}, Quota(DIGEST, "team-a", 500 * MIB)),
            (f"sha256:{DIGEST}", "2Gi", Quota(DIGEST, NAME, 2 * GIB)),
            (f"sha256:{DIGEST.upper()}", "2Gi", Quota(DIGEST, NAME, 2 * GIB)),
            ("*", "500Mi", Quota(OTHERS, "*", 500 * MIB)),
            ("unsalted", 0, Quota(UNSALTED, "unsalted", 0)),
        ],
    )
    def test_every_form(self, key, written, expected):
        assert quotas({key: written}) == (expected,)

    def test_the_file_the_variable_and_the_connector(self):
        as_json = json.dumps({"quotas": {SALT: "2Gi", "*": "500Mi"}})
        found = [
            read(f'extra_config:\n  quotas:\n    {SALT}: 2Gi\n    "*": 500Mi\n'),
            load_config(environ={"LMCACHE_EXTRA_CONFIG": as_json}),
            load_config(environ={}, connector_extra={"lmcache.extra_config": as_json}),
            load_config(environ={}, connector_extra={"lmcache.extra_config": {"quotas": {SALT: "2Gi", "*": "500Mi"}}}),
        ]
        assert {config.live.quotas for config in found} == {
            (Quota(DIGEST, NAME, 2 * GIB), Quota(OTHERS, "*", 500 * MIB))
        }

    @pytest.mark.parametrize(
        "text", ["chunk_size: 256\n", "extra_config: {quotas: }\n", "extra_config: {quotas: {}}\n"]
    )
    def test_none_where_none_is_written(self, text):
        assert read(text).live.quotas == ()

    def test_no_salt_as_the_tenant_without_one_and_half_a_surrogate_as_any(self):
        assert tenant_of_salt(None) == tenant_of_salt("") == UNSALTED
        assert len(tenant_of_salt("\ud800")) == 64


class TestRefuses:
    @pytest.mark.parametrize(
        ("written", "why"),
        [
            ("{%s: 2Gx}", f"tenant 1, {NAME}, has '2Gx', which is not a size"),
            ('{"*": 1, %s: -1}', f"tenant 2, {NAME}, has -1, which is not a size"),
            ("{%s: {host: many}}", f"{NAME}, has 'many', which is not a size"),
            (
                "{%s: {host: 1, disk: 2}}",
                "has a limit for disk, where nothing says whose a chunk is: max_local_disk_size is the limit of all",
            ),
            (
                "{%s: {remote: 2}}",
                "has a limit for remote, where nothing says whose a chunk is: its server has the limit",
            ),
            ("{%s: {host: 1, disc: 2}}", "is no quota: write a size, such as 500Mi"),
            ("{%s: {hots: 1}}", "is no quota: write a size, such as 500Mi"),
            ("{%s: {name: a}}", "is no quota"),
            ("{%s: [1, 2]}", "is no quota"),
            ("{%s: {host: [1]}}", "is no quota"),
            ("{%s: }", "has no value"),
            ("{%s: {host: 1, name: '*'}}", "may not be named *"),
            ("{%s: {host: 1, name: ''}}", "is empty"),
            ("{%s: 1, 'sha256:" + DIGEST + "': 2}", "two lines for the tenant"),
            ("{%s: {host: 1, name: a}, other: {host: 2, name: a}}", "two lines for the name a"),
            ("{'sha256:9f86d081': 1}", "is no SHA-256 of 64 digits"),
            ("[%s]", "is not a mapping"),
            ("%s", "is not a mapping"),
            ("7", "is not a mapping"),
        ],
    )
    def test_what_is_no_quota_with_key_line_and_way_out(self, written, why):
        text = "chunk_size: 256\nextra_config:\n  quotas: " + written.replace("%s", SALT)
        with pytest.raises(ConfigError) as error:
            read(text)
        assert str(error.value).startswith("/x/lmcache_config.yaml:3: extra_config.quotas: ")
        assert why in str(error.value)
        assert SALT not in str(error.value)

    def test_a_tenant_written_twice_without_its_salt(self):
        with pytest.raises(ConfigError, match=rf":4: {NAME}: written twice, in line 3") as error:
            read(f"extra_config:\n  quotas:\n    {SALT}: 1\n    {SALT}: 2\n")
        assert SALT not in str(error.value)

    def test_a_bare_asterisk_and_says_what_to_write(self):
        with pytest.raises(ConfigError, match=r'put it in quotes: "\*"'):
            read("extra_config:\n  quotas:\n    *: 1\n")

    def test_more_tenants_than_metrics_can_bear(self):
        with pytest.raises(ValueError, match=r'1001 tenants, more than 1000: write "\*"'):
            quotas({f"salt {i}": 1 for i in range(1001)})


class TestShows:
    def test_names_and_never_a_salt(self):
        config = read(f'extra_config:\n  quotas:\n    {SALT}: 2Gi\n    b: {{host: 1, name: team-b}}\n    "*": 0\n')
        rows = {key: value for key, value, _ in config.describe()}
        assert rows["extra_config.quotas"] == f"{NAME}=2 GiB,team-b=1 GiB,*=0 GiB"
        assert SALT not in repr(config) + str(config.live.extra_config)

    def test_a_change_by_its_names(self):
        before, after = (read(f"extra_config: {{quotas: {{{SALT}: {size}}}}}") for size in (1, 2))
        assert differences(before, after) == (
            [f"extra_config.quotas: {NAME}=1 GiB -> {NAME}=2 GiB"],
            [],
        )

    def test_that_a_running_server_takes_a_change(self):
        assert is_live("extra_config.quotas")

    def test_a_value_that_is_shadowed_without_its_salt(self):
        config = read(
            f"extra_config: {{quotas: {{{SALT}: 1}}}}",
            LMCACHE_EXTRA_CONFIG=json.dumps({"quotas": {SALT + "2": "2Gi"}}),
        )
        assert any("is shadowed by" in note for note in config.notes)
        assert SALT not in "".join(config.notes)

    def test_a_note_where_a_quota_limits_nothing_or_all_promise_too_much(self):
        notes = "\n".join(read(f"max_local_cpu_size: 2\nextra_config: {{quotas: {{{SALT}: 2, b: 1, '*': 1}}}}").notes)
        assert f"extra_config.quotas: {NAME}=2 GiB limits nothing: it is not less than max_local_cpu_size" in notes
        assert "3 GiB for all named tenants is more than max_local_cpu_size of 2 GiB" in notes
        assert "quotas" not in "\n".join(read("max_local_cpu_size: 4\nextra_config: {quotas: {a: 2, b: 1}}").notes)
