"""What makes two engines' KV interchangeable, read off vLLM's configuration.

Token ids, LoRA name, multimodal content and ``cache_salt`` are already in vLLM's block hashes.
Everything else that decides the bytes of a page, or what a hash means, is a component here.
"""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils

from lmcache_ext.namespace import weights_identity

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.lmcache_ext.offload.identity")

_VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "name_or_path", "_commit_hash")


def shareable_hash(vllm_config: VllmConfig) -> bool:
    """Whether block hashes mean the same in another process (xxhash has a random seed per process)."""
    return not vllm_config.cache_config.prefix_caching_hash_algo.startswith("xxhash")


def components(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *, blocks_per_chunk: int, row_bytes: int
) -> dict[str, str]:
    """Name -> text of everything two engines must agree on. Call it in EngineCore."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    return {
        "vllm": ".".join(vllm.__version__.split(".")[:2]),  # may pack a page anew under the same names
        "model": _model(vllm_config),
        "weights": _weights(vllm_config.model_config, vllm_config.load_config),
        "speculative": _speculative(vllm_config),
        "kv_dtype": f"{vllm_config.model_config.dtype}/{cache.cache_dtype}",
        "kv_layout": f"{getattr(cache, 'kv_cache_layout', None)}/{_page_format(vllm_config, kv_cache_config)}",
        "groups": _groups(kv_cache_config),
        "chunk": f"blocks={blocks_per_chunk} row={row_bytes}",
        "parallel": (
            f"tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size} "
            f"dcp={parallel.decode_context_parallel_size} pcp={parallel.prefill_context_parallel_size}"
        ),
        "hash": _hash_scheme(vllm_config),
    }


def _model(vllm_config: VllmConfig) -> str:
    model = vllm_config.model_config
    settings: dict[str, Any] = model.hf_config.to_dict()
    for key in _VOLATILE_CONFIG_KEYS:
        settings.pop(key, None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{model.architectures}/{model.quantization}/{text}"


def _weights(model: ModelConfig, load: LoadConfig) -> str:
    if load.load_format == "dummy":
        return f"dummy seed={model.seed}"
    place = _local_weights(model, load)
    identity = weights_identity(place) if place else None
    if identity is not None:
        return identity
    commit = getattr(model.hf_config, "_commit_hash", None)
    if commit is not None and not Path(model.model).exists():
        return f"name={model.model} commit={commit}"
    logger.warning(
        "No weight files of %s found on this machine: its chunks are shared with no other start", model.model
    )
    return f"unknown {secrets.token_hex(16)}"  # a path or a name alone is no identity


def _local_weights(model: ModelConfig, load: LoadConfig) -> Path | None:
    """The directory (or the one file) that the weights were read from."""
    if Path(model.model).exists():
        return Path(model.model)
    from huggingface_hub import try_to_load_from_cache

    for cache_dir in (load.download_dir, None):
        with contextlib.suppress(ValueError):  # not the name of a repository
            config = try_to_load_from_cache(model.model, "config.json", cache_dir=cache_dir, revision=model.revision)
            if isinstance(config, str):
                return Path(config).parent
    return None


def _speculative(vllm_config: VllmConfig) -> str:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return ""
    draft = speculative.draft_model_config
    weights = _weights(draft, vllm_config.load_config) if draft is not None else ""
    return f"{speculative.method}/{weights}"


def _page_format(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """What the bytes inside a page mean beyond their layout: on CPU, an ISA's own packing."""
    if not current_platform.is_cpu():
        backend = vllm_config.attention_config.backend
        return f"{current_platform.device_type}/{backend}"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype = vllm_config.model_config.dtype
    isas = set()
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        head_size = getattr(spec, "head_size", None)
        isas.add(_get_attn_isa(dtype, spec.block_size, head_size, vllm_config.cache_config.cache_dtype))
    vector = "avx512" if torch.cpu._is_avx512_supported() else "base"
    return f"cpu/{platform.machine()}/{vector}/{sorted(isas)}"


def _groups(kv_cache_config: KVCacheConfig) -> str:
    return repr([(group.layer_names, repr(group.kv_cache_spec)) for group in kv_cache_config.kv_cache_groups])


def _hash_scheme(vllm_config: VllmConfig) -> str:
    """The algorithm, its seed and vLLM's chaining, all seen through one hash of known tokens."""
    found = hashing(vllm_config)
    name = found["algorithm"]
    if name == "sha256":  # hashes a pickle, whose bytes follow the Python version
        name += f"/python{platform.python_version()}"
    return f"{name}/{found['probe']}"


def hashing(vllm_config: VllmConfig) -> dict[str, str]:
    """The algorithm, what it makes of the seed (`none_hash`) and of a block of the tokens 1, 2, 3 (`probe`)."""
    name = vllm_config.cache_config.prefix_caching_hash_algo
    hash_fn = get_hash_fn_by_name(name)
    # EngineCore sets its NONE_HASH only after the connector is built, from this same seed.
    none_hash = kv_cache_utils.BlockHash(hash_fn(kv_cache_utils.resolve_none_hash_seed(hash_fn)))
    probe = kv_cache_utils.hash_block_tokens(hash_fn, none_hash, (1, 2, 3), None)
    return {"algorithm": name, "none_hash": none_hash.hex(), "probe": probe.hex()}
