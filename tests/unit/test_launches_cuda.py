"""Launches on a stream of their own: what they wait for, when they are done, and whom a failure takes along."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from lmcache_ext.ops.launches_cuda import Finished, Launches
from lmcache_ext.ops.table import PageTable, Part
from tests.cuda_streams import Driver

PAGE, NUM_BLOCKS = 64, 16


class Scene:
    """Blocks that are numbers; a launch copies them to `rows` when its stream runs, 10 ms for each block."""

    def __init__(self):
        self.driver = Driver()
        self.paged = np.arange(NUM_BLOCKS)
        self.rows = np.full(NUM_BLOCKS, -1)
        self.tables = [PageTable.of([(4096 * (i + 1), NUM_BLOCKS, PAGE, PAGE)]) for i in range(2)]
        self.calls = []
        self.launches = Launches(self.copy, self.driver)
        self.stream = self.launches._stream

    def copy(self, part, stream):
        if part.block_ids.max() >= NUM_BLOCKS:
            raise ValueError("block 0 is outside its tensor")
        self.calls.append((part.table, part.block_ids.tolist()))
        self.driver.streams[stream].give(partial(self.move, part.block_ids.copy(), part.offsets // PAGE))
        return part.block_ids.size * PAGE

    def move(self, block_ids, rows):
        self.rows[rows] = self.paged[block_ids]
        self.driver.ms += 10 * block_ids.size

    def part(self, blocks, rows=None, table=0):
        return Part(self.tables[table], np.array(blocks), np.array(blocks if rows is None else rows) * PAGE)

    def submit(self, job_id, *blocks, **options):
        self.launches.submit(job_id, [self.part(list(blocks), **options)])


@pytest.fixture
def scene():
    return Scene()


def ids(finished):
    return [job.job_id for job in finished]


class TestLaunch:
    def test_of_a_step_is_one_whatever_the_number_of_requests(self, scene):
        for job_id in range(5):
            scene.submit(job_id, job_id, job_id + 5)
        scene.launches.begin()
        assert scene.calls == [(scene.tables[0], [0, 5, 1, 6, 2, 7, 3, 8, 4, 9])]
        scene.stream.run()
        assert (scene.rows[:10] == np.arange(10)).all()

    def test_is_one_for_each_cache_group(self, scene):
        for job_id in range(2):
            scene.launches.submit(job_id, [scene.part([job_id]), scene.part([job_id + 2], table=1)])
        scene.launches.begin()
        assert scene.calls == [(scene.tables[0], [0, 1]), (scene.tables[1], [2, 3])]

    def test_of_nothing_touches_no_stream(self, scene):
        scene.launches.begin()
        assert (scene.stream.given, scene.launches.is_busy()) == (0, False)

    def test_without_blocks_is_over_at_once(self, scene):
        scene.launches.submit(1, [])
        scene.launches.begin()
        scene.stream.run()
        assert scene.launches.finished() == [Finished(1, 0, 0.0)]


class TestOrder:
    def test_is_behind_what_the_model_was_given_before_and_not_what_it_was_given_after(self, scene):
        before, after = partial(scene.paged.__setitem__, 3, 300), partial(scene.paged.__setitem__, 3, 400)
        scene.driver.compute.give(before)
        scene.submit(1, 3)
        scene.launches.begin()
        scene.driver.compute.give(after)
        scene.stream.run()
        assert scene.rows[3] == 300
        assert (scene.driver.compute.ran, scene.driver.compute.given) == (1, 2)

    def test_is_of_when_it_began_and_not_of_when_it_was_submitted(self, scene):
        scene.submit(1, 3)
        scene.driver.compute.give(partial(scene.paged.__setitem__, 3, 300))
        scene.launches.begin()
        scene.stream.run()
        assert scene.rows[3] == 300

    def test_never_makes_the_model_or_the_host_wait(self, scene):
        scene.submit(1, 3)
        scene.launches.begin()
        assert scene.launches.finished() == []
        assert scene.driver.compute.given == 0  # no event of ours for it to wait for
        assert (scene.stream.ran, scene.driver.synchronized) == (0, 0)

    def test_of_launches_is_that_of_their_beginning(self, scene):
        scene.submit(1, 3, rows=[0])
        scene.launches.begin()
        scene.submit(2, 4, rows=[0])
        scene.launches.begin()
        scene.launches.wait({2})
        assert scene.rows[0] == 4
        assert ids(scene.launches.finished()) == [1, 2]

    def test_of_streams_is_their_own(self, scene):
        other = Launches(scene.copy, scene.driver)
        scene.submit(1, 3)
        scene.launches.begin()
        other.submit(2, [scene.part([4])])
        other.begin()
        other.wait()
        assert (ids(other.finished()), scene.launches.finished()) == ([2], [])


class TestFinished:
    def test_comes_when_the_event_has_and_once(self, scene):
        scene.submit(1, 3)
        assert scene.launches.is_busy()
        scene.launches.begin()
        scene.stream.run_to(scene.stream.given - 1)  # all but the event itself
        assert (scene.launches.finished(), scene.launches.is_busy()) == ([], True)
        scene.stream.run()
        assert ids(scene.launches.finished()) == [1]
        assert (scene.launches.finished(), scene.launches.is_busy()) == ([], False)

    def test_says_bytes_and_a_share_of_the_time_by_bytes(self, scene):
        scene.driver.compute.give(lambda: setattr(scene.driver, "ms", 1000.0))  # waiting is not copying
        scene.submit(1, 3)
        scene.submit(2, 4, 5, 6)
        scene.launches.begin()
        scene.stream.run()
        assert scene.launches.finished() == [Finished(1, PAGE, 0.01), Finished(2, 3 * PAGE, pytest.approx(0.03))]

    def test_of_launches_that_are_over_does_not_wait_for_later_ones(self, scene):
        scene.submit(1, 3)
        scene.launches.begin()
        scene.stream.run()
        scene.submit(2, 4)
        scene.launches.begin()
        assert ids(scene.launches.finished()) == [1]


class TestWait:
    def test_begins_what_was_only_submitted(self, scene):
        scene.submit(1, 3)
        scene.launches.wait({1})
        assert scene.rows[3] == 3
        assert ids(scene.launches.finished()) == [1]

    def test_for_one_launch_is_not_for_later_ones(self, scene):
        for job_id in (1, 2):
            scene.submit(job_id, job_id)
            scene.launches.begin()
        scene.launches.wait({1})
        assert (ids(scene.launches.finished()), scene.rows[2]) == ([1], -1)

    def test_for_a_job_that_nobody_knows_is_none(self, scene):
        scene.submit(1, 3)
        scene.launches.begin()
        scene.launches.wait({7})
        assert scene.driver.synchronized == 0


class TestFailure:
    def test_of_a_job_that_names_no_block_takes_no_other_along(self, scene):
        scene.submit(1, 3)
        scene.submit(2, NUM_BLOCKS)
        scene.submit(3, 4)
        scene.launches.begin()
        scene.stream.run()
        assert [(job.job_id, job.num_bytes) for job in scene.launches.finished()] == [(1, PAGE), (2, None), (3, PAGE)]
        assert scene.rows[[3, 4]].tolist() == [3, 4]

    def test_of_a_launch_is_told_when_what_was_launched_before_it_is_over(self, scene):
        """Until then its blocks may still be written, and they would go to another request."""

        def copy(part, stream):
            if part.table is scene.tables[1]:
                raise RuntimeError("the launch failed with CUDA error 719")
            return scene.copy(part, stream)

        launches = Launches(copy, scene.driver)
        launches.submit(1, [scene.part([3]), scene.part([4], table=1)])
        launches.begin()
        assert launches.finished() == []
        launches._stream.run()
        assert launches.finished() == [Finished(1, None, 0.0)]

    def test_of_every_launch_is_logged_once(self, scene, caplog):
        def copy(part, stream):
            raise RuntimeError("the launch failed with CUDA error 719")

        launches = Launches(copy, scene.driver)
        for job_id in (1, 2, 3):
            launches.submit(job_id, [scene.part([3])])
            launches.begin()
        launches._stream.run()
        assert launches.finished() == [Finished(job_id, None, 0.0) for job_id in (1, 2, 3)]
        assert [record.message for record in caplog.records] == ["The launch of 1 copies of KV pages failed"]

    @pytest.mark.parametrize("when", ["before", "under way", "awaited"])
    def test_of_the_gpu_fails_every_job_and_raises_nothing(self, scene, when):
        scene.submit(1, 3)
        if when != "before":
            scene.launches.begin()
        scene.submit(2, 4)
        scene.driver.error = "CUDA error: an illegal memory access was encountered"
        if when == "awaited":
            scene.launches.wait({1, 2})
        scene.launches.begin()
        assert [(job.job_id, job.num_bytes) for job in scene.launches.finished()] == [(1, None), (2, None)]
        assert not scene.launches.is_busy()

    def test_of_parts_fails_that_job_alone(self, scene):
        def broken():
            yield scene.part([3])
            raise IndexError("a bug")

        scene.launches.submit(1, broken())
        scene.submit(2, 4)
        scene.launches.begin()
        scene.stream.run()
        assert [(job.job_id, job.num_bytes) for job in scene.launches.finished()] == [(1, None), (2, PAGE)]
        assert scene.rows[3] == -1
