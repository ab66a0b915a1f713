"""From the LMCache file to the settings vLLM's offloading framework reads.

The framework is told everything through ``kv_connector_extra_config``, and the API process builds
the metric definitions from the same dictionary before any connector exists. So there is one
function per moment: `announce` needs nothing but vLLM's configuration, `resolve` needs the KV cache
layout too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.math_utils import round_up
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from lmcache_ext.config import Config, load_config, resolve_chunk_tokens
from lmcache_ext.errors import ConfigError
from lmcache_ext.frame import FRAME_BYTES
from lmcache_ext.host_memory import HostMemory, check_host_bytes, fitting_bytes, read_host_memory
from lmcache_ext.offload.element_layout import KV_PAGES, describe, page_shape
from lmcache_ext.offload.rows import rows_path
from lmcache_ext.ops import pages_cuda, pages_fp8, pages_fp8_cuda
from lmcache_ext.ops.page_shape import PageShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.config import OffloadingConfig

logger = init_logger("vllm.lmcache_ext.offload.settings")

NAMESPACE = "lmcache_ext.namespace"
"""Connector setting: hex of the namespace, for the spec."""
HOST_KV_DTYPE = "lmcache_ext.host_kv_dtype"
"""Connector setting: "fp8" where rows hold eight bits for each element, else "auto"."""
PAGE_COPIER = "lmcache_ext.page_copier"
"""Connector setting: who copies pages, a `PageCopierName`."""
WORKER = "lmcache_ext.worker"
"""Connector setting: the number of this engine among those of one instance."""
FLUSH_TIMEOUT = "lmcache_ext.flush_timeout_s"
"""Connector setting: seconds a stopping engine may spend writing what is not yet stored."""
LOAD_FAILURE_POLICY = "lmcache_ext.kv_load_failure_policy"
"""Connector setting: "fail" where a user chose that; the same text as in `plugin`, which imports no vllm."""

PageCopierName = Literal["host", "vllm", "kernels"]
"""`HostPageCopier` on the CPU platform; on GPUs vLLM's own, or `CudaPageCopier`. The second leaves other rows."""

_POLICY_MODULE = "lmcache_ext.offload.policies"
_POLICIES = {
    "LRU": ("lru", None),
    "ARC": ("arc", None),
    "LFU": ("LFUCachePolicy", _POLICY_MODULE),
    "FIFO": ("FIFOCachePolicy", _POLICY_MODULE),
    "MRU": ("MRUCachePolicy", _POLICY_MODULE),
}
_STAGED_PROMPTS = 2  # of the longest possible length, where rows only stage for far tiers


@dataclass(frozen=True, slots=True)
class Settings:
    """What the KV cache of this engine looks like, in numbers."""

    config: Config
    tokens_per_chunk: int
    blocks_per_chunk: int
    row_bytes: int
    """Bytes of one row: one chunk of every rank, padded to pages of memory."""
    host_bytes: int
    """Bytes of all rows."""


def read_config(vllm_config: VllmConfig) -> Config:
    """The LMCache configuration as this engine sees it: file, environment, connector JSON."""
    return load_config(connector_extra=_extra(vllm_config))


def announce(vllm_config: VllmConfig) -> None:
    """Name our spec in the connector's settings, so that every process resolves the same one."""
    _extra(vllm_config).update(spec_name="LMCacheOffloadingSpec", spec_module_path="lmcache_ext.offload.spec")


