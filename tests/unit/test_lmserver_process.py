"""The cache server as a process: what survives, how it stops, tokens, numbers, its command line."""

from __future__ import annotations

import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lmcache_ext.daemons.lmserver import main
from lmcache_ext.errors import StoreError, StoreUnavailable
from lmcache_ext.stores.disk_scan import list_files
from lmcache_ext.stores.lmserver import LMServerStore, Settings, open_lm
from lmcache_ext.wire import v2
from tests.contracts.store_contract import get, key_of, views
from tests.lm_servers import PATIENT, OldClient, ServerProcess, serving
from tests.servers import has_ipv6

MIB = 1024**2
KEY = "meta-llama/Llama-3.1-8B-Instruct@1@0@1a2b@bfloat16"


# -- what survives


def test_a_data_directory_survives_kill_9_and_serves_whole_objects_only(tmp_path: Path) -> None:
    options = ["--max-bytes", "64Mi", "--data-dir", str(tmp_path), "--max-disk-bytes", "256Mi"]
    server = ServerProcess(*options)
    store = server.store()
    acknowledged: list[int] = []

    def write(index: int) -> None:
        try:
            for turn in range(index * 1000, index * 1000 + 1000):
                store.put(key_of(str(turn)), views(struct.pack("<I", turn) * (MIB // 4)))
                acknowledged.append(turn)
        except StoreError:
            return

    threads = [threading.Thread(target=write, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    while len(acknowledged) < 30:
        time.sleep(0.005)
    server.kill()
    for thread in threads:
        thread.join()
    store.close()
    with serving(*options) as server:
        store = server.store()
        for turn in acknowledged[:100]:
            assert get(store, key_of(str(turn)), MIB) == struct.pack("<I", turn) * (MIB // 4)
        with server.dial() as client:
            names = client.list().split()
            assert len(names) >= min(len(acknowledged), 100)
            for name in names[:60]:
                reply, data = client.get(name)
                assert reply[:2] == (200, MIB)
                assert data == data[:4] * (MIB // 4)
        store.close()


@pytest.mark.e2e
def test_killed_again_and_again_it_loses_no_acknowledged_object_and_serves_none_torn(tmp_path: Path) -> None:
    """Ten kills at any moment, keys overwritten all the time: the last acknowledged version is read, or a later one."""
    options = ["--max-bytes", "64Mi", "--data-dir", str(tmp_path), "--max-disk-bytes", "512Mi"]
    rng = random.Random(3)
    acknowledged = [0] * 12
    begun = [0] * 12
    for _ in range(10):
        server = ServerProcess(*options)
        store = server.store()
        num_bytes = [MIB * (1 + index % 3) + 64 * index for index in range(12)]
        for index in range(12):
            data = get(store, key_of(str(index)), num_bytes[index])
            version = 0 if data is None else struct.unpack_from("<I", data)[0]
            assert acknowledged[index] <= version <= begun[index]
            assert data is None or data == struct.pack("<I", version) * (num_bytes[index] // 4)

        def write(share: int, store: LMServerStore = store, num_bytes: list[int] = num_bytes) -> None:
            for turn in range(10_000):
                index = share * 4 + turn % 4
                begun[index] += 1
                data = struct.pack("<I", begun[index]) * (num_bytes[index] // 4)
                try:
                    store.put(key_of(str(index)), views(data))
                except StoreError:
                    return
                acknowledged[index] = begun[index]

        threads = [threading.Thread(target=write, args=(share,)) for share in range(3)]
        for thread in threads:
            thread.start()
        threads[0].join(rng.uniform(0.05, 0.8))
        server.kill()
        for thread in threads:
            thread.join()
        store.close()
    assert min(acknowledged) > 0


def test_an_old_clients_metadata_survives_and_a_flipped_bit_is_a_miss(tmp_path: Path) -> None:
    with serving("--data-dir", str(tmp_path)) as server, server.dial() as client:
        client.put(KEY, b"x" * 5000)
        client.put("other@1@0@0@half", b"y" * 5000)
        assert client.exist(KEY)
        client.put("/模型@1@0@0@half", b"z" * 5000)
        assert client.exist("/模型@1@0@0@half")
    files = [Path(file.path) for file in list_files(str(tmp_path), None).objects]
    assert len(files) == 3
    for path in files:
        data = bytearray(path.read_bytes())
        if b"y" * 5000 in data:
            data[-1] ^= 1
            path.write_bytes(data)
    with serving("--data-dir", str(tmp_path)) as server, server.dial() as client:
        assert client.get(KEY) == ((200, 5000, 1, 3, 2, 32, 256, 1024, 0), b"x" * 5000)
        assert "/模型@1@0@0@half" in client.list().split("\n")
        assert client.get("/模型@1@0@0@half")[1] == b"z" * 5000
        assert client.exist("other@1@0@0@half")
        assert client.get("other@1@0@0@half")[0][0] == 400
        assert not client.exist("other@1@0@0@half")


def test_the_data_directory_is_bounded_and_larger_than_memory(tmp_path: Path) -> None:
    options = [
        "--max-bytes",
        "8Mi",
        "--max-object-bytes",
        "2Mi",
        "--data-dir",
        str(tmp_path),
        "--max-disk-bytes",
        "24Mi",
    ]
    with serving(*options) as server:
        store = server.store()
        for index in range(40):
            store.put(key_of(str(index)), views(bytes([index]) * MIB))
        found = [index for index in range(40) if get(store, key_of(str(index)), MIB) == bytes([index]) * MIB]
        assert 12 <= len(found) <= 24
        assert sum(file.num_bytes for file in list_files(str(tmp_path), None).objects) <= 24 * MIB
        store.delete([key_of(str(index)) for index in found])
        assert not any(store.exists([key_of(str(index)) for index in range(40)]))
        store.close()


def test_sigterm_lets_the_request_under_way_end() -> None:
    server = ServerProcess("--http-port", "0")
    http = server.wait_for(r"http://\S+/").rstrip("/").removesuffix("/metrics")
    busy, idle = server.dial(), server.dial()
    busy.change_over()
    busy.sock.sendall(v2.Request(v2.Op.PUT, 5, b"late", MIB).encode() + bytes(MIB // 2))
    idle.health()
    server.process.send_signal(signal.SIGTERM)
    assert idle.is_closed()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"{http}/healthz", timeout=5)
    busy.sock.sendall(bytes(MIB - MIB // 2))
    assert busy.reply_v2()[0] == v2.Reply(v2.Status.OK, 5)
    assert busy.is_closed()
    assert server.process.wait(10) == 0
    assert server.stop() == 0
    busy.sock.close()
    idle.sock.close()


# -- tokens


def test_a_token_is_asked_for_and_the_file_may_change(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret\n")
    with serving("--auth-token-file", str(path), "--read-timeout", "1") as server:
        good = server.store(Settings(token_file=str(path), lookup_timeout_s=5, connect_timeout_s=5))
        good.put(key_of("a"), views(b"x"))
        for settings in (PATIENT, Settings(token="wrong", lookup_timeout_s=5, connect_timeout_s=5)):
            with pytest.raises(StoreUnavailable, match="UNAUTHORIZED"):
                server.store(settings).exists([key_of("a")])
        with server.dial() as client:
            assert client.health()[0] == 200
            client.sock.sendall(client.frame(3, KEY))
            assert client.reply()[0] == 400
            assert client.is_closed()
        with server.dial() as client:
            client.change_over()
            assert client.exchange(v2.Op.GET, key_of("a"), argument=1)[0].status == v2.Status.UNAUTHORIZED
            assert client.is_closed()
        with server.dial() as client:
            assert client.is_closed(within_s=5)  # says nothing: not for long
        path.write_text("changed")
        assert get(good, key_of("a"), 1) == b"x"  # an open connection goes on
        again = server.store(Settings(token="changed", lookup_timeout_s=5, connect_timeout_s=5))
        assert again.exists([key_of("a")]) == [True]
        good.close()
        again.close()


# -- metrics and the command line


def test_metrics_and_health_answer_on_their_own_port() -> None:
    with serving("--http-port", "0", "--max-bytes", "32Mi") as server:
        url = server.wait_for(r"http://\S+/metrics")
        store = server.store()
        store.put(key_of("a"), views(b"x" * 1000))
        get(store, key_of("a"), 1000)
        get(store, key_of("b"), 1000)
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert rows['lmcache_server_requests_total{operation="put",outcome="ok"}'] == "1"
        assert rows['lmcache_server_requests_total{operation="get",outcome="hit"}'] == "1"
        assert rows['lmcache_server_requests_total{operation="get",outcome="miss"}'] == "1"
        assert rows["lmcache_server_capacity_bytes"] == str(32 * MIB)
        assert float(rows["lmcache_server_received_bytes_total"]) > 1000
        assert urllib.request.urlopen(url.replace("metrics", "healthz"), timeout=5).read() == b"ok\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url.replace("metrics", "else"), timeout=5)
        store.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["localhost"], "required: PORT"),
        (["localhost", "http"], "'http' is not a port"),
        (["localhost", "65536"], "'65536' is not a port"),
        (["no.such.host.invalid", "0"], "no.such.host.invalid: "),
        (["127.0.0.1", "0", "--max-bytes", "much"], "'much' is not a size"),
        (["127.0.0.1", "0", "--policy", "fifo"], "invalid choice"),
        (["127.0.0.1", "0", "--tls-cert", "/c"], "belong together"),
        (["127.0.0.1", "0", "--tls-cert", "/none", "--tls-key", "/none"], "No such file"),
        (["127.0.0.1", "0", "--auth-token-file", "/none"], "--auth-token-file: "),
        (["127.0.0.1", "0", "--auth-token-file", "/dev/null"], "--auth-token-file: /dev/null is empty"),
        (["127.0.0.1", "0", "--data-dir", "/dev/null/x"], "Not a directory"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments, prog="lmcache_server")
    except SystemExit as exited:
        code = exited.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_a_port_may_be_a_number_as_yaml_has_it_unquoted(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["127.0.0.1", taken.getsockname()[1]], prog="lmcache_experimental_server") == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_line_and_code_2() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    command = [sys.executable, "-m", "lmcache_ext.cli", "server", "127.0.0.1", str(port), "--max-bytes", "1Mi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 1
    assert f"lmcache-ext server: cannot listen on 127.0.0.1:{port}: Address already in use" in lines[0]
    taken.close()


def test_a_device_is_accepted_and_a_wide_address_without_token_warned_of() -> None:
    server = ServerProcess("cuda:0", host="0.0.0.0")
    assert "DEVICE cuda:0: objects rest in host memory" in server.log()
    assert "reachable from other machines and asks for no token" in server.log()
    assert server.stop() == 0


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_an_address_of_ipv6_may_stand_in_brackets_and_does_in_the_log() -> None:
    server = ServerProcess(host="[::1]")
    assert f"listening on [::1]:{server.port}" in server.log()
    store = open_lm(f"lm://[::1]:{server.port}", {})
    assert store.ping() > 0
    store.close()
    assert server.stop() == 0


def test_localhost_is_all_of_localhost_and_quiet() -> None:
    server = ServerProcess(host="localhost")
    assert "WARNING" not in server.log()
    with OldClient(server.port) as client:
        assert client.health()[0] == 200
    assert server.stop() == 0
