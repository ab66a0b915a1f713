"""Peers: a real server of one engine's rows, a real controller, and the store that another engine reads them with."""

from __future__ import annotations

import errno
import os
import random
import socket
from contextlib import closing

import numpy as np
import pytest

from lmcache_ext import frame
from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError, StoreError
from lmcache_ext.offload.announcer import _peer_urls
from lmcache_ext.offload.chunk_io import ChunkIO
from lmcache_ext.offload.holdings import Holdings
from lmcache_ext.offload.peer_rows import PeerRows
from lmcache_ext.serde.naive import NaiveSerde
from lmcache_ext.stores import peer_server
from lmcache_ext.stores.controller import door
from lmcache_ext.stores.lmserver import LMServerStore, Settings
from lmcache_ext.stores.lmserver_socket import Address
from lmcache_ext.stores.peer import PeerStore
from lmcache_ext.stores.peer_server import PeerServer
from lmcache_ext.wire import v2
from tests.controllers import RunningController, Talker
from tests.servers import free_port, has_ipv6, until
from tests.unit.test_tier import key

NAMESPACE = b"n" * 16
NUM_ROWS, ROW_BYTES = 8, 4096


class Neighbour:
    """An engine as its peers see it: rows, holdings, a server, and what the controller is told of it."""

    def __init__(self, controller=None, name="neighbour", *, token_file=None, host="127.0.0.1", peer_url=None):
        self.rows = np.frombuffer(random.Random(name).randbytes(NUM_ROWS * ROW_BYTES), np.uint8).copy()
        self.rows = self.rows.reshape(NUM_ROWS, ROW_BYTES)
        self.holdings = Holdings(lambda: None)
        self.pull = None
        self.port = free_port()
        self.server = PeerServer(
            host,
            [self.port],
            lambda: PeerRows(self.rows.data, self.holdings, NAMESPACE),
            token_file=token_file,
            max_bytes=ROW_BYTES + frame.FRAME_BYTES,
        ).open()
        if controller is not None:
            said = {"instance": name, "boot": os.urandom(4).hex(), "namespace": NAMESPACE.hex()}
            said |= {"peer_url": peer_url or str(Address(host, self.port)), "lookup_url": "127.0.0.1:1"}
            with closing(Talker(controller.ports["reply"])) as talker:
                session = talker.say("register", **said)["session"]
            self.pull = Talker(controller.ports["pull"])
            self.pull.say("attach", session=session)
            self.pull.say("begin_sync", number=1)
            self.pull.say("end_sync", number=2, total=0)
            self.number = 2

    def close(self):
        self.server.close()
        if self.pull is not None:
            self.pull.close()

    def hold(self, number, row, *, told=True):
        self.holdings.add([(key(number), row)], None)
        if told:
            self.number += 1
            assert self.pull.say("keys", (bytes(key(number)),), number=self.number, added=1)["ok"]


@pytest.fixture
def controller():
    with RunningController() as running:
        yield running


@pytest.fixture
def neighbour(controller):
    made = Neighbour(controller)
    yield made
    made.close()


@pytest.fixture
def store(controller):
    made = open_store(controller)
    yield made
    made.close()


def open_store(controller, token_file=None):
    place = door(controller.url("reply"), token_file)
    return PeerStore(place, instance="me", worker=0, lookup_timeout_s=2.0, timeout_s=2.0)


def fetch(store, *numbers):
    """Which chunks come, and their bytes, as a tier asks for them."""
    io = ChunkIO(store, NaiveSerde(), NAMESPACE)
    rows = [memoryview(bytearray(ROW_BYTES)) for _ in numbers]
    keys = [bytes(key(number)) for number in numbers]
    present = io.present(keys)
    good = io.fetch(keys, rows)
    return present, [bytes(row) if is_good else None for row, is_good in zip(rows, good, strict=True)]


def test_chunks_of_a_peer_come_whole(neighbour, store):
    neighbour.hold(1, 3)
    neighbour.hold(2, 5)
    present, rows = fetch(store, 1, 2, 9)
    assert present == [True, True, False]
    assert rows == [neighbour.rows[3].tobytes(), neighbour.rows[5].tobytes(), None]
    assert store.ping() > 0


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("told", ["::1", "[::1]"])
def test_a_peer_is_reached_over_ipv6(controller, store, told):
    settings = "enable_controller: true\ncontroller_pull_url: localhost:1\ncontroller_reply_url: localhost:1\n"
    settings += f"enable_p2p: true\np2p_host: '{told}'\np2p_init_ports: 8200\n"
    peer = load_config(path="lmcache_config.yaml", content=settings, environ={}).peer
    assert _peer_urls(peer, 0) == {"peer_url": "[::1]:8200"}
    neighbour = Neighbour(controller, host=peer.host)
    neighbour.hold(1, 3)
    assert fetch(store, 1)[1] == [neighbour.rows[3].tobytes()]
    neighbour.close()


