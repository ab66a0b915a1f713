"""What an engine tells the controller: a real connector's halves, real host memory, a real controller."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import pytest
import zmq
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import ReqContext

from lmcache_ext.config import Controller
from lmcache_ext.daemons import controller_api
from lmcache_ext.offload import announcer as announcer_module
from lmcache_ext.offload import holdings as holdings_module
from lmcache_ext.offload.announcer import Announcer
from lmcache_ext.offload.holdings import Holdings
from lmcache_ext.offload.lookups import ADAPTER_PARAM, far_key
from tests.controllers import RunningController
from tests.servers import free_port, until
from tests.unit.connector_engine import CHUNK, HASH_FN, PROMPT, Engine, make_vllm_config
from tests.unit.test_host import NUM_ROWS, make  # noqa: F401 - a fixture
from tests.unit.test_tier import key

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the copier of hosts without a GPU")
ENGINE = {"instance": "one", "worker": 0, "namespace": "ab" * 16, "chunk_tokens": 256}


@pytest.fixture
def controller():
    with RunningController() as running:
        yield running


@pytest.fixture
def said():
    """What the announcer logs; vLLM's loggers may not propagate to where pytest listens."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.lmcache_ext.offload.announcer")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def join():
    """Start telling a controller; `settings` are fields of the configuration's part."""
    made = []

    def start(controller, engine=ENGINE, **settings):
        urls = {"pull_url": controller.url("pull"), "reply_url": f"tcp://{controller.url('reply')}"}
        made.append(Announcer(Controller(enabled=True, **urls, **settings), engine).open())
        return made[-1]

    yield start
    for announcer in made:
        announcer.close()
        announcer._thread.join(10.0)
        assert not announcer._thread.is_alive()


def held_by(controller, *keys):
    """Which of these keys the controller knows to be held."""
    holders = list(controller.controller.directory)
    return [any(far_key(each, None) in holder.keys for holder in holders) for each in keys]


def in_step(controller, num_keys):
    def check():
        workers = controller.workers()
        return [(worker["in_step"], worker["key_count"]) for worker in workers] == [(True, num_keys)]

    return check


class TestHoldings:
    """What host memory tells: rows of a real tier, driven as the scheduler drives it."""

    @pytest.fixture
    def host(self, make):  # noqa: F811
        host = make()
        host.holdings = Holdings(lambda: None)
        return host

    def told(self, host):
        changes = host.holdings.take(1000)
        return set(changes.added), set(changes.dropped)

    def test_a_chunk_counts_once_it_is_written(self, host):
        host.begin_write(1)
        assert self.told(host) == (set(), set())
        host.complete_store([key(1)], host.req)
        assert self.told(host) == ({bytes(key(1))}, set())

    def test_a_chunk_whose_copy_failed_never_counts(self, host):
        host.begin_write(1)
        host.complete_store([key(1)], host.req, False)
        assert self.told(host) == (set(), set())

    def test_what_makes_room_and_what_a_lower_limit_drops_is_told(self, host):
        host.write(*range(NUM_ROWS))
        self.told(host)
        host.write(100)
        assert self.told(host) == ({bytes(key(100))}, {bytes(key(0))})
        host.set_limit(4)
        assert len(self.told(host)[1]) == NUM_ROWS - 4
        assert len(host.holdings) == 4

    def test_what_came_and_went_between_two_messages_is_gone(self, host):
        host.write(1)
        host.evict_all()
        assert self.told(host) == (set(), {bytes(key(1))})

    def test_pinned_rows_survive_a_clear(self, host):
        host.write(1, 2)
        host.prepare_load([key(1)], host.req)
        assert host.evict_all() == 1
        assert host.has(1, 2) == [True, False]
        host.complete_load([key(1)], host.req)

    def test_a_reset_is_told_as_everything_anew(self, host):
        host.write(1, 2)
        host.reset_cache()
        host.write(3)
        assert host.holdings.take(10).is_lost
        assert host.holdings.snapshot() == [bytes(key(3))]
        assert host.holdings.take(10) == ([], [], False)

    def test_changes_that_nobody_takes_are_bounded(self, host, monkeypatch):
        monkeypatch.setattr(holdings_module, "MAX_PENDING", 3)
        host.write(*range(NUM_ROWS))
        assert host.holdings.take(10) == ([], [], True)
        assert len(host.holdings.snapshot()) == NUM_ROWS

    def test_an_adapter_is_part_of_the_key_and_an_unknown_one_is_not_told(self, host):
        host.req = ReqContext("lora", {ADAPTER_PARAM: "ab" * 16})
        host.write(1)
        assert self.told(host) == ({far_key(key(1), "ab" * 16)}, set())
        host.req = ReqContext("unknown", {ADAPTER_PARAM: ""})
        host.write(2)
        host.evict_all()
        assert self.told(host) == (set(), {far_key(key(1), "ab" * 16)})

    def test_a_place_is_not_the_same_once_its_row_was_given_away(self, host):
        (row,) = host.write(1)
        place = host.holdings.place(bytes(key(1)))
        assert place.row == row
        host.evict_all()
        assert host.holdings.place(bytes(key(1))) is None
        host.write(1)
        assert host.holdings.place(bytes(key(1))) != place


