"""Options of mooncakestore://, in LMCache's file, in the URL and in Mooncake's own file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError, StoreUnavailable
from lmcache_ext.stores.mooncake_options import MooncakeOptions, parse_options
from lmcache_ext.stores.options import store_options
from lmcache_ext.stores.registry import open_store

URL = "mooncakestore://127.0.0.1:50051/"
OF_LMCACHE = {
    "local_hostname": "engine-1",
    "metadata_server": "http://10.0.0.1:8080/metadata",
    "protocol": "RDMA",
    "device_name": "mlx5_0",
    "master_server_address": "10.0.0.1:50051",
    "global_segment_size": 3355443200,
    "local_buffer_size": "1GB",
    "transfer_timeout": 1,
    "storage_root_dir": "/ssd",
    "mooncake_prefer_local_alloc": True,
    "mooncake_tenant_id": "blue",
    "mooncake_replica_num": 2,
}


def options_of(tmp_path: Path, extra: dict, environ: dict | None = None, url: str = URL) -> MooncakeOptions:
    path = tmp_path / "lmcache_config.yaml"
    path.write_text(json.dumps({"remote_url": url, "extra_config": extra}))
    config = load_config(path=str(path), environ=environ or {})
    assert config.notes == ()
    assert config.live.remote_url is not None
    return parse_options(url, store_options(config.live.remote_url, config))


def test_every_option_of_lmcache_has_its_effect(tmp_path):
    assert options_of(tmp_path, OF_LMCACHE) == MooncakeOptions(
        master_server_address="127.0.0.1:50051",  # the URL wins, as LMCache has it
        local_hostname="engine-1",
        metadata_server="http://10.0.0.1:8080/metadata",
        protocol="rdma",
        device_name="mlx5_0",
        global_segment_bytes=3355443200,
        local_buffer_bytes=1024**3,
        prefer_local_alloc=True,
        num_replicas=2,
        ssd_offload_path="/ssd",
        enable_ssd_offload=True,
        tenant_id="blue",
        timeout_s=1.0,
    )


def test_none_is_required(tmp_path):
    options = options_of(tmp_path, {})
    assert options == MooncakeOptions(master_server_address="127.0.0.1:50051")
    assert options.metadata_server == "P2PHANDSHAKE"
    assert options.own_address() == "127.0.0.1"


def test_the_lmcache_file_wins_over_mooncakes_own(tmp_path):
    own = tmp_path / "mooncake.json"
    written = {"local_hostname": "own", "global_segment_size": "2gb", "protocol": "tcp", "device_name": "", "more": 1}
    own.write_text(json.dumps({**written, "master_server_address": "elsewhere:1"}))
    options = options_of(tmp_path, {"local_hostname": "engine"}, {"MOONCAKE_CONFIG_PATH": str(own)})
    assert (options.local_hostname, options.global_segment_bytes) == ("engine", 2 * 1024**3)
    assert options.master_server_address == "127.0.0.1:50051"


def test_the_url_names_the_device_too(tmp_path):
    options = options_of(tmp_path, {"device_name": "mlx5_0"}, url=f"{URL}?device=mlx5_1&protocol=rdma")
    assert (options.device_name, options.protocol) == ("mlx5_1", "rdma")


def test_the_clients_own_timeouts_follow_ours():
    environment = MooncakeOptions("h:1", timeout_s=1.5).environment()
    assert environment["MC_RPC_TIMEOUT_MS"] == "1500"
    assert environment["MC_TCP_STATUS_TIMEOUT_SEC"] == "2"
    assert environment["MC_TCP_PROGRESS_TIMEOUT_SEC"] == "1"
    assert MooncakeOptions("h:1", stall_timeout_s=1.5).environment()["MC_TCP_PROGRESS_TIMEOUT_SEC"] == "2"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"global_segment_size": "lots"}, r"extra_config.global_segment_size: 'lots' is not a size: write bytes"),
        ({"local_buffer_size": -1}, r"extra_config.local_buffer_size: -1 is not a size"),
        ({"transfer_timeout": 0}, r"extra_config.transfer_timeout: 0 is out of range"),
        ({"mooncake_prefer_local_alloc": "perhaps"}, r"extra_config.mooncake_prefer_local_alloc: .* not a yes or a no"),
    ],
)
def test_a_bad_value_names_its_key_and_its_file(tmp_path, extra, message):
    with pytest.raises(ConfigError, match=message) as caught:
        options_of(tmp_path, extra)
    assert "lmcache_config.yaml:1" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"global_segment_size": "lots"}', "mooncake.json: global_segment_size: 'lots' is not a size"),
        ("[]", "mooncake.json: list, expected a JSON object"),
        ("{", "mooncake.json: Expecting property name"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_of_mooncakes_is_named(tmp_path, content, message):
    own = tmp_path / "mooncake.json"
    if content is not None:
        own.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_options(URL, {"config_path": str(own)})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mooncakestore://h:1/?colour=red", "unknown option 'colour'"),
        ("mooncakestore://h/", "expected the master as mooncakestore://host:50051/"),
    ],
)
def test_a_bad_url_is_refused(url, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(url, {})


def test_a_master_without_a_route_is_unavailable():
    with pytest.raises(StoreUnavailable, match=r"no route to the master nowhere\.invalid:1"):
        parse_options("mooncakestore://nowhere.invalid:1/", {}).own_address()


def test_a_missing_package_is_one_line_that_names_the_command(monkeypatch):
    def import_module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'mooncake'", name="mooncake")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ConfigError, match=r"^mooncakestore:// needs a package: pip install mooncake-transfer-engine"):
        open_store(URL)