def test_each_chunk_comes_from_the_peer_that_has_it(controller, neighbour, store):
    other = Neighbour(controller, "other")
    neighbour.hold(1, 0)
    other.hold(2, 0)
    assert fetch(store, 1, 2)[1] == [neighbour.rows[0].tobytes(), other.rows[0].tobytes()]
    other.close()


def test_what_the_peer_has_evicted_meanwhile_is_a_miss(neighbour, store):
    neighbour.hold(1, 0)
    neighbour.holdings.remove([key(1)])
    assert fetch(store, 1) == ([True], [None])


def test_a_peer_that_is_gone_is_a_miss_and_then_not_asked_for_a_while(neighbour, store):
    neighbour.hold(1, 0)
    neighbour.server.close()
    assert fetch(store, 1) == ([True], [None])
    assert fetch(store, 1) == ([False], [None])


def test_a_peer_that_hangs_is_a_miss_within_the_deadline(controller):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        liar = Neighbour(controller, "liar", peer_url=f"127.0.0.1:{silent.getsockname()[1]}")
        liar.hold(1, 0)
        place = door(controller.url("reply"), None)
        store = PeerStore(place, instance="me", worker=0, lookup_timeout_s=1.0, timeout_s=0.3)
        assert fetch(store, 1) == ([True], [None])
        store.close()
        liar.close()


@pytest.mark.parametrize("url", ["nowhere", "localhost:0", "a,b:1", "http://x:1", "127.0.0.1:1/path?x=1"])
def test_an_address_that_is_none_is_a_miss(controller, store, url):
    liar = Neighbour(controller, "liar", peer_url=url)
    liar.hold(1, 0)
    assert fetch(store, 1)[1] == [None]
    liar.close()


def test_a_peer_that_sends_other_bytes_is_found_out(controller, store):
    liar = Neighbour(controller, "liar")
    liar.server.close()

    class Swapped(PeerRows):
        def get(self, wanted):
            head, payload = super().get(wanted)
            self._room[7] ^= 1
            return head, payload

    liar.server = PeerServer(
        "127.0.0.1",
        [liar.port],
        lambda: Swapped(liar.rows.data, liar.holdings, NAMESPACE),
        token_file=None,
        max_bytes=2 * ROW_BYTES,
    ).open()
    liar.hold(1, 0)
    assert fetch(store, 1) == ([True], [None])
    liar.close()


def test_this_engine_is_not_its_own_peer(controller, store):
    me = Neighbour(controller, "me")
    me.hold(1, 0)
    assert fetch(store, 1) == ([False], [None])
    me.close()


def test_a_controller_that_is_away_is_a_failure_and_one_that_is_back_is_asked_again(controller, store):
    assert store.exists([NAMESPACE + key(1)]) == [False]
    controller.stop()
    with pytest.raises(StoreError):
        store.exists([NAMESPACE + key(1)])
    controller.start()
    assert store.exists([NAMESPACE + key(1)]) == [False]


def test_nothing_is_written_to_peers(store):
    with pytest.raises(StoreError, match="not written"):
        store.put(NAMESPACE + key(1), [memoryview(b"x")])
    store.delete([NAMESPACE + key(1)])


def test_the_token_of_the_controller_is_that_of_peers(tmp_path):
    (tmp_path / "token").write_text("secret")
    token_file = str(tmp_path / "token")
    with RunningController(token_file=None) as controller:
        neighbour = Neighbour(controller, token_file=token_file)
        neighbour.hold(1, 0)
        for file, expected in ((None, None), (token_file, neighbour.rows[0].tobytes())):
            store = open_store(controller, file)
            assert fetch(store, 1)[1] == [expected]
            store.close()
        neighbour.close()


def test_an_emptied_token_file_opens_no_memory(tmp_path):
    (tmp_path / "token").write_text("")
    with RunningController(token_file=None) as controller:
        neighbour = Neighbour(controller, token_file=str(tmp_path / "token"))
        neighbour.hold(1, 0)
        store = open_store(controller)
        assert fetch(store, 1)[1] == [None]
        store.close()
        neighbour.close()


@pytest.mark.parametrize(
    ("host", "token_file", "warns"), [("127.0.0.1", None, 0), ("0.0.0.0", None, 1), ("0.0.0.0", "t", 0)]
)
def test_memory_that_anybody_may_read_is_warned_of(caplog, host, token_file, warns):
    PeerServer(host, [free_port()], lambda: None, token_file=token_file, max_bytes=1).open().close()
    assert [record.levelname for record in caplog.records if "controller_token_file" in record.message] == [
        "WARNING"
    ] * warns