class TestTelling:
    def test_what_was_there_before_and_what_comes_and_goes(self, controller, join):
        announcer = join(controller)
        announcer.holdings.add([(key(1), 0), (key(2), 1)], None)
        until(in_step(controller, 2), "both are known")
        announcer.holdings.add([(key(3), 2)], None)
        announcer.holdings.remove([key(1)])
        until(lambda: held_by(controller, key(1), key(2), key(3)) == [False, True, True], "changes are known")

    def test_more_than_fits_one_message(self, controller, join, monkeypatch):
        monkeypatch.setattr(announcer_module, "MAX_BATCH_KEYS", 16)
        announcer = join(controller)
        announcer.holdings.add([(key(i), i) for i in range(100)], None)
        until(in_step(controller, 100), "all are known")
        announcer.holdings.clear()
        announcer.holdings.add([(key(i), i) for i in range(50)], None)
        until(in_step(controller, 50), "the rest is known")

    def test_a_controller_that_starts_anew_is_told_everything(self, controller, join, said):
        announcer = join(controller)
        announcer.holdings.add([(key(1), 0)], None)
        until(in_step(controller, 1), "it is known")
        controller.stop()
        announcer.holdings.add([(key(2), 1)], None)
        until(lambda: "tries again" in " ".join(said), "the loss is noticed")
        controller.start()
        until(in_step(controller, 2), "all is known again")
        assert [line.split()[0] for line in said] == ["Registered", "controller", "Registered"]

    def test_the_controller_of_lmcache_is_told_apart(self, join, said):
        with zmq.Context() as context, context.socket(zmq.ROUTER) as theirs:
            address = f"127.0.0.1:{theirs.bind_to_random_port('tcp://127.0.0.1')}"
            join(SimpleNamespace(url=lambda _: address))
            until(lambda: said, "it is noticed")
        assert said[0].startswith(f"controller {address}: read ZeroMQ's greeting: LMCache's workers and controller")

    def test_a_lost_message_is_repaired_by_the_next_heartbeat(self, controller, join):
        announcer = join(controller, heartbeat_s=0.1, heartbeat_delay_s=0.0)
        announcer.holdings.add([(key(1), 0)], None)
        until(in_step(controller, 1), "it is known")
        (holder,) = controller.controller.directory
        controller._loop.call_soon_threadsafe(controller.controller.directory._distrust, holder)
        until(in_step(controller, 1), "it is known again")
        assert controller.controller.directory.counters["syncs"] == 2

    def test_an_engine_that_the_controller_has_forgotten_registers_again(self, controller, join):
        announcer = join(controller, heartbeat_s=0.1, heartbeat_delay_s=0.0)
        announcer.holdings.add([(key(1), 0)], None)
        until(in_step(controller, 1), "it is known")
        (holder,) = controller.controller.directory
        controller._loop.call_soon_threadsafe(controller.controller.directory.withdraw, holder.session)
        until(lambda: holder.session not in [one.session for one in controller.controller.directory], "forgotten")
        until(in_step(controller, 1), "it is known again")

    def test_a_controller_that_is_away_costs_the_engine_nothing_and_one_line(self, join, said):
        class Nobody:
            def url(self, _):
                return f"127.0.0.1:{port}"

        port = free_port()
        announcer = join(Nobody())
        until(lambda: "tries again" in " ".join(said), "it was tried")
        took_s = []
        for begin in range(0, 3000, 1000):
            began = time.monotonic()
            for i in range(begin, begin + 1000):
                announcer.holdings.add([(key(i), i)], None)
            took_s.append(time.monotonic() - began)
        assert min(took_s) < 0.1, "100 us for each, where the machine does not stop for other reasons"
        threading.Event().wait(0.5)  # it is tried a few times more
        assert len(said) == 1

    def test_a_second_engine_of_the_same_name_says_what_to_change(self, controller, join, said):
        join(controller)
        until(in_step(controller, 0), "the first is known")
        join(controller)
        until(lambda: "set lmcache_instance_id" in " ".join(said), "the second is told")
        assert controller.workers()[0]["in_step"]

    def test_an_engine_that_stops_is_gone_at_once(self, controller, join):
        announcer = join(controller)
        until(in_step(controller, 0), "it is known")
        announcer.close()
        until(lambda: controller.workers() == [], "it has left")

    def test_a_token_opens_the_door(self, tmp_path, join, said):
        (tmp_path / "token").write_text("right")
        with RunningController(token_file=str(tmp_path / "token")) as controller:
            join(controller)
            until(lambda: "set controller_token_file" in " ".join(said), "it is refused")
            join(controller, token_file=str(tmp_path / "token"))
            until(in_step(controller, 0), "it is known")


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    kv_cache_utils.init_none_hash(HASH_FN)
    return make_vllm_config(tmp_path_factory.mktemp("model"))


