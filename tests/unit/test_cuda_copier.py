"""CudaPageCopier without a GPU: its kernels run on the host, and its streams when they are told to."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor, GPULoadStoreSpec
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from lmcache_ext.offload import cuda_copier
from lmcache_ext.offload.copier import HostPageCopier
from lmcache_ext.offload.cuda_copier import CudaPageCopier
from lmcache_ext.ops import pages_fp8
from lmcache_ext.ops.page_shape import PageShape
from tests.contracts.copier_contract import NUM_BLOCKS, PAGE, CopierContract
from tests.cuda_streams import Driver
from tests.device import page_kernels


@pytest.fixture(scope="module")
def library():
    with page_kernels() as plain:
        yield plain


@pytest.fixture
def driver(library, monkeypatch):
    """Host memory stands where the GPU's would be, and counts as pinned."""
    monkeypatch.setattr(cuda_copier, "pin_mmap_region", lambda region: setattr(region, "is_pinned", True))
    made = Driver()
    hook = made.take_launches(library)
    yield made
    library.set_enqueue(None)
    del hook


def paged(blocks, first=0):
    return GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[first])


class TestCudaPageCopier(CopierContract):
    @pytest.fixture(autouse=True)
    def _driver(self, driver):
        self.driver = driver

    def make_copier(self, caches, region, *, blocks_per_chunk):
        return CudaPageCopier(caches, region, blocks_per_chunk=blocks_per_chunk, driver=self.driver)

    @pytest.fixture
    def launched(self, monkeypatch):
        """(way, stream, blocks) of each launch."""
        copy_pages, found = cuda_copier.pages_cuda.copy_pages, []

        def noted(way, table, block_ids, *place, stream):
            found.append((way, stream, block_ids.tolist()))
            return copy_pages(way, table, block_ids, *place, stream=stream)

        monkeypatch.setattr(cuda_copier.pages_cuda, "copy_pages", noted)
        return found

    def test_step_is_one_gather_and_one_scatter_on_streams_of_their_own(self, make_rank, launched):
        copier = make_rank(blocks_per_chunk=2).copier
        copier.submit_store(1, paged([0, 1]), CPULoadStoreSpec([0]))
        copier.submit_load(2, CPULoadStoreSpec([3]), paged([4, 5]))
        copier.submit_store(3, paged([2, 3]), CPULoadStoreSpec([1]))
        copier.submit_load(4, CPULoadStoreSpec([4]), paged([6], first=1))
        assert launched == []
        copier.begin()
        ways, streams, blocks = zip(*launched, strict=True)
        assert (ways, blocks) == (("gather", "scatter"), ([0, 1, 2, 3], [4, 5, 6]))
        assert len({*streams, self.driver.compute.cuda_stream}) == 3
        assert copier.get_finished() == []
        assert self.driver.compute.given == 0
        assert self.driver.synchronized == 0

    def test_step_of_nothing_is_no_launch_and_no_news(self, make_rank, launched):
        copier = make_rank(blocks_per_chunk=2).copier
        copier.begin()
        assert (launched, copier.has_news(), copier.get_finished()) == ([], False, [])

    def test_store_takes_what_the_model_wrote_before_it_began(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        self.driver.compute.give(partial(rank.tensors[0][7].fill_, 1))
        rank.copier.submit_store(1, paged([7]), CPULoadStoreSpec([2]))
        rank.copier.begin()
        self.driver.compute.give(partial(rank.tensors[0][7].fill_, 2))
        rank.copier.wait({1})
        assert (rank.mine(2)[:PAGE] == 1).all()
        assert self.driver.compute.ran == 1

    def test_load_writes_after_the_model_has_cleared_its_blocks(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        rank.rows[3] = 5
        self.driver.compute.give(partial(rank.tensors[0][7].zero_))
        rank.copier.submit_load(1, CPULoadStoreSpec([3]), paged([7]))
        rank.copier.wait({1})
        assert (rank.tensors[0][7] == 5).all()

    def test_load_is_finished_while_a_store_is_not(self, make_rank):
        copier = make_rank(blocks_per_chunk=1).copier
        copier.submit_store(1, paged([7]), CPULoadStoreSpec([2]))
        copier.submit_load(2, CPULoadStoreSpec([3]), paged([8]))
        copier.begin()
        assert copier.has_news()
        copier._loads.wait()
        (result,) = copier.get_finished()
        assert (result.job_id, result.success, result.transfer_size) == (2, True, 2 * PAGE)
        assert copier.has_news()  # the store is under way

    def test_failed_launch_is_a_failed_job_once_the_gpu_is_through(self, make_rank, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("the launch failed with CUDA error 719")

        copier = make_rank(blocks_per_chunk=1).copier
        with monkeypatch.context() as patch:
            patch.setattr(cuda_copier.pages_cuda, "copy_pages", fail)
            copier.submit_load(1, CPULoadStoreSpec([3]), paged([7]))
            copier.begin()
        assert copier.get_finished() == []
        copier.wait({1})
        (result,) = copier.get_finished()
        assert (result.job_id, result.success, result.transfer_size) == (1, True, 0)
        assert copier.has_news()
        assert (copier.take_failed(), copier.take_failed()) == ({1}, set())
        assert not copier.has_news()

    def test_gpu_that_fails_fails_its_jobs_and_lets_go_of_the_region(self, make_rank):
        rank = make_rank(blocks_per_chunk=1)
        rank.copier.submit_store(1, paged([7]), CPULoadStoreSpec([2]))
        rank.copier.begin()
        self.driver.error = "CUDA error: unspecified launch failure"
        rank.copier.submit_load(2, CPULoadStoreSpec([3]), paged([7]))
        assert {result.job_id for result in rank.copier.get_finished()} == {1, 2}
        assert rank.copier.take_failed() == {1, 2}
        mapped = rank.region.mmap_obj
        rank.close()
        assert mapped.closed

    def test_memory_that_cannot_be_pinned_is_refused(self, make_rank, monkeypatch):
        monkeypatch.setattr(cuda_copier, "pin_mmap_region", lambda region: None)
        with pytest.raises(ValueError, match="24576 bytes of host memory could not be pinned"):
            make_rank(blocks_per_chunk=1)

    def test_pages_of_no_multiple_of_16_bytes_are_refused(self, make_rank):
        with pytest.raises(ValueError, match="tensor 1: pages of 500 bytes every 512 bytes"):
            make_rank((((0, PAGE), (1, 500)),), blocks_per_chunk=1)


SHAPES = {
    "HND": PageShape("bfloat16", heads=2, runs=4, k_run=16, v_run=16, heads_first=True),
    "NHD": PageShape("bfloat16", heads=2, runs=4, k_run=16, v_run=16, heads_first=False),
    "float16": PageShape("float16", heads=1, runs=8, k_run=24, v_run=8, heads_first=False),
    "float32": PageShape("float32", heads=2, runs=2, k_run=16, v_run=16, heads_first=True),
    "odd heads": PageShape("bfloat16", heads=4, runs=8, k_run=5, v_run=3, heads_first=True),
}
BLOCKS_PER_CHUNK, NUM_ROWS = 2, 4


def region_of(worker_bytes):
    """Rows of two workers, of whom this is the second; zeros."""
    row_bytes = -(-2 * worker_bytes // 4096) * 4096
    return SimpleNamespace(
        _row_stride=row_bytes,
        _worker_offset=worker_bytes,
        _worker_area_end=2 * worker_bytes,
        base_tensor=torch.zeros(NUM_ROWS * row_bytes, dtype=torch.int8),
        total_size_bytes=NUM_ROWS * row_bytes,
        is_pinned=False,
        cleanup=lambda: None,
    )


@pytest.mark.skipif(not pages_fp8.available(), reason="no compiler was there when the package was installed")
class TestFp8Rows:
    """Rows that a GPU writes are those of a host, bit for bit, and either restores the other's."""

    @pytest.fixture(params=[(name, packed) for name in SHAPES for packed in (False, True)], ids=str)
    def scene(self, request, driver):
        """(paged tensors, both copiers, their rows): three layers, in a tensor each, or `packed` into one."""
        name, packed = request.param
        shape, layers = SHAPES[name], 3
        numbers = torch.randn(NUM_BLOCKS * layers * shape.elements, generator=torch.Generator().manual_seed(1))
        pool = numbers.to(getattr(torch, shape.dtype)).view(torch.int8)
        page_bytes = layers * shape.page_bytes if packed else shape.page_bytes
        tensors = list(pool.view(-1, NUM_BLOCKS, page_bytes))
        caches = CanonicalKVCaches(
            [CanonicalKVCacheTensor(tensor, page_bytes) for tensor in tensors],
            [[CanonicalKVCacheRef(i, page_bytes) for i in range(len(tensors))]],
        )
        regions = [region_of(BLOCKS_PER_CHUNK * layers * shape.part_bytes) for _ in range(2)]
        options = {"blocks_per_chunk": BLOCKS_PER_CHUNK, "shape": shape}
        host = HostPageCopier(caches, regions[0], **options)
        gpu = CudaPageCopier(caches, regions[1], **options, driver=driver)
        rows = [region.base_tensor for region in regions]
        yield pool, host, gpu, rows
        host.shutdown()
        gpu.shutdown()

    def test_are_those_of_the_host(self, scene):
        _, host, gpu, rows = scene
        for copier in (host, gpu):
            copier.submit_store(1, paged([5, 2, 9]), CPULoadStoreSpec([3, 1]))
            copier.wait({1})
        assert rows[0].any()
        assert torch.equal(*rows)
        sizes = [[result.transfer_size for result in copier.get_finished()] for copier in (host, gpu)]
        assert sizes[0] == sizes[1]

    def test_of_the_host_are_restored_as_the_host_does_from_within_a_chunk_too(self, scene):
        pool, host, gpu, rows = scene
        host.submit_store(1, paged([5, 2, 9, 4]), CPULoadStoreSpec([3, 1]))
        host.wait({1})
        rows[1].copy_(rows[0])
        before, restored = pool.clone(), []
        for copier in (host, gpu):
            pool.copy_(before)
            copier.submit_load(2, CPULoadStoreSpec([3, 1]), paged([0, 1, 8], first=1))
            copier.wait({2})
            restored.append(pool.clone())
        assert not torch.equal(restored[0], before)
        assert torch.equal(*restored)


# (block bytes of each tensor, gap): what vLLM hands over for these on a GPU
LAYOUTS = {
    "LBHNC or LBNHC, a tensor for each layer": ([4096] * 4, 0),
    "BLHNC or BLNHC, one tensor": ([4 * 4096], 0),
    "MLA, 576 elements of bfloat16": ([18432] * 3, 0),
    "MLA as fp8_ds_mla": ([10496] * 3, 0),
    "padded pages": ([6160] * 2, 48),
    "more tensors than a launch takes": ([64] * 130, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_of_each_layout_come_back_and_rows_are_those_of_the_host(layout, driver):
    pages, gap = LAYOUTS[layout]
    rng = np.random.default_rng(3)
    tensors = [
        torch.from_numpy(rng.integers(-128, 127, (NUM_BLOCKS, page + gap), dtype=np.int8))[:, :page] for page in pages
    ]
    caches = CanonicalKVCaches(
        [CanonicalKVCacheTensor(tensor, page + gap) for tensor, page in zip(tensors, pages, strict=True)],
        [[CanonicalKVCacheRef(i, page) for i, page in enumerate(pages)]],
    )
    rows, before = [], [tensor.clone() for tensor in tensors]
    for make in (HostPageCopier, partial(CudaPageCopier, driver=driver)):
        region = region_of(BLOCKS_PER_CHUNK * sum(pages))
        copier = make(caches, region, blocks_per_chunk=BLOCKS_PER_CHUNK)
        rows.append(region.base_tensor)
        copier.submit_store(1, paged([5, 2, 9]), CPULoadStoreSpec([3, 1]))
        copier.wait({1})
        copier.submit_load(2, CPULoadStoreSpec([3, 1]), paged([0, 11], first=1))
        copier.wait({2})
        copier.shutdown()
    assert torch.equal(*rows)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[[0, 11]], old[[2, 9]])
        assert torch.equal(tensor[1:11], old[1:11])
