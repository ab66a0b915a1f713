"""The controller over real sockets: its HTTP, its protocol with engines, what nonsense gets, its command line."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import zmq

from lmcache_ext.daemons.controller_args import parse
from lmcache_ext.wire import controller as wire
from lmcache_ext.wire.stream import WireError
from tests.controllers import Clock, RunningController, Talker
from tests.servers import free_port, until

SPACE = "ab" * 16
KEYS = [bytes([number]) * 36 for number in range(6)]
CBOR = {
    # vLLM 0.32, --prefix-caching-hash-algo sha256_cbor, no PYTHONHASHSEED
    "algorithm": "sha256_cbor",
    "tokens_per_hash": 4,
    "hashes_per_chunk": 2,
}

LMCACHE_SPEAKS = "read ZeroMQ's greeting: LMCache's workers and controllers speak it, and no engine or controller here"


@pytest.fixture
def controller():
    with RunningController() as running:
        yield running


class Joined:
    """An engine that has registered and told what it holds."""

    def __init__(self, controller, instance="one", keys=(), **fields):
        self.reply = Talker(controller.ports["reply"])
        said = {"instance": instance, "boot": os.urandom(4).hex(), "namespace": SPACE, "chunk_tokens": 8, **fields}
        self.session = self.reply.say("register", **said)["session"]
        self.pull = Talker(controller.ports["pull"])
        self.number = 0
        assert self.pull.say("attach", session=self.session)["ok"]
        assert self.tell("begin_sync")
        assert self.tell("keys", keys, added=len(keys))
        assert self.tell("end_sync", total=len(keys))
        controller.kept.append(self)  # a socket that nobody holds is closed

    def tell(self, op, keys=(), **fields):
        self.number += 1
        return self.pull.say(op, tuple(keys), number=self.number, **fields)["ok"]

    def close(self):
        self.pull.close()
        self.reply.close()


# --- HTTP --------------------------------------------------------------------------------------


def test_health_metrics_and_an_index(controller):
    assert controller.get("/health").json() == {"status": "ok"}
    text = controller.get("/metrics").text
    assert "lmcache_controller_registered_workers 0" in text
    assert "POST /lookup" in controller.get("/").json()["paths"]
    assert controller.get("/nowhere").status_code == 404
    assert controller.get("/lookup").status_code == 405


def test_workers_and_keys_are_counted(controller):
    Joined(controller, "one", KEYS[:3], port=8500, peer_url="localhost:8200")
    Joined(controller, "two", KEYS[:1])
    one, two = sorted(controller.workers(), key=lambda worker: worker["instance_id"])
    assert (one["instance_id"], one["worker_id"], one["port"], one["ip"]) == ("one", 0, 8500, "127.0.0.1")
    assert (one["peer_init_url"], two["peer_init_url"]) == ("localhost:8200", None)
    assert (one["key_count"], one["in_step"]) == (3, True)
    stats = controller.get("/controller/key-stats").json()
    assert (stats["total_key_count"], stats["total_instance_count"], stats["total_worker_count"]) == (4, 2, 2)
    assert {"instance_id": "one", "key_count": 3, "worker_count": 1} in stats["instances"]
    info = controller.post("/query_worker_info", {"instance_id": "two"}).json()
    assert [one["instance_id"] for one in info["worker_infos"]] == ["two"]
    assert controller.post("/query_instance", {"event_id": "e", "ip": "127.0.0.1"}).json()["res"] in ("one", "two")
    assert controller.post("/query_instance", {"event_id": "e", "ip": "10.9.8.7"}).status_code == 404
    assert controller.post("/health", {"instance_id": "one"}).json()["error_codes"] == {"0": 0}
    assert controller.post("/health", {"instance_id": "six"}).status_code == 404


def test_lookup_by_hashes_names_the_longest_prefix_first(controller):
    Joined(controller, "one", KEYS[:1])
    Joined(controller, "two", KEYS[:3])
    asked = controller.post("/lookup", {"chunk_hashes": [key.hex() for key in KEYS]}).json()
    assert asked["layout_info"] == {"two": ["LocalCPUBackend", 24], "one": ["LocalCPUBackend", 8]}
    assert list(asked["layout_info"]) == ["two", "one"]
    elsewhere = {"chunk_hashes": [key.hex() for key in KEYS], "namespace": "00" * 16}
    assert controller.post("/lookup", elsewhere).json()["layout_info"] == {}


def test_lookup_by_tokens_hashes_as_vllm_does(controller):
    hashing = pytest.importorskip("vllm.utils.hashing")
    rng = random.Random(1)
    tokens = [rng.choice([3, 99, 300, 70_000, 2**20]) for _ in range(21)]
    for name in ("sha256_cbor", "sha256"):
        hash_fn = hashing.get_hash_fn_by_name(name)
        block_hash = none_hash = hash_fn("seed")
        keys = []
        for begin in range(0, 20, 4):
            block_hash = hash_fn((block_hash, tuple(tokens[begin : begin + 4]), None))
            keys.append(block_hash + bytes(4))
        said = {**CBOR, "algorithm": name, "none_hash": none_hash.hex()}
        said["probe"] = hash_fn((none_hash, (1, 2, 3), None)).hex()
        Joined(controller, name, keys[1:4:2], hashing=said, namespace=name.encode().hex())
        found = controller.post("/lookup", {"tokens": tokens}).json()["layout_info"]
        assert found[name] == ["LocalCPUBackend", 16]
        assert controller.post("/lookup", {"tokens": tokens[:9]}).json()["layout_info"][name][1] == 8
        assert name not in controller.post("/lookup", {"tokens": tokens[1:]}).json()["layout_info"]


def test_lookup_by_tokens_is_not_guessed_where_hashes_cannot_be_made(controller):
    assert controller.post("/lookup", {"tokens": [1, 2, 3]}).json()["layout_info"] == {}  # nobody is there
    Joined(controller, "one", KEYS[:1], hashing={**CBOR, "none_hash": "00" * 32, "probe": "11" * 32})
    refused = controller.post("/lookup", {"tokens": [1, 2, 3]})
    assert refused.status_code == 422
    assert "sha256_cbor" in refused.json()["detail"]


@pytest.mark.parametrize("algorithm", [[], {}, 5, None, "md5"])
def test_an_engine_that_says_nonsense_of_its_hashing_is_found_by_hashes(controller, algorithm):
    said = {**CBOR, "algorithm": algorithm, "none_hash": "00" * 32, "probe": "11" * 32}
    Joined(controller, "one", KEYS[:1], hashing=said)
    assert controller.post("/lookup", {"tokens": [1, 2, 3]}).status_code == 422
    found = controller.post("/lookup", {"chunk_hashes": [KEYS[0].hex()]}).json()["layout_info"]
    assert found == {"one": ["LocalCPUBackend", 8]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"text": "Explain the significance"}, "/tokenize"),
        ({"prompt": "Explain"}, "no tokenizer"),
        ({}, "chunk_hashes"),
        ({"tokens": [1, "2"]}, "whole numbers"),
        ({"tokens": [True]}, "whole numbers"),
        ({"tokens": [-1]}, "whole numbers"),
        ({"tokens": {"1": 2}}, "no list"),
        ({"chunk_hashes": ["zz"]}, "hexadecimal"),
        ({"chunk_hashes": [5]}, "hexadecimal"),
    ],
)
def test_lookup_says_what_it_needs(controller, body, said):
    refused = controller.post("/lookup", body)
    assert refused.status_code == 422
    assert said in refused.json()["detail"]


@pytest.mark.parametrize("path", ["/pin", "/compress", "/decompress", "/move"])
def test_what_no_engine_can_do_is_not_pretended(controller, path):
    refused = controller.post(path, {"instance_id": "one", "location": "LocalCPUBackend", "tokens": [1]})
    assert refused.status_code == 501
    assert refused.json()["detail"]


class TestClear:
    def test_tells_the_engine_and_counts_what_went(self, controller):
        joined = Joined(controller, "one", KEYS[:3])
        asked = {}

        def ask():
            asked["answer"] = controller.post("/clear", {"instance_id": "one", "location": "LocalCPUBackend"}).json()

        thread = threading.Thread(target=ask)
        thread.start()
        told = joined.pull.read()
        assert (told["op"], told["verb"]) == ("do", "clear")
        joined.pull.say("done", event=told["event"], chunks=3)
        thread.join(5.0)
        assert asked["answer"]["num_tokens"] == 24
        assert asked["answer"]["status"] == "finished"
        event = {"event_id": asked["answer"]["event_id"]}
        assert controller.post("/check_finish", event).json()["status"] == "finished"
        assert controller.post("/check_finish", {"event_id": "Clear0"}).status_code == 404

    def test_of_another_location_or_instance_is_refused(self, controller):
        joined = Joined(controller, "one")
        assert controller.post("/clear", {"instance_id": "one", "location": "LocalDiskBackend"}).status_code == 501
        assert controller.post("/clear", {"instance_id": "two"}).status_code == 404
        assert controller.post("/clear", {}).status_code == 422
        joined.close()
        until(lambda: not controller.workers()[0]["in_step"], "the engine is gone")
        assert controller.post("/clear", {"instance_id": "one"}).status_code == 503

    def test_needs_the_token_where_there_is_one(self, tmp_path):
        (tmp_path / "token").write_text("secret\n")
        with RunningController(token_file=str(tmp_path / "token")) as controller:
            stranger = Talker(controller.ports["reply"], hello=False)
            assert stranger.say("register", instance="x")["code"] == "token"
            assert Talker(controller.ports["pull"], token="wrong").hello["code"] == "token"
            assert Talker(controller.ports["pull"], token="secret").hello["ok"]
            assert controller.post("/clear", {"instance_id": "one"}).status_code == 401
            wrong = {"Authorization": "Bearer sécret".encode()}
            assert controller.post("/clear", {"instance_id": "one"}, headers=wrong).status_code == 401
            right = {"Authorization": "Bearer secret"}
            assert controller.post("/clear", {"instance_id": "one"}, headers=right).status_code == 404
            (tmp_path / "token").write_text("changed")
            assert controller.post("/clear", {"instance_id": "one"}, headers=right).status_code == 401

    def test_is_refused_on_an_open_port_without_a_token(self):
        with RunningController(host="0.0.0.0") as controller:
            Joined(controller, "one")
            refused = controller.post("/clear", {"instance_id": "one"})
            assert refused.status_code == 403
            assert "--auth-token-file" in refused.json()["detail"]
            assert controller.get("/controller/workers").status_code == 200


# --- engines -----------------------------------------------------------------------------------


def test_an_engine_that_breaks_off_holds_nothing_and_is_forgotten_after_a_while():
    clock = Clock()
    with RunningController(timeout_s=60.0, now=clock) as controller:
        joined = Joined(controller, "one", KEYS[:2])
        assert controller.num_keys() == 2
        joined.close()
        until(lambda: controller.num_keys() == 0, "its keys are gone")
        assert len(controller.workers()) == 1
        clock.advance(61.0)
        until(lambda: controller.workers() == [], "it is forgotten")


def test_an_engine_lives_by_its_heartbeats():
    clock = Clock()
    with RunningController(timeout_s=60.0, now=clock) as controller:
        joined, silent = Joined(controller, "one", KEYS[:2]), Joined(controller, "two", KEYS[:1])
        for _ in range(3):
            clock.advance(40.0)
            answer = joined.reply.say("heartbeat", session=joined.session)
            assert (answer["ok"], answer["sync"]) == (True, False)
        assert silent.pull.read() is None  # withdrawn, and the connection closed
        assert controller.num_keys() == 2
        clock.advance(61.0)
        assert joined.pull.read() is None
        assert Talker(controller.ports["reply"]).say("heartbeat", session=joined.session)["ok"] is False


def test_a_gap_asks_for_everything(controller):
    joined = Joined(controller, "one", KEYS[:2])
    joined.number += 1
    assert not joined.tell("keys", KEYS[2:3], added=1)
    assert joined.reply.say("heartbeat", session=joined.session)["sync"]
    assert controller.num_keys() == 0


def test_a_sync_of_more_than_it_says_is_counted_where_people_look(controller):
    joined = Joined(controller, "one")
    assert joined.tell("begin_sync")
    assert joined.tell("keys", KEYS[:2], added=2)
    assert not joined.tell("end_sync", total=1)
    assert "lmcache_controller_distrusted_syncs_total 1" in controller.get("/metrics").text


def test_a_second_engine_of_the_same_name_is_told_so(controller):
    Joined(controller, "one")
    refused = Talker(controller.ports["reply"]).say("register", instance="one", boot="other", namespace=SPACE)
    assert refused["code"] == "taken"
    assert "lmcache_instance_id" in refused["error"]


def test_ever_new_engines_are_refused_at_some_number_and_known_ones_are_not(controller, monkeypatch):
    monkeypatch.setattr("lmcache_ext.daemons.controller_link.MAX_ENGINES", 3)
    talker = Talker(controller.ports["reply"])
    said = [talker.say("register", instance=name, boot="b", namespace=SPACE) for name in "abcda"]
    assert ["session" in answer for answer in said] == [True, True, True, False, True]
    assert said[3]["code"] == "full"
    assert len(controller.workers()) == 3


@pytest.mark.parametrize("anywhere", ["0.0.0.0:8200", "[::]:8200"])
def test_an_engine_that_listens_everywhere_is_reached_where_it_came_from(controller, anywhere):
    joined = Joined(controller, "one", KEYS[:1], peer_url=anywhere)
    found = joined.reply.say("locate", KEYS[:1], namespace=SPACE, instance="two", worker=0)
    assert found["peers"][0][2] == "127.0.0.1:8200"


def test_peers_are_located_in_one_question(controller):
    Joined(controller, "one", KEYS[:2], peer_url="localhost:8200", lookup_url="localhost:8201")
    found = Talker(controller.ports["reply"]).say("locate", tuple(KEYS[:3]), namespace=SPACE, instance="two")
    assert (found["peers"], found["at"]) == ([["one", 0, "localhost:8200", "localhost:8201"]], [0, 0, -1])


def test_fields_of_a_later_version_are_skipped(controller):
    Joined(controller, "one", KEYS[:1], colour="blue", nested={"deep": [1, {"er": None}]})
    assert Talker(controller.ports["pull"]).say("dance", how="well")["code"] == "unknown"
    assert controller.num_keys() == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "register"},
        {"op": "register", "instance": 5, "boot": "b", "namespace": SPACE},
        {"op": "register", "instance": "x", "boot": "b", "namespace": "not hex"},
        {"op": "register", "instance": "x" * 1000, "boot": "b", "namespace": SPACE},
        {"op": "register", "instance": "x", "boot": "\ud800", "namespace": SPACE},
        {"op": "hello", "token": "\udfff"},
        {"op": "register", "instance": "x", "boot": "b", "namespace": SPACE, "worker": -1},
        {"op": "register", "instance": "x", "boot": "b", "namespace": SPACE, "tiers": "host"},
        {"op": "attach"},
        {"op": "attach", "session": []},
        {"op": "keys", "number": 1, "added": 7},
        {"op": "keys", "number": True, "added": 0},
        {"op": "end_sync", "number": 1},
        {"op": ["register"]},
        {"op": {}},
        {},
    ],
)
def test_a_message_that_makes_no_sense_is_answered_and_the_next_one_understood(controller, fields):
    talker = Talker(controller.ports["pull"])
    talker.sock.sendall(wire.encode({"id": 7, **fields}))
    answer = talker.read()
    assert answer["re"] == 7
    assert "error" in answer or answer["ok"] is False
    assert talker.say("heartbeat", session="nobody")["ok"] is False


def test_a_worker_of_lmcache_is_told_apart_at_once_and_named_once(controller, caplog):
    """It sends ten bytes and waits for an answer; closed, it comes back ten times a second."""
    with zmq.Context() as context, context.socket(zmq.REQ) as worker:
        worker.linger = 0
        watch = worker.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        worker.connect(f"tcp://{controller.url('reply')}")
        worker.send(b"register")
        for _ in range(3):
            assert watch.poll(5000), "the connection stays open"
            watch.recv_multipart()
        worker.disable_monitor()
    said = [record.message for record in caplog.records]
    assert said == [f"127.0.0.1: closed: {LMCACHE_SPEAKS}"]


def test_bytes_that_are_no_message_end_their_connection_and_no_other(controller):
    joined = Joined(controller, "one", KEYS[:1])
    good = wire.encode({"op": "hello"})
    rng = random.Random(5)
    for wrong in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"KVCC\x02\x00" + good[6:],
        b"KVCC\x01\x00\xff\xff\xff\xff\xff\xff",
        wire.encode({"op": "hello"})[:12] + b"{" * (len(good) - 12),
        good[:6] + (50_000).to_bytes(2, "little") + bytes(4) + b"[" * 50_000,
        *(rng.randbytes(200) for _ in range(20)),
    ):
        talker = Talker(controller.ports["pull"], hello=False)
        talker.sock.sendall(wrong)
        talker.sock.shutdown(socket.SHUT_WR)
        answer = talker.read()
        assert answer is None or answer["code"] == "malformed"
        talker.close()
    for wrong in (
        b"\r\n\r\n",
        b"GET /\r\n\r\n",
        b"POST /lookup HTTP/1.1\r\nContent-Length: 5\r\n\r\n[[[[[",
        rng.randbytes(99),
    ):
        with socket.create_connection(("127.0.0.1", controller.ports["http"])) as sock:
            sock.sendall(wrong + b"\r\n\r\n")
            assert sock.recv(100).startswith((b"HTTP/1.1 4", b""))
    assert controller.num_keys() == 1
    assert joined.reply.say("heartbeat", session=joined.session)["ok"]


def test_a_body_too_long_or_without_a_length_is_refused(controller):
    address = ("127.0.0.1", controller.ports["http"])
    for head, code in ((b"Content-Length: 99999999999", b"413"), (b"Transfer-Encoding: chunked", b"411")):
        with socket.create_connection(address) as sock:
            sock.sendall(b"POST /lookup HTTP/1.1\r\n" + head + b"\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 " + code)


class TestMessages:
    def test_are_these_bytes(self):
        assert wire.encode({"op": "x"}, b"yz") == b"KVCC\x01\x00\x0a\x00\x02\x00\x00\x00" + b'{"op":"x"}yz'

    def test_come_in_any_pieces(self):
        data = wire.encode({"id": 1}, b"body") + wire.encode({"id": 2})
        decoder, found = wire.MessageDecoder(), []
        for begin in range(len(data)):
            decoder.feed(data[begin : begin + 1])
            while (message := decoder.head()) is not None:
                found.append((message.fields["id"], message.body))
        assert found == [(1, b"body"), (2, b"")]
        assert decoder.buffered_bytes == 0

    def test_hold_no_more_than_they_may(self):
        with pytest.raises(ValueError, match="limits"):
            wire.encode({"text": "x" * 70_000})
        decoder = wire.MessageDecoder()
        decoder.feed(b"KVCC\x01\x00\x02\x00" + (2**21).to_bytes(4, "little") + b"{}")
        with pytest.raises(WireError, match="2097152"):
            decoder.head()


# --- the program -------------------------------------------------------------------------------


class TestArguments:
    def test_of_the_tutorial(self):
        words = ["--host", "localhost", "--port", "9000", "--monitor-ports", '{"pull": 8300, "reply": 8400}']
        found = parse(words, "lmcache_controller")
        assert (found.host, found.port, found.monitor_ports) == ("localhost", 9000, {"pull": 8300, "reply": 8400})
        assert found.lmcache_worker_timeout == 300

    @pytest.mark.parametrize(
        "words",
        [
            ["--monitor_ports", '{"pull": 1, "reply": 2, "heartbeat": 3}'],
            ['--monitor-ports=\'{"pull": 1, "reply": 2, "heartbeat": 3}\''],
            ['--monitor-ports="{pull: 1, reply: 2, heartbeat: 3}"'],
        ],
    )
    def test_as_people_write_them(self, words):
        found = parse(['--host="0.0.0.0"', "'--port'", "9001", *words], "lmcache_controller")
        assert (found.host, found.port) == ("0.0.0.0", 9001)
        assert found.monitor_ports == {"pull": 1, "reply": 2, "heartbeat": 3}

    def test_from_a_file_which_the_command_line_overrides(self, tmp_path):
        path = tmp_path / "controller.yaml"
        path.write_text(
            "host: 127.0.0.2\nport: 9005\nmonitor_ports:\n  pull: 1\n  reply: 2\nlmcache_worker_timeout: 9\n"
        )
        found = parse(["--config", str(path), "--port", "9006"], "lmcache_controller")
        assert (found.host, found.port, found.monitor_ports) == ("127.0.0.2", 9006, {"pull": 1, "reply": 2})
        assert found.lmcache_worker_timeout == 9.0

    def test_of_older_versions(self):
        assert parse(["--monitor-port", "9001"], "c").monitor_ports == {"pull": 9001}

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--monitor-prots", "{}"], "did you mean --monitor-port"),
            (["--lmcache-worker-timout", "5"], "did you mean --lmcache-worker-timeout?"),
            (["--monitor-ports", "8300"], "is not JSON such as"),
            (["--monitor-ports", '{"push": 1}'], "is not JSON such as"),
            (["--monitor-ports", '{"pull": 99999}'], "is not a port"),
            (["--port", "8300"], "share a port"),
            (["--config", "/nowhere.yaml"], "No such file"),
            (["--lmcache-worker-timeout", "-3"], "number of seconds"),
        ],
    )
    def test_that_cannot_be_honoured_are_one_line(self, capsys, words, said):
        with pytest.raises(SystemExit) as ended:
            parse(words, "lmcache_controller")
        lines = capsys.readouterr().err.splitlines()
        assert (ended.value.code, len(lines)) == (2, 1)
        assert said in lines[0]


def test_the_program_serves_until_sigterm_and_warns_on_an_open_port(tmp_path):
    ports = {name: free_port() for name in ("http", "pull", "reply", "heartbeat")}
    monitors = json.dumps({name: ports[name] for name in ("pull", "reply", "heartbeat")})
    command = ["controller", "--host", "0.0.0.0", "--port", str(ports["http"]), "--monitor-ports", monitors]
    process = subprocess.Popen([sys.executable, "-m", "lmcache_ext.cli", *command], stderr=subprocess.PIPE, text=True)
    try:
        for name in ("pull", "reply", "heartbeat"):
            until(lambda: _answers(ports["http"]), "it is up")
            assert Talker(ports[name]).hello["ok"]
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10.0)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "asks for no token" in said
    assert said.rstrip().endswith("stopped")


def test_a_port_that_is_taken_is_one_line(controller):
    command = ["-m", "lmcache_ext.daemons.controller", "--port", str(controller.ports["http"])]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "cannot listen on localhost" in ended.stderr


def _answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False