class TestConnector:
    """All of it, from the LMCache keys on."""

    @pytest.fixture
    def engine(self, vllm_config, tmp_path, controller):
        keys = {"enable_controller": True, "lmcache_instance_id": "one", "lmcache_worker_ports": 8500}
        urls = {"controller_pull_url": controller.url("pull"), "controller_reply_url": controller.url("reply")}
        engine = Engine(vllm_config, tmp_path / "disk", **keys, **urls)
        yield engine
        engine.close()

    def test_registers_and_what_it_stores_is_found_by_tokens(self, engine, controller):
        until(in_step(controller, 0), "it is known")
        (worker,) = controller.workers()
        assert (worker["instance_id"], worker["port"], worker["chunk_tokens"]) == ("one", 8500, CHUNK)
        assert worker["tiers"] == ["host", "disk"]
        engine.compute("first", [1, 2, 3, 4, 5, 6, 7])
        until(in_step(controller, 3), "its chunks are known")
        found = controller.post("/lookup", {"tokens": PROMPT}).json()
        assert found["layout_info"] == {"one": ["LocalCPUBackend", 96]}
        assert controller.post("/lookup", {"tokens": PROMPT[:70]}).json()["layout_info"]["one"][1] == 64

    def test_clears_host_memory_when_it_is_told(self, engine, controller, monkeypatch):
        monkeypatch.setattr(controller_api, "CLEAR_WAIT_S", 0.1)
        engine.compute("first", [1, 2, 3, 4, 5, 6, 7])
        until(in_step(controller, 3), "its chunks are known")
        answer = controller.post("/clear", {"instance_id": "one", "location": "LocalCPUBackend"}).json()
        assert answer["status"] == "in_progress"  # an engine without requests takes no steps
        engine.step()
        until(in_step(controller, 0), "its chunks are gone")
        event = {"event_id": answer["event_id"]}
        until(lambda: controller.post("/check_finish", event).json()["status"] == "finished", "it is said")
        assert controller.post("/check_finish", event).json()["num_tokens"] == 96