class TestServer:
    @pytest.fixture
    def alone(self):
        made = Neighbour()
        yield made
        made.close()

    def test_speaks_the_protocol_of_the_cache_server(self, alone):
        alone.hold(1, 2, told=False)
        client = LMServerStore(Address("127.0.0.1", alone.port), Settings(timeout_s=2.0))
        name = NAMESPACE + key(1)
        room = memoryview(bytearray(frame.FRAME_BYTES + ROW_BYTES))
        assert client.exists([name, NAMESPACE + key(2), b"m" * 16 + key(1)]) == [True, False, False]
        assert client.get_into(name, [room]) == room.nbytes
        assert bytes(room[frame.FRAME_BYTES :]) == alone.rows[2].tobytes()
        assert client.get_into(name, [room[:10]]) == room.nbytes
        assert client.get_into(b"m" * 16 + key(1), [room]) is None
        assert client.ping() > 0
        with pytest.raises(StoreError):
            client.delete([name])
        with pytest.raises(StoreError):
            client.put(name, [memoryview(b"x" * 100)])
        assert client.exists([name]) == [True]
        client.close()

    def test_survives_nonsense(self, alone):
        alone.hold(1, 2, told=False)
        for seed in range(30):
            with socket.create_connection(("127.0.0.1", alone.port)) as sock:
                sock.settimeout(5.0)
                sock.sendall(random.Random(seed).randbytes(300))
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1000):
                    pass
        client = LMServerStore(Address("127.0.0.1", alone.port), Settings(timeout_s=2.0))
        assert client.exists([NAMESPACE + key(1)]) == [True]
        client.close()
        until(lambda: not alone.server._open, "their threads have ended")

    @pytest.mark.parametrize("said", [b"", v2.hello_request().encode()])
    def test_waits_for_a_token_no_longer_than_for_a_greeting(self, tmp_path, monkeypatch, said):
        monkeypatch.setattr("lmcache_ext.stores.peer_server.HELLO_S", 0.2)
        (tmp_path / "token").write_text("secret")
        with closing(Neighbour(token_file=str(tmp_path / "token"))) as alone:
            with socket.create_connection(("127.0.0.1", alone.port), 10.0) as sock:
                sock.sendall(said)
                while sock.recv(4096):
                    pass
            until(lambda: not alone.server._open, "its place is free")

    def test_goes_on_where_a_connection_could_not_be_accepted(self, monkeypatch, caplog):
        failures = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ECONNABORTED, "aborted")]

        class Listener(socket.socket):
            def accept(self):
                if failures:
                    raise failures.pop()
                return super().accept()

        monkeypatch.setattr(peer_server, "RETRY_S", 0.01)
        listen = peer_server._listen
        monkeypatch.setattr(peer_server, "_listen", lambda *place: Listener(fileno=listen(*place).detach()))
        with closing(Neighbour()) as alone:
            address = Address("127.0.0.1", alone.port)
            alone.hold(1, 2, told=False)
            with closing(LMServerStore(address, Settings(num_connections=1), name="peer")) as store:
                assert store.exists([NAMESPACE + key(1)]) == [True]
        assert [record.message for record in caplog.records if "could not be accepted" in record.message]
        assert alone.server.counters["failed"] == 2

    def test_a_port_that_is_taken_names_the_keys(self, alone):
        with pytest.raises(ConfigError, match=r"p2p_init_ports.*cannot listen on 127\.0\.0\.1"):
            PeerServer("127.0.0.1", [alone.port], lambda: None, token_file=None, max_bytes=1).open()

    def test_reads_no_row_once_it_is_closed(self, alone):
        alone.hold(1, 2, told=False)
        client = LMServerStore(Address("127.0.0.1", alone.port), Settings(timeout_s=2.0))
        assert client.exists([NAMESPACE + key(1)]) == [True]
        alone.close()
        assert not alone.server._open
        with pytest.raises(StoreError):
            client.exists([NAMESPACE + key(1)])
        client.close()

    def test_a_row_that_is_given_away_while_it_is_read_is_a_miss(self, alone):
        """Also where the same chunk is back in the same row when the copy is done: other bytes were there meanwhile."""

        class Evicting(Holdings):
            times = 0

            def place(self, name):
                found = super().place(name)
                self.times += 1
                if self.times == 1:
                    self.remove([key(1)])
                    self.add([(key(1), 0)], None)
                return found

        holdings = Evicting(lambda: None)
        holdings.add([(key(1), 0)], None)
        rows = PeerRows(alone.rows.data, holdings, NAMESPACE)
        assert rows.get(NAMESPACE + key(1)) is None
        assert rows.get(NAMESPACE + key(1)) is not None
