"""Steps that the connector leaves out, against one that leaves out none."""

from __future__ import annotations

import random
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.request import RequestStatus

from lmcache_ext.offload.messages import NOTHING_TO_DO, LMCacheConnectorMetadata
from lmcache_ext.offload.progress import Progress
from lmcache_ext.offload.quiet import QuietSteps
from tests.unit.connector_engine import BLOCK, CHUNK, NUM_BLOCKS, WAIT_S, Engine
from tests.unit.test_connector import make_engine, vllm_config  # noqa: F401  fixtures

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the copier of hosts without a GPU")

STORE_ALL = {"save_decode_cache": True}


class Decoder:
    """Plays vLLM's scheduler for requests that compute their prompt in one step and then go on token by token."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.running: dict[str, list[int]] = {}  # request -> its blocks
        self.free = list(range(1, NUM_BLOCKS))
        self.left_out = 0
        self._new: list[str] = []
        self._resumed: list[str] = []
        self._gone: set[str] = set()
        self._preempted: set[str] = set()

    def begin(self, req_id, tokens):
        request = self.engine.request(req_id, tokens)
        self.engine.scheduler.get_num_new_matched_tokens(request, 0)  # whatever is known, it is computed
        self.running[req_id] = []
        self._new.append(req_id)

    def end(self, req_id):
        request = self.engine.requests[req_id]
        request.status = RequestStatus.FINISHED_STOPPED
        self.engine.scheduler.request_finished_all_groups(request, ([],))
        self.free += self.running.pop(req_id)
        self._gone.add(req_id)

    def preempt(self, req_id):
        """It loses its blocks, and computes all of its tokens anew in the next step."""
        self.free += self.running[req_id]
        self.running[req_id] = []
        self.engine.requests[req_id].num_computed_tokens = 0
        self._preempted.add(req_id)
        self._resumed.append(req_id)

    def step(self):
        """(what is stored, loaded and waited for) of one step; the workers do it, and all tiers end their work."""
        output, resumed = SchedulerOutput.make_empty(), set()
        going_on: list[tuple[str, tuple[list[int], ...] | None]] = []
        for req_id in self.running:
            if req_id in self._preempted:
                continue
            new_blocks = self._grow(req_id)
            if req_id in self._new:
                blocks = (list(new_blocks),)
                output.scheduled_new_reqs.append(SimpleNamespace(req_id=req_id, block_ids=blocks))
            else:
                going_on.append((req_id, (new_blocks,) if new_blocks else None))
                resumed |= {req_id} & set(self._resumed)
            request = self.engine.requests[req_id]
            output.num_scheduled_tokens[req_id] = request.num_tokens - request.num_computed_tokens
        output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
        output.scheduled_cached_reqs = _cached(going_on, resumed)
        output.finished_req_ids, self._gone = self._gone, set()
        output.preempted_req_ids, preempted = self._preempted, self._preempted
        self._new, self._preempted = [], set()
        self._resumed = [req_id for req_id in self._resumed if req_id in preempted]
        meta = self.engine.scheduler.build_connector_meta(output)
        self.left_out += meta is NOTHING_TO_DO
        self._compute(output)
        self.engine.run_worker(sent(meta), output.finished_req_ids)
        for tier in self.engine.scheduler.scheduler.manager.secondary_tiers:
            assert tier._pool.drain(WAIT_S)
        return _told(meta.store_jobs), _told(meta.load_jobs), meta.jobs_to_flush or set()

    def _grow(self, req_id):
        request, blocks = self.engine.requests[req_id], self.running[req_id]
        new = [self.free.pop(0) for _ in range(-(-request.num_tokens // BLOCK) - len(blocks))]
        blocks += new
        return new

    def _compute(self, output):
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.engine.requests[req_id]
            request.num_computed_tokens += num_tokens
            request.append_output_token_ids(request.num_tokens % 100)


def sent(meta):
    """As it arrives in another process."""
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        writer.send(meta)
        return reader.recv()


def _cached(going_on, resumed):
    names = [req_id for req_id, _ in going_on]
    zeros = [0] * len(names)
    return CachedRequestData(names, resumed, [], {}, [blocks for _, blocks in going_on], zeros, zeros)


def _told(jobs):
    """Job -> request, blocks and rows."""
    return {
        job_id: (job.req_id, *(spec.block_ids.tolist() for spec in (job.src_spec, job.dst_spec)))
        for job_id, job in jobs.items()
    }


@pytest.fixture
def decoder(make_engine):  # noqa: F811
    return Decoder(make_engine(**STORE_ALL))


def settled(decoder, req_id, num_tokens):
    """A request that has computed its prompt, and whose chunks are where they belong."""
    decoder.begin(req_id, list(range(num_tokens)))
    for _ in range(4):
        decoder.step()
    decoder.left_out = 0


def test_a_request_that_goes_on_in_its_blocks_concerns_nobody(decoder, monkeypatch):
    settled(decoder, "r", 2)
    called = []
    inner = type(decoder.engine.scheduler.scheduler)
    monkeypatch.setattr(inner, "build_connector_meta", lambda *_: called.append(1))
    for _ in range(8):
        decoder.step()
    assert decoder.left_out == 8
    assert not called


def test_a_chunk_is_stored_in_the_step_that_fills_it(decoder):
    settled(decoder, "r", 2)
    request = decoder.engine.requests["r"]
    while request.num_computed_tokens < CHUNK - 1:
        assert not decoder.step()[0]
    (job,) = decoder.step()[0].values()
    assert job[0] == "r"
    assert decoder.left_out > CHUNK // 2


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_done_later_or_otherwise_than_without_leaving_out(make_engine, monkeypatch, tmp_path, seed):  # noqa: F811
    """Requests come, end and are preempted at random; both engines are told the same in each step."""
    both = [Decoder(make_engine(local_disk=f"file://{tmp_path}/{name}", **STORE_ALL)) for name in ("one", "other")]
    monkeypatch.setattr(both[1].engine.scheduler._quiet, "holds", lambda output: False)
    draw, count = random.Random(seed), 0
    num_stores = 0
    for _ in range(120):
        running = list(both[0].running)
        if len(running) < 2 and draw.random() < 0.2:
            count += 1
            tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 100))]
            for each in both:
                each.begin(f"r{count}", tokens)
        elif running and draw.random() < 0.08:
            chosen, what = draw.choice(running), draw.choice(["end", "preempt"])
            for each in both:
                getattr(each, what)(chosen)
        if any(each.engine.requests[req_id].num_tokens > 180 for each in both for req_id in each.running):
            for each in both:
                each.end(running[0])
        step = both[0].step()
        assert step == both[1].step()
        num_stores += len(step[0])
    assert num_stores > 5
    assert both[0].left_out > 20
    assert both[1].left_out == 0
    for each in both:
        for req_id in list(each.running):
            each.end(req_id)
        for _ in range(6):
            each.step()
        assert each.engine.pinned() == 0
        assert not each.engine.jobs
        assert not each.engine.scheduler.scheduler._req_status


def test_news_of_a_tier_are_taken_in_by_the_next_step(decoder):
    settled(decoder, "r", 2)
    decoder.step()
    decoder.engine.scheduler.scheduler.manager.progress.advance()
    decoder.step()
    decoder.step()
    assert decoder.left_out == 2


def test_a_setting_that_changes_is_heeded_by_the_next_step(decoder, monkeypatch):
    settled(decoder, "r", 2)
    decoder.step()
    monkeypatch.setattr(decoder.engine.scheduler._tuning, "tick", lambda: True)
    decoder.step()
    decoder.step()
    assert decoder.left_out == 2


def test_a_load_that_fails_is_told_in_a_step_that_would_be_left_out(decoder):
    settled(decoder, "r", 2)
    decoder.engine.scheduler._failed_loads.add("other")
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = {"r": 1}, 1
    meta = decoder.engine.scheduler.build_connector_meta(output)
    assert (meta.failed_loads, meta.idle) == ({"other"}, False)
    assert not NOTHING_TO_DO.failed_loads


def test_news_that_came_after_a_lookup_took_in_the_last_are_not_missed(decoder):
    """vLLM takes in what tiers have finished once a step: at its first lookup, where there is one."""
    progress, output = Progress(), SchedulerOutput.make_empty()
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = {"r": 1}, 1
    quiet = QuietSteps(decoder.engine.scheduler.scheduler, progress)
    quiet.plans(output)
    assert quiet.holds(output)
    quiet.wake()
    progress.advance()
    assert not quiet.holds(output)
    quiet.plans(output)
    assert not quiet.holds(output)
    quiet.plans(output)
    assert quiet.holds(output)


def test_a_request_that_was_not_in_the_last_step_is_looked_at(decoder):
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = {"r": 1}, 1
    quiet = QuietSteps(decoder.engine.scheduler.scheduler, Progress())
    quiet.plans(output)
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = {"r": 1, "another": 1}, 2
    assert not quiet.holds(output)


class TestMessages:
    def test_with_nothing_to_do_are_one_object_in_each_process(self):
        assert sent(NOTHING_TO_DO) is NOTHING_TO_DO

    def test_with_something_to_do_travel_whole(self):
        meta = LMCacheConnectorMetadata({}, {}, {7}, {"r"}, idle=True)
        assert sent(meta) == meta
