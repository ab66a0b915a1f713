"""One connector's two halves without the engine around them, for tests: `Engine` plays the steps of vLLM's."""

from __future__ import annotations

import json
import time
import uuid
from types import SimpleNamespace

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from lmcache_ext.connector import LMCacheConnectorV1
from tests.unit.answers import await_answers

BLOCK, NUM_BLOCKS, PAGE, CHUNK = 16, 32, 4096, 32
LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
PROMPT = list(range(100))  # three chunks of 32 tokens, and four tokens
HASH_FN = get_hash_fn_by_name("sha256_cbor")
WAIT_S = 10.0


def make_vllm_config(model, **options):
    """vLLM's configuration for a tiny Llama in the directory `model`."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"head_dim": 32, "num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 512}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **shape}
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=256,
        block_size=BLOCK,
        prefix_caching_hash_algo="sha256_cbor",
        enforce_eager=True,
        kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"),
        **options,
    ).create_engine_config()


def kv_cache_config():
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    size = len(LAYERS) * NUM_BLOCKS * PAGE
    tensor = KVCacheTensor(size=size, layers=LAYERS, layer_stride=NUM_BLOCKS * PAGE, block_stride=PAGE)
    return KVCacheConfig(NUM_BLOCKS, [tensor], [KVCacheGroupSpec(LAYERS, spec)], kv_cache_layout="LBHNC")


class Engine:
    """What vLLM's engine does with a connector, in the order in which it does it."""

    def __init__(self, vllm_config, path, *, connector=None, **settings):
        extra = {"lmcache.chunk_size": CHUNK, "lmcache.max_local_cpu_size": "1Mi"}
        extra |= {"lmcache.local_disk": f"file://{path}", "lmcache.max_local_disk_size": "64Mi"}
        extra |= {f"lmcache.{name}": value for name, value in settings.items()} | (connector or {})
        self.transfer = vllm_config.kv_transfer_config
        self.transfer.kv_connector_extra_config = extra
        self.transfer.engine_id = self.engine_id = f"test-{uuid.uuid4().hex}"
        self.transfer.kv_load_failure_policy = "fail"
        vllm_config.shutdown_timeout = 10
        self.worker = LMCacheConnectorV1(vllm_config, KVConnectorRole.WORKER, kv_cache_config())
        self.register_kv()
        self.scheduler = LMCacheConnectorV1(vllm_config, KVConnectorRole.SCHEDULER, kv_cache_config())
        self.region = self.scheduler.scheduler.manager.primary_tier._mmap_region
        self.requests: dict[str, Request] = {}

    def register_kv(self):
        """Before the scheduler is there, who maps the rows last."""
        self.kv = [torch.randint(-128, 127, (NUM_BLOCKS, PAGE), dtype=torch.int8) for _ in LAYERS]
        caches = CanonicalKVCaches(
            [CanonicalKVCacheTensor(tensor, PAGE) for tensor in self.kv],
            [[CanonicalKVCacheRef(i, PAGE) for i in range(len(LAYERS))]],
        )
        self.worker.connector_worker._init_worker(caches)

    @property
    def copier(self):
        return self.worker.connector_worker.worker

    @property
    def jobs(self):
        return self.scheduler.scheduler._jobs

    def pinned(self):
        chunks = self.scheduler.scheduler.manager.primary_tier._policy.chunks.values()
        return sum(chunk.ref_cnt != 0 for chunk in chunks)

    def request(self, req_id, tokens=PROMPT, params=None, **attributes):
        """`params` are its kv_transfer_params."""
        sampling = SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params})
        request = Request(req_id, tokens, sampling, None, block_hasher=hasher(), **attributes)
        self.requests[req_id] = request
        self.scheduler.on_new_request(request)
        return request

    def match(self, request):
        """The connector's final answer, stepping while it says that it does not know yet."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            tokens, _ = self.scheduler.get_num_new_matched_tokens(request, 0)
            if tokens is not None:
                return tokens
            self.step()
            for tier in self.scheduler.scheduler.manager.secondary_tiers:
                assert tier._pool.drain(WAIT_S)
                await_answers(tier)
        raise AssertionError("never answered")

    def begin_load(self, request, blocks):
        """Allocate `blocks` for what `match` found, and plan the load."""
        tokens = self.match(request)
        allocated = KVCacheBlocks(([kv_cache_utils.KVCacheBlock(block) for block in blocks],))
        self.scheduler.update_state_after_alloc(request, allocated, tokens)
        if tokens:
            request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        return tokens

    def step(self, new=None, finished=()):
        """One engine step; `new` is (request, block ids) that is computed in it. Returns what workers reported."""
        output = SchedulerOutput.make_empty()
        if new is not None:
            request, blocks = new
            output.scheduled_new_reqs = [SimpleNamespace(req_id=request.request_id, block_ids=(blocks,))]
            output.num_scheduled_tokens = {request.request_id: request.num_tokens}
            output.total_num_scheduled_tokens = request.num_tokens
        output.finished_req_ids = set(finished)
        return self.run_worker(self.scheduler.build_connector_meta(output), output.finished_req_ids)

    def run_worker(self, meta, finished=frozenset()):
        worker = self.worker
        worker.handle_preemptions(meta)
        worker.bind_connector_metadata(meta)
        worker.start_load_kv(None)
        worker.wait_for_save()
        self.finish_copies()
        results = worker.get_transfer_results(finished)
        report = KVConnectorOutput(
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        self.scheduler.update_connector_output(report)
        return report

    def finish_copies(self):
        self.copier.wait_for(set(self.copier._pending), WAIT_S)

    def compute(self, req_id, blocks, tokens=PROMPT, **attributes):
        """A request that is computed in `blocks`, stored and gone."""
        request = self.request(req_id, tokens, **attributes)
        assert self.begin_load(request, []) == 0
        self.step((request, blocks))
        self.finish(request)
        for _ in range(20):
            if not self.scheduler.has_pending_push_work():
                return
            self.step()
            assert self.scheduler.scheduler.manager.secondary_tiers[0]._pool.drain(WAIT_S)
        raise AssertionError("work never ends")

    def finish(self, request):
        request.status = RequestStatus.FINISHED_STOPPED
        assert self.scheduler.request_finished_all_groups(request, ([],)) == (False, None)
        self.step(finished={request.request_id})

    def counted(self, name):
        stats = self.scheduler.get_kv_connector_stats()
        return {} if stats is None else stats._values.get(name, {})

    def close(self):
        self.worker.shutdown()
        self.scheduler.shutdown()


def hasher():
    return kv_cache_utils.get_request_block_hasher(BLOCK, HASH_FN)


def output_of(request, blocks):
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [SimpleNamespace(req_id=request.request_id, block_ids=(blocks,))]
    output.num_scheduled_tokens = {request.request_id: request.num_tokens}
    output.total_num_scheduled_tokens = request.num_tokens
    return output
