"""HostPageCopier: the contract of copiers, and that whoever waits lends a hand."""

from __future__ import annotations

import threading

import pytest
from vllm.v1.kv_offload.base import GPULoadStoreSpec
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from lmcache_ext.offload import copier as copier_module
from lmcache_ext.offload.copier import HostPageCopier
from lmcache_ext.ops import pages
from tests.contracts.copier_contract import NUM_BLOCKS, CopierContract

WAIT_S = 10.0


class TestHostPageCopier(CopierContract):
    def make_copier(self, caches, region, *, blocks_per_chunk):
        return HostPageCopier(caches, region, blocks_per_chunk=blocks_per_chunk)

    def await_job(self, copier, job_id):
        assert copier.wait_for({job_id}, WAIT_S)

    def test_jobs_finish_in_the_order_they_were_submitted(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        for job_id, submit in enumerate((rank.store, rank.load, rank.store, rank.load)):
            submit(job_id, [job_id], [0])
        assert [result.job_id for result in rank.copier.get_finished()] == [0, 1, 2, 3]

    def test_failure_is_known_before_the_job_counts_as_finished(self, make_rank, monkeypatch):
        rank = make_rank(blocks_per_chunk=1)
        seen = []

        class Watched:
            def put(self, result):
                seen.append((result.job_id, set(rank.copier._failed), rank.copier.is_pending(result.job_id)))

        monkeypatch.setattr(rank.copier, "_finished", Watched())
        rank.store(1, [NUM_BLOCKS], [0])
        assert seen == [(1, {1}, True)]

    def test_waiting_ends_when_the_copy_does_and_not_before(self, make_rank, monkeypatch):
        rank = make_rank(blocks_per_chunk=1)
        gate, entered, gather = threading.Event(), threading.Event(), pages.gather_pages

        def slow(*args):
            entered.set()
            assert gate.wait(WAIT_S)
            return gather(*args)

        monkeypatch.setattr(copier_module.pages, "gather_pages", slow)
        spec = GPULoadStoreSpec([0], group_sizes=[1], block_indices=[0])
        rank.copier.submit_store(1, spec, CPULoadStoreSpec([0]))
        assert entered.wait(WAIT_S)
        assert rank.copier.is_pending(1)
        assert not rank.copier.wait_for({1}, 0.0)
        assert rank.copier.wait_for({2}, 0.0)  # nobody knows it: nothing to wait for
        gate.set()
        rank.copier.wait({1})
        assert not rank.copier.is_pending(1)

    @pytest.fixture
    def submitted(self, make_rank, monkeypatch):
        """A copier that cuts jobs into single blocks; submits a store of six."""
        monkeypatch.setattr(copier_module, "_PIECE_BYTES", 1)
        rank = make_rank(blocks_per_chunk=1)

        def submit():
            blocks = [1, 3, 5, 7, 9, 11]
            spec = GPULoadStoreSpec(blocks, group_sizes=[6], block_indices=[0])
            rank.copier.submit_store(1, spec, CPULoadStoreSpec([0, 1, 2, 3, 4, 5]))
            return rank, blocks

        return submit

    def test_two_threads_copy_one_job(self, submitted, monkeypatch):
        gather, both, threads = pages.gather_pages, threading.Barrier(2, timeout=WAIT_S), set()

        def together(*args):
            both.wait()  # broken, and the job failed, unless two threads are inside at once
            threads.add(threading.current_thread())
            return gather(*args)

        monkeypatch.setattr(copier_module.pages, "gather_pages", together)
        rank, blocks = submitted()
        assert rank.copier.wait_for({1}, WAIT_S)
        assert rank.copier.take_failed() == set()
        assert threads == {threading.current_thread(), rank.copier._thread}
        for row, block in enumerate(blocks):
            assert (rank.mine(row) == rank.page(block, 0, 1)).all()

    def test_a_piece_that_fails_fails_the_job_and_not_the_helper(self, submitted, monkeypatch):
        helping = threading.Event()

        def fail_for_the_helper(*args):
            if threading.current_thread() is threading.main_thread():
                helping.set()
                raise RuntimeError("a bug")
            assert helping.wait(WAIT_S)
            return 0

        monkeypatch.setattr(copier_module.pages, "gather_pages", fail_for_the_helper)
        rank, _ = submitted()
        assert rank.copier.wait_for({1}, WAIT_S)
        assert [result.job_id for result in rank.copier.get_finished()] == [1]
        assert rank.copier.take_failed() == {1}

    def test_thread_ends_with_the_copier(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        rank.close()
        assert not rank.copier._thread.is_alive()
