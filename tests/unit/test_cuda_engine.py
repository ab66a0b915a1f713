"""The connector with our kernels as its copier, as on a machine with a GPU: what they are asked for, and what they do.

The platform says that it is CUDA, kernels run on the host, streams and events are stand-ins (`tests/cuda_streams.py`).
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from lmcache_ext.config import load_config
from lmcache_ext.errors import ConfigError
from lmcache_ext.offload import cuda_copier, element_layout, identity, settings, spec
from lmcache_ext.offload.cuda_copier import CudaPageCopier
from lmcache_ext.ops import pages_cuda
from tests.cuda_streams import Driver
from tests.device import page_kernels
from tests.unit import connector_engine
from tests.unit.connector_engine import HASH_FN, LAYERS, NUM_BLOCKS, PAGE, Engine, kv_cache_config, make_vllm_config

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the copier of hosts without a GPU")

FROM, TO = [1, 2, 3, 4, 5, 6, 7], [10, 11, 12, 13, 14, 15, 16]
HEADS, TOKENS, DIM = 2, 16, 32
KERNELS = {"extra_config": {"cuda_page_copier": "kernels"}}
FP8 = {"extra_config": {"host_kv_dtype": "fp8"}}


class CudaEngine(Engine):
    """An engine with a KV cache of a layout, `cache` (layer, block, head, token, element).

    Its copies run in `finish_copies`, when the model was given the step's work: nothing else waits for them.
    """

    def __init__(self, order, *args, **options):
        self.order = order
        super().__init__(*args, **options)

    def register_kv(self):
        shape = {"B": NUM_BLOCKS, "L": len(LAYERS), "H": HEADS, "N": TOKENS, "C": 2 * DIM}
        numbers = torch.randn([shape[axis] for axis in self.order]).bfloat16()
        self.cache = numbers.permute([self.order.index(axis) for axis in "LBHNC"])
        self.worker.register_kv_caches(dict(zip(LAYERS, self.cache, strict=True)))

    def finish_copies(self):
        for copies in (self.copier._stores, self.copier._loads):
            copies.wait()


def layout_of(order):
    by_block = order.startswith("BL")
    strides = {"layer_stride": PAGE, "block_stride": len(LAYERS) * PAGE} if by_block else {}
    strides = strides or {"layer_stride": NUM_BLOCKS * PAGE, "block_stride": PAGE}
    base = kv_cache_config()
    tensor = KVCacheTensor(size=len(LAYERS) * NUM_BLOCKS * PAGE, layers=LAYERS, **strides)
    return KVCacheConfig(NUM_BLOCKS, [tensor], base.kv_cache_groups, kv_cache_layout=order)


@pytest.fixture(scope="module")
def library():
    with page_kernels() as plain:
        yield plain


@pytest.fixture
def cuda(library, monkeypatch):
    """A platform that says CUDA; its driver."""
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_type="cuda")
    for module in (settings, spec, identity, element_layout):
        monkeypatch.setattr(module, "current_platform", platform)
    monkeypatch.setattr(cuda_copier, "pin_mmap_region", lambda region: setattr(region, "is_pinned", True))
    driver = Driver()
    driver.platform = platform
    monkeypatch.setattr(spec, "CudaPageCopier", partial(CudaPageCopier, driver=driver))
    hook = driver.take_launches(library)
    yield driver
    library.set_enqueue(None)
    del hook


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    kv_cache_utils.init_none_hash(HASH_FN)
    return make_vllm_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_engine(cuda, vllm_config, tmp_path, monkeypatch):
    made = []

    def make(order="LBHNC", **options):
        monkeypatch.setattr(connector_engine, "kv_cache_config", partial(layout_of, order))
        made.append(CudaEngine(order, vllm_config, tmp_path / "disk", **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def blocks(engine, chosen):
    """Copies of the blocks that three chunks have."""
    return engine.cache[:, chosen[:6]]


def load(engine, req_id="again"):
    request = engine.request(req_id)
    assert engine.begin_load(request, TO) == 96
    return request, engine.step()


class TestKernels:
    @pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
    def test_bring_back_a_prompt_from_host_memory_and_from_disk(self, make_engine, order):
        first = make_engine(order, **KERNELS)
        first.compute("first", FROM)
        exact = blocks(first, FROM)
        for engine in (first, make_engine(order, **KERNELS)):
            before = engine.cache.clone()
            _, report = load(engine)
            assert (report.finished_recving, report.failed_recving) == ({"again"}, set())
            assert torch.equal(blocks(engine, TO), exact)
            rest = [block for block in range(NUM_BLOCKS) if block not in TO[:6]]
            assert torch.equal(engine.cache[:, rest], before[:, rest])

    def test_of_a_step_are_begun_before_the_model_is_given_its_work(self, make_engine, monkeypatch):
        engine = make_engine(**KERNELS)
        engine.compute("first", FROM)
        begun = []
        monkeypatch.setattr(
            engine,
            "finish_copies",
            lambda: begun.append(len(engine.copier._loads._running)) or CudaEngine.finish_copies(engine),
        )
        load(engine)
        assert begun == [1]

    def test_that_are_not_asked_for_are_not_used(self, cuda, vllm_config, make_engine):
        engine = make_engine(**KERNELS)
        vllm_config.kv_transfer_config.kv_connector_extra_config = {}
        settings.resolve(vllm_config, kv_cache_config())
        assert vllm_config.kv_transfer_config.kv_connector_extra_config[settings.PAGE_COPIER] == "vllm"
        assert isinstance(engine.copier, CudaPageCopier)

    def test_that_fail_to_launch_a_load_have_the_prompt_computed(self, make_engine, monkeypatch):
        engine = make_engine(**KERNELS)
        engine.compute("first", FROM)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_copier.pages_cuda, "copy_pages", fail)
            request, report = load(engine)
        assert report.failed_recving == {"again"}
        assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        assert (engine.pinned(), engine.jobs) == (0, {})

    def test_that_fail_to_launch_a_store_leave_nothing_to_be_found(self, make_engine, monkeypatch):
        engine = make_engine(**KERNELS)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_copier.pages_cuda, "copy_pages", fail)
            engine.compute("first", FROM)
        assert engine.match(engine.request("again")) == 0
        assert engine.pinned() == 0

    def test_are_waited_for_where_blocks_go_to_others(self, cuda, make_engine):
        engine = make_engine(**KERNELS)
        engine.begin_load(engine.request("first"), [])
        meta = engine.scheduler.build_connector_meta(connector_engine.output_of(engine.requests["first"], FROM))
        meta.jobs_to_flush = set(meta.store_jobs)
        assert meta.jobs_to_flush
        engine.worker.handle_preemptions(meta)
        assert {result.job_id for result in engine.copier.get_finished()} == meta.jobs_to_flush


def fail(*args, **kwargs):
    raise RuntimeError("the launch failed with CUDA error 719")


class TestFp8:
    @pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
    def test_comes_back_as_nearly_the_same_keys_and_values(self, make_engine, order):
        first = make_engine(order, **FP8)
        first.compute("first", FROM)
        load(first)
        exact, own = blocks(first, FROM), blocks(first, TO)
        assert not torch.equal(own, exact)
        assert torch.allclose(own.float(), exact.float(), rtol=1 / 15, atol=1e-2)
        second = make_engine(order, **FP8, local_disk_serde="lossless")
        load(second)
        assert torch.equal(blocks(second, TO), own)

    @pytest.mark.parametrize(("writer", "reader"), [(FP8, KERNELS), (KERNELS, FP8)])
    def test_never_meets_rows_of_another_dtype(self, make_engine, writer, reader):
        make_engine(**writer).compute("first", FROM)
        reading = make_engine(**reader)
        assert reading.match(reading.request("again")) == 0


class TestRefusal:
    @pytest.fixture
    def refused(self, cuda, vllm_config):
        def refused(**extra):
            vllm_config.kv_transfer_config.kv_connector_extra_config = {"lmcache.extra_config": extra}
            with pytest.raises(ConfigError) as error:
                settings.resolve(vllm_config, kv_cache_config())
            return str(error.value)

        return refused

    @pytest.mark.parametrize(
        ("extra", "setting"),
        [
            ({"cuda_page_copier": "kernels"}, "cuda_page_copier: kernels"),
            ({"host_kv_dtype": "fp8"}, "host_kv_dtype: fp8"),
        ],
    )
    def test_without_the_library_names_the_setting_and_how_to_build_it(self, refused, monkeypatch, extra, setting):
        monkeypatch.setattr(pages_cuda, "_library", lambda: None)
        said = refused(**extra)
        assert (
            f'kv_connector_extra_config["lmcache.extra_config"]: extra_config.{setting} needs the CUDA kernels' in said
        )
        assert "scripts/build_cuda.py; or remove it" in said

    def test_on_gpus_of_others_is_said(self, refused, cuda):
        cuda.platform.is_cuda, cuda.platform.device_type = lambda: False, "xpu"
        assert "is for NVIDIA's GPUs, and this platform is xpu" in refused(cuda_page_copier="kernels")

    def test_of_tensors_and_memory_names_the_setting(self, make_engine, monkeypatch):
        monkeypatch.setattr(cuda_copier, "pin_mmap_region", lambda region: None)
        with pytest.raises(ConfigError, match=r"cuda_page_copier: kernels cannot be had here: .* could not be pinned"):
            make_engine(**KERNELS)


class TestSerde:
    """A lossy serde must know where keys and values lie, and that is the copier's choice."""

    @pytest.mark.parametrize(
        ("copier", "layer_bytes", "block_bytes"), [("kernels", PAGE, 2 * PAGE), ("vllm", 2 * PAGE, PAGE)]
    )
    def test_finds_pages_where_the_copier_puts_them(self, make_engine, monkeypatch, copier, layer_bytes, block_bytes):
        worker = make_engine(**KERNELS).worker.connector_worker
        monkeypatch.setitem(worker.spec.extra_config, settings.PAGE_COPIER, copier)
        cells = worker.spec._serde_opener(load_config(environ={})).keywords["layout"].cells[:, 0]
        assert (cells == np.array([[0, block_bytes], [layer_bytes, layer_bytes + block_bytes]])).all()


class TestNamespace:
    """Rows of our kernels and of vLLM's copier have the same pages in another order."""

    @pytest.mark.parametrize(
        ("copier", "loss", "rows"),
        [
            ("host", "", None),
            ("host", "fp8", None),
            ("vllm", "", None),
            ("vllm", "cachegen", "vllm"),
            ("kernels", "", "kernels"),
            ("kernels", "host fp8", "kernels"),
        ],
    )
    def test_says_who_copies_where_that_matters(self, copier, loss, rows):
        assert settings.row_order({settings.PAGE_COPIER: copier}, loss).get("rows") == rows

    def test_of_kernels_is_not_that_of_vllms_copier(self, make_engine, vllm_config, monkeypatch):
        engine = make_engine(**KERNELS)
        name, parts = engine.scheduler._open_namespace(vllm_config, kv_cache_config())
        assert parts["rows"] == "kernels"
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        monkeypatch.setitem(extra, settings.PAGE_COPIER, "vllm")
        other, parts = engine.scheduler._open_namespace(vllm_config, kv_cache_config())
        assert "rows" not in parts
        assert other != name
