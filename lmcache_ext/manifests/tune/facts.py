"""What the metrics of a server say about its traffic and its cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lmcache_ext.errors import ManifestError
from lmcache_ext.manifests.tune.metrics import Metrics

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class Facts:
    """None where the server does not say."""

    uptime_s: float | None = None
    prompts: int = 0
    prompt_tokens_p25: float | None = None
    prompt_tokens_p50: float | None = None
    prompt_tokens_p90: float | None = None
    requested_tokens: float | None = None  # that vLLM's own cache did not have
    hit_tokens: float = 0.0  # and a tier of ours had
    block_tokens: int | None = None
    kv_bytes_per_token: float | None = None
    used_bytes: dict[str, float] | None = None  # by tier
    capacity_bytes: dict[str, float] | None = None

    @property
    def new_tokens_per_s(self) -> float | None:
        """Prompt tokens that no tier had: what a cache would have to keep."""
        if not self.uptime_s or self.requested_tokens is None:
            return None
        return max(0.0, self.requested_tokens - self.hit_tokens) / self.uptime_s

    @property
    def hit_share(self) -> float | None:
        return self.hit_tokens / self.requested_tokens if self.requested_tokens else None

    def lines(self) -> list[str]:
        """For a reader, one fact a line."""
        rows = [
            ("uptime", self.uptime_s and f"{self.uptime_s / 3600:.1f} h"),
            ("prompts", f"{self.prompts}"),
            ("prompt tokens", self.prompt_tokens_p50 and _quantiles(self)),
            ("looked up", self.requested_tokens and f"{self.requested_tokens:.0f} tokens"),
            ("hit", self.hit_share is not None and f"{self.hit_tokens:.0f} tokens ({self.hit_share:.0%})"),
            ("vLLM's block", self.block_tokens and f"{self.block_tokens} tokens"),
            ("KV", self.kv_bytes_per_token and f"{self.kv_bytes_per_token / 1024:.4g} KiB per token"),
        ]
        return [f"{name}: {text or 'not known'}" for name, text in rows]


def _quantiles(facts: Facts) -> str:
    bounds = (facts.prompt_tokens_p25, facts.prompt_tokens_p50, facts.prompt_tokens_p90)
    return ", ".join(f"{share} up to {bound:.0f}" for share, bound in zip(("25%", "50%", "90%"), bounds, strict=True))


def read_facts(text: str, *, now_s: float, kv_bytes_per_token: float | None = None) -> Facts:
    """Facts of one server; ``kv_bytes_per_token`` wins over what its metrics let one conclude."""
    metrics = Metrics(text)
    started_s = metrics.total("process_start_time_seconds")
    lengths = "vllm:request_prompt_tokens"
    quantiles = [metrics.quantile(lengths, share) for share in (0.25, 0.5, 0.9)]
    block = [each.labels.get("block_size", "") for each in metrics.of("vllm:cache_config_info")]
    return Facts(
        uptime_s=max(1.0, now_s - started_s) if started_s else None,
        prompts=int(metrics.total(f"{lengths}_count") or 0),
        prompt_tokens_p25=quantiles[0],
        prompt_tokens_p50=quantiles[1],
        prompt_tokens_p90=quantiles[2],
        requested_tokens=metrics.total("vllm:external_prefix_cache_queries"),
        hit_tokens=metrics.total("vllm:external_prefix_cache_hits") or 0.0,
        block_tokens=int(block[0]) if block and block[0].isdigit() else None,
        kv_bytes_per_token=kv_bytes_per_token or _bytes_per_token(metrics),
        used_bytes=metrics.by_label("lmcache_ext:tier_used_bytes", "tier") or None,
        capacity_bytes=metrics.by_label("lmcache_ext:tier_capacity_bytes", "tier") or None,
    )


def _bytes_per_token(metrics: Metrics) -> float | None:
    """What went from host memory to the engine, by the tokens that came with it; None before the first hit."""
    loaded = metrics.total("vllm:kv_offload_load_bytes")
    tokens = metrics.total("vllm:external_prefix_cache_hits")
    return loaded / tokens if loaded and tokens else None


def model_bytes_per_token(path: Path, kv_dtype: str | None = None) -> float:
    """KV of one token of a model, by its config.json: two of each layer's key-value heads, in the model's dtype."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read as a model's config.json: {error}") from None
    config = config.get("text_config", config)
    dtype = kv_dtype or config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    try:
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        latent = config.get("kv_lora_rank")
        width = latent + config["qk_rope_head_dim"] if latent else 2 * config.get("num_key_value_heads", heads) * head
        return float(layers * width * _DTYPE_BYTES[dtype])
    except (KeyError, TypeError) as error:
        raise ManifestError(
            f"{path}: no {error}, so the size of its KV is not known: give --kv-bytes-per-token"
        ) from None
