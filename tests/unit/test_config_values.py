"""Single values: what people write for sizes, yes and no, and numbers; and anything at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_ext.config import Config, load_config
from lmcache_ext.config_values import GIB, boolean, size_bytes, whole
from lmcache_ext.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (2.0, 2 * GIB),
        (20, 20 * GIB),
        ("20", 20 * GIB),
        ("'20'", 20 * GIB),
        ("0.5", GIB // 2),
        (".5", GIB // 2),
        ("+1", GIB),
        ("20Gi", 20 * GIB),
        ("20 GiB", 20 * GIB),
        ("500Mi", 500 * 1024**2),
        ("64Ki", 64 * 1024),
        ("1Ti", 1024**4),
        ("20GB", 20 * 10**9),
        ("5G", 5 * 10**9),
        ("500M", 500 * 10**6),
        ("7k", 7000),
        ("1e9B", 10**9),
        ("4096b", 4096),
        ("1.5e1", 15 * GIB),
        (0, 0),
        (1e-30, 0),
    ],
)
def test_sizes(written, size):
    assert size_bytes(written) == size


@pytest.mark.parametrize(
    "written",
    [
        *("", "-1", "abc", "5 apples", "1e9", "nan", "inf", "1,5", "500m", "1_000", "1e400B", "0x10", "٣Gi", "Gi"),
        *(-1, 21474836480, float("nan"), float("inf"), True, [1], {"a": 1}, "9" * 10_000),
    ],
)
def test_sizes_that_are_none(written):
    with pytest.raises(ValueError, match=r'write 2\.0|write "20Gi"'):
        size_bytes(written)


@pytest.mark.parametrize("written", [True, 1, "true", "True", "TRUE", "yes", "On", "1", "'yes'", " true "])
def test_booleans_that_are_true(written):
    assert boolean(written) is True


@pytest.mark.parametrize("written", [False, 0, "false", "False", "no", "OFF", "0", '"no"'])
def test_booleans_that_are_false(written):
    assert boolean(written) is False


@pytest.mark.parametrize("written", ["tru", "", "y", 2, -1, 1.0, "enabled", None, [], "none"])
def test_booleans_that_are_none(written):
    with pytest.raises(ValueError, match=r"write true or false|has no value"):
        boolean(written)


@pytest.mark.parametrize(("written", "value"), [(256, 256), ("256", 256), ("'256'", 256), (256.0, 256), ("+7", 7)])
def test_whole_numbers(written, value):
    assert whole(1)(written) == value


@pytest.mark.parametrize("written", [256.5, "256.5", True, "1_0", "", "٣", 0, -1, None, [1], float("inf"), "9" * 30])
def test_whole_numbers_that_are_none(written):
    with pytest.raises(ValueError, match=r"write|has no value"):
        whole(1)(written)


# --- anything at all ---

LINES = st.text("abchunk_size:local{}[]'\"#&*!|>-?\n\t 0123456789.,%@`\x00é", max_size=60)


def outcome(**sources) -> Config | ConfigError:
    try:
        return load_config(**sources)
    except ConfigError as error:
        return error


def one_line(result: Config | ConfigError) -> bool:
    messages = result.notes if isinstance(result, Config) else [str(result)]
    return not any("\n" in message for message in messages)


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=80), LINES.map(str.encode)))
def test_no_file_raises_anything_but_a_config_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    result = outcome(path=str(path), environ={})
    assert one_line(result)
    assert isinstance(result, Config) or str(result).startswith(str(path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [
        *("chunk_size", "local_cpu", "max_local_cpu_size", "local_disk", "remote_url", "extra_config"),
        *("local_device", "blend_recompute_ratio", "controller_pull_url", "cache_policy", "lmcache_instance_id"),
        *("p2p_init_ports", "max_local_cache_size", "unknown"),
    ]
)


@settings(max_examples=200, deadline=None)
@given(extra=st.dictionaries(NAMES.map("lmcache.".__add__), VALUES, max_size=3))
def test_no_value_raises_anything_but_a_config_error(extra):
    result = outcome(environ={}, connector_extra=extra)
    assert one_line(result)
    assert repr(result)


@settings(max_examples=100, deadline=None)
@given(name=NAMES, value=st.text(max_size=30))
def test_no_variable_raises_anything_but_a_config_error(name, value):
    variable = f"LMCACHE_{name.upper()}"
    result = outcome(environ={variable: value})
    assert one_line(result)
    assert isinstance(result, Config) or str(result).startswith(f"{variable}: ")
