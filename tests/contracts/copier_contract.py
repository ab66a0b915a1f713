"""What every copier of ours does, on real tensors and a real shared region: one suite, inherited by each."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from lmcache_ext.offload.rows import open_rows

NUM_BLOCKS, PAGE, NUM_ROWS = 12, 512, 6


def kv_tensor(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-128, 127, (NUM_BLOCKS, PAGE), dtype=np.int8))


class Rank:
    """One worker's tensors and copier. Groups are lists of (tensor index, page bytes)."""

    def __init__(self, engine_id, suite, groups, *, blocks_per_chunk, rank=0, world=1, num_tensors=2):
        self.tensors = [kv_tensor(10 * rank + i) for i in range(num_tensors)]
        worker_bytes = max(sum(size for _, size in group) for group in groups) * blocks_per_chunk
        row_bytes = -(-worker_bytes * world // 4096) * 4096
        self.region = open_rows(
            engine_id=engine_id, num_chunks=NUM_ROWS, rank=rank, row_bytes=row_bytes, worker_bytes=worker_bytes
        )
        self.rows = np.asarray(memoryview(self.region.mmap_obj)).reshape(NUM_ROWS, row_bytes)
        self.begin, self.worker_bytes = rank * worker_bytes, worker_bytes
        caches = CanonicalKVCaches(
            [CanonicalKVCacheTensor(tensor, PAGE) for tensor in self.tensors],
            [[CanonicalKVCacheRef(tensor, size) for tensor, size in group] for group in groups],
        )
        self.suite = suite
        self.copier = suite.make_copier(caches, self.region, blocks_per_chunk=blocks_per_chunk)

    def mine(self, row):
        return self.rows[row, self.begin : self.begin + self.worker_bytes]

    def page(self, block, *tensors):
        return np.concatenate([self.tensors[i].numpy()[block].view(np.uint8) for i in tensors])

    def store(self, job_id, blocks, rows, *, sizes=None, firsts=None):
        self._copy(self.copier.submit_store, job_id, self._paged(blocks, sizes, firsts), CPULoadStoreSpec(rows))

    def load(self, job_id, blocks, rows, *, sizes=None, firsts=None):
        self._copy(self.copier.submit_load, job_id, CPULoadStoreSpec(rows), self._paged(blocks, sizes, firsts))

    @staticmethod
    def _paged(blocks, sizes, firsts):
        sizes = sizes or [len(blocks)]
        return GPULoadStoreSpec(blocks, group_sizes=sizes, block_indices=firsts or [0] * len(sizes))

    def _copy(self, submit, job_id, source, target):
        assert submit(job_id, source, target)
        self.suite.await_job(self.copier, job_id)

    def close(self):
        self.rows = None
        self.copier.shutdown()


class CopierContract(ABC):
    """Subclasses make the copier; rows and pages lie as `offload.parts` says."""

    @abstractmethod
    def make_copier(self, caches, region, *, blocks_per_chunk):
        """The copier under test."""

    def await_job(self, copier, job_id):
        copier.wait({job_id})

    @pytest.fixture
    def make_rank(self):
        engine_id, made = f"test-{uuid.uuid4().hex}", []

        def make(groups=(((0, PAGE), (1, PAGE)),), **options):
            made.append(Rank(engine_id, self, groups, **options))
            return made[-1]

        yield make
        for rank in made:
            rank.close()
        if made:  # a scheduler would have dropped the name
            open_rows(engine_id=engine_id, num_chunks=1, rank=None, row_bytes=4096, worker_bytes=0).cleanup()

    def test_a_store_puts_the_pages_of_each_block_side_by_side(self, make_rank):
        rank = make_rank(blocks_per_chunk=2)
        rank.store(1, [7, 3, 5, 0], [4, 2])
        assert (rank.mine(4) == np.concatenate([rank.page(7, 0, 1), rank.page(3, 0, 1)])).all()
        assert (rank.mine(2) == np.concatenate([rank.page(5, 0, 1), rank.page(0, 0, 1)])).all()
        for untouched in (0, 1, 3, 5):
            assert not rank.rows[untouched].any()

    def test_a_load_brings_them_back_to_other_blocks_and_touches_no_third(self, make_rank):
        rank = make_rank(blocks_per_chunk=2)
        before = [tensor.clone() for tensor in rank.tensors]
        rank.store(1, [1, 2], [3])
        rank.load(2, [8, 9], [3])
        for tensor, old in zip(rank.tensors, before, strict=True):
            assert torch.equal(tensor[[8, 9]], old[[1, 2]])
            rest = [i for i in range(NUM_BLOCKS) if i not in (8, 9)]
            assert torch.equal(tensor[rest], old[rest])

    def test_a_load_that_begins_inside_a_chunk_skips_its_first_blocks(self, make_rank):
        rank = make_rank(blocks_per_chunk=4)
        rank.store(1, list(range(8)), [1, 2])
        before = rank.tensors[0].clone()
        rank.load(2, [11, 10, 9], [1, 2], firsts=[2 + 4])  # blocks 6..8 of the request: [skip skip 6 7] [8 ...]
        assert torch.equal(rank.tensors[0][[11, 10, 9]], before[[2, 3, 4]])

    def test_groups_of_several_sizes_share_a_row_width_and_the_rest_is_zero(self, make_rank):
        groups = (((0, PAGE), (1, PAGE)), ((1, PAGE // 2),))
        rank = make_rank(groups, blocks_per_chunk=1)
        rank.rows[:] = 0xAA  # what strangers left in these rows
        rank.store(1, [1, 2, 6], [0, 1, 4], sizes=[2, 1])
        assert (rank.mine(1) == rank.page(2, 0, 1)).all()
        assert (rank.mine(4)[: PAGE // 2] == rank.page(6, 1)[: PAGE // 2]).all()
        assert not rank.mine(4)[PAGE // 2 :].any()
        before = rank.tensors[1].clone()
        rank.load(2, [9], [4], sizes=[0, 1])
        assert torch.equal(rank.tensors[1][9, : PAGE // 2], before[6, : PAGE // 2])
        assert torch.equal(rank.tensors[1][9, PAGE // 2 :], before[9, PAGE // 2 :])

    def test_an_empty_group_takes_no_row(self, make_rank):
        rank = make_rank((((0, PAGE),), ((1, PAGE),)), blocks_per_chunk=1)
        rank.store(1, [3], [5], sizes=[0, 1])
        assert (rank.mine(5) == rank.page(3, 1)).all()

    def test_two_ranks_lie_side_by_side_in_one_row(self, make_rank):
        first = make_rank(blocks_per_chunk=2, rank=0, world=2)
        second = make_rank(blocks_per_chunk=2, rank=1, world=2)
        for rank in (first, second):
            rank.store(1, [4, 5], [3])
        both = [np.concatenate([rank.page(4, 0, 1), rank.page(5, 0, 1)]) for rank in (first, second)]
        assert (first.rows[3, : 2 * first.worker_bytes] == np.concatenate(both)).all()
        assert not first.rows[3, 2 * first.worker_bytes :].any()
        second.load(2, [0, 1], [3])
        assert (second.page(0, 0, 1) == second.page(4, 0, 1)).all()

    def test_jobs_run_in_order(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        old = rank.tensors[0].clone()
        for job_id, submit in enumerate((rank.store, rank.load, rank.store, rank.load)):
            submit(job_id, [job_id], [0])
        assert sorted(result.job_id for result in rank.copier.get_finished()) == [0, 1, 2, 3]
        assert torch.equal(rank.tensors[0][1], old[0])
        assert torch.equal(rank.tensors[0][3], old[2])

    def test_failed_job_is_finished_and_named_and_the_copier_goes_on(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        rank.store(1, [NUM_BLOCKS], [0])
        rank.store(2, [0], [NUM_ROWS])
        rank.store(3, [0], [0])
        assert [(result.job_id, result.success) for result in rank.copier.get_finished()] == [
            (1, True),
            (2, True),
            (3, True),
        ]
        assert rank.copier.take_failed() == {1, 2}
        assert rank.copier.take_failed() == set()

    def test_job_that_names_fewer_rows_than_its_blocks_take_is_a_failed_one(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        rank.store(1, [3, 4], [0])
        assert [result.job_id for result in rank.copier.get_finished()] == [1]
        assert rank.copier.take_failed() == {1}

    def test_shutdown_finishes_what_was_submitted_and_unmaps_the_region(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        spec = GPULoadStoreSpec([2], group_sizes=[1], block_indices=[0])
        for job_id in range(20):
            rank.copier.submit_store(job_id, spec, CPULoadStoreSpec([0]))
        mapped = rank.region.mmap_obj
        rank.close()
        assert mapped.closed  # "cannot close exported pointers exist" would have left it open
        assert len(rank.copier.get_finished()) == 20
        rank.copier.shutdown()