def resolve(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Settings:
    """Fit the configuration to this model's KV cache and write it where the framework reads it.

    Raises ConfigError where it cannot be fitted.
    """
    announce(vllm_config)
    config = read_config(vllm_config)
    _extra(vllm_config)[KV_PAGES] = describe(vllm_config, kv_cache_config)
    _extra(vllm_config)[HOST_KV_DTYPE] = config.host_kv_dtype
    _extra(vllm_config)[PAGE_COPIER] = _page_copier(config)
    settings = _fit(config, vllm_config, kv_cache_config)
    policy, module = _POLICIES[settings.config.cache_policy]
    _extra(vllm_config).update(
        blocks_per_chunk=settings.blocks_per_chunk,
        cpu_bytes_to_use=settings.host_bytes,
        eviction_policy=policy,
        cache_policy_module_path=module,
        offload_prompt_only=not settings.config.live.save_decode_cache,
    )
    _extra(vllm_config)[FLUSH_TIMEOUT] = float(vllm_config.shutdown_timeout)
    return settings


def host_shape(extra: Mapping[str, Any]) -> PageShape | None:
    """What a page holds where rows have it in eight bits, from the connector's settings; None where they do not."""
    return page_shape(extra[KV_PAGES])[0] if extra.get(HOST_KV_DTYPE) == "fp8" else None


def row_order(extra: Mapping[str, Any], loss: str) -> dict[str, str]:
    """A part of the namespace on GPUs, where copiers differ in the order of pages in a row.

    None of it for vLLM's own without a `loss`, whose rows are what they were before there was another copier.
    """
    copier = extra[PAGE_COPIER]
    return {"rows": copier} if copier == "kernels" or (copier == "vllm" and loss) else {}


def kernels_setting(config: Config) -> str:
    """The setting that asks for our kernels on a GPU, and where it was written, for messages."""
    setting = ("host_kv_dtype", "fp8") if config.host_kv_dtype == "fp8" else ("cuda_page_copier", "kernels")
    key = f"extra_config.{setting[0]}"
    return f"{config.origin(key).text}: {key}: {setting[1]}"


def _page_copier(config: Config) -> PageCopierName:
    """Checked: raises ConfigError where the one that was asked for cannot run here."""
    if current_platform.is_cpu():
        if config.cuda_page_copier != "vllm":
            logger.info("extra_config.cuda_page_copier is for NVIDIA's GPUs: without effect on the CPU platform")
        return "host"
    if config.host_kv_dtype != "fp8" and config.cuda_page_copier == "vllm":
        return "vllm"
    reason = ""
    if not current_platform.is_cuda():
        reason = f"is for NVIDIA's GPUs, and this platform is {current_platform.device_type}"
    elif not (pages_cuda.available() and pages_fp8_cuda.available()):
        reason = "needs the CUDA kernels, which were not built or do not load here: run scripts/build_cuda.py"
    if reason:
        raise ConfigError(f"{kernels_setting(config)} {reason}; or remove it: vLLM's own copier then copies pages")
    return "kernels"


def in_rows(native: OffloadingConfig, shape: PageShape | None) -> OffloadingConfig:
    """vLLM's sizes, of blocks as they lie in rows."""
    if shape is None:
        return native
    return replace(native, worker_kv_bytes_per_block=shape.row_bytes(native.worker_kv_bytes_per_block))


def _extra(vllm_config: VllmConfig) -> dict[str, Any]:
    assert vllm_config.kv_transfer_config is not None
    extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
    return extra


def _fit(config: Config, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Settings:
    extra = _extra(vllm_config)
    extra.pop("blocks_per_chunk", None)  # ours, of an earlier call: `native` counts single blocks
    native = build_offloading_config(vllm_config, kv_cache_config)
    if config.host_kv_dtype == "fp8":
        _check_fp8(config, extra[KV_PAGES], native)
    native = in_rows(native, host_shape(extra))
    copies = 1 if native.replicated_layout else native.parallel.world_size
    block_bytes = native.worker_kv_bytes_per_block * copies
    blocks = _blocks_per_chunk(config, native.groups, kv_cache_config, block_bytes)
    row_bytes = round_up(block_bytes * blocks, SharedOffloadRegion.BLOCK_SIZE_ALIGNMENT)
    tokens = blocks * max(group.tokens_per_block for group in native.groups)
    _check_disk(config, row_bytes, tokens)
    memory = read_host_memory(own_rows=rows_path(native.engine_id))
    max_model_len = vllm_config.model_config.max_model_len
    host_bytes = _host_bytes(config, memory, row_bytes, tokens, len(native.groups), max_model_len)
    return Settings(config, tokens, blocks, row_bytes, host_bytes)


def _check_fp8(config: Config, pages: Mapping[str, Any], native: OffloadingConfig) -> None:
    """Raise ConfigError where rows cannot hold eight bits for each element."""
    shape, reason = page_shape(pages)
    if shape is not None and native.worker_kv_bytes_per_block % shape.page_bytes:
        reason = f"{native.worker_kv_bytes_per_block} bytes of a block are no whole pages of {shape.page_bytes} bytes"
    if reason:
        reason = f"must know which bytes are keys and which are values, and here {reason}"
    elif current_platform.is_cpu() and not pages_fp8.available():
        reason = "needs the compiled page copier: install this package with a C++ compiler at hand"
    if reason:
        raise ConfigError(
            f"{config.origin('extra_config.host_kv_dtype').text}: extra_config.host_kv_dtype: fp8 {reason}; or remove "
            "it: rows then hold the KV cache as it is"
        )


def _check_disk(config: Config, row_bytes: int, chunk_tokens: int) -> None:
    """Raise ConfigError where no chunk would ever fit. What a compressing serde makes of one is not known yet."""
    capacity_bytes, num_paths = config.live.disk_capacity_bytes, len(config.disk_paths)
    needed = (row_bytes + FRAME_BYTES) * num_paths  # each directory has an equal share
    if capacity_bytes is None or config.local_disk_serde != "naive" or capacity_bytes >= needed:
        return
    where = f" in each of {num_paths} directories" if num_paths > 1 else ""
    raise ConfigError(
        f"max_local_disk_size of {capacity_bytes} bytes ({config.origin('max_local_disk_size').text}) holds no chunk: "
        f"one of {chunk_tokens} tokens{where} takes {needed} bytes; raise max_local_disk_size or lower chunk_size"
    )


def _blocks_per_chunk(config: Config, groups: Any, kv_cache_config: KVCacheConfig, block_bytes: int) -> int:  # noqa: ANN401
    specs = [kv_cache_config.kv_cache_groups[group.group_id].kv_cache_spec for group in groups]
    if len(specs) > 1 or not all(_is_full_attention(spec) for spec in specs):
        # Behind a sliding window a chunk of several blocks may be stored with holes.
        logger.info("chunk_size: one vLLM block per chunk, as this model has windowed or recurrent layers")
        return 1
    block_tokens: int = groups[0].tokens_per_block
    return resolve_chunk_tokens(config, block_tokens=block_tokens, bytes_per_block=block_bytes) // block_tokens


def _is_full_attention(spec: Any) -> bool:  # noqa: ANN401
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return all(_is_full_attention(inner) for inner in spec.kv_cache_specs.values())
    return isinstance(spec, FullAttentionSpec | MLAAttentionSpec)


def _host_bytes(
    config: Config, memory: HostMemory, row_bytes: int, chunk_tokens: int, num_groups: int, max_model_len: int
) -> int:
    wanted = config.live.host_capacity_bytes
    if not config.local_cpu:
        rows = _STAGED_PROMPTS * num_groups * -(-max_model_len // chunk_tokens)
        staged = max(rows, 2) * row_bytes
        wanted = min(wanted, staged) if wanted else staged
        logger.info("local_cpu is off: %d bytes of host memory stage chunks for the tiers behind it", wanted)
    origin = config.origin("max_local_cpu_size")
    if origin.kind == "default":
        fitting = fitting_bytes(wanted, memory)
        if fitting < wanted:
            logger.warning(
                "max_local_cpu_size is not set: taking %d of the default %d bytes, half of what fits here",
                fitting,
                wanted,
            )
        wanted = fitting
    check_host_bytes(wanted, memory, origin=origin.text)
    if wanted < row_bytes:
        raise ConfigError(
            f"max_local_cpu_size of {wanted} bytes ({origin.text}) holds no chunk: one chunk of {chunk_tokens} tokens "
            f"takes {row_bytes} bytes; raise max_local_cpu_size or lower chunk_size"
        )
    return wanted
