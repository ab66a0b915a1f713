"""What `tune` reads: the metrics of a server, as vLLM writes them, for a traffic one chooses."""

from __future__ import annotations

from pathlib import Path

RECORDED = Path(__file__).parent / "data" / "metrics" / "engine.txt"  # of a real server with a tiny model


def metrics(
    *,
    started_s: float,
    prompts: int = 400,
    lengths: tuple[int, ...] = (1000, 4000, 10000),
    looked_up: int = 8_000_000,
    hits: int = 6_000_000,
    bytes_per_token: int = 131072,
    block: int = 16,
) -> str:
    """A quarter of the prompts are up to the first length, three quarters to the second, all to the third."""
    counts = (prompts // 4, prompts * 3 // 4, prompts, prompts)
    bounds = (*(f"{length:.1f}" for length in lengths), "+Inf")
    labels = 'engine="0",model_name="m"'
    rows = [f"process_start_time_seconds {started_s}"]
    rows += [
        f'vllm:request_prompt_tokens_bucket{{{labels},le="{bound}"}} {count}.0'
        for bound, count in zip(bounds, counts, strict=True)
    ]
    rows += [
        f"vllm:request_prompt_tokens_count{{{labels}}} {prompts}.0",
        f"vllm:external_prefix_cache_queries_total{{{labels}}} {looked_up}.0",
        f"vllm:external_prefix_cache_hits_total{{{labels}}} {hits}.0",
        f"vllm:kv_offload_load_bytes_total{{{labels}}} {hits * bytes_per_token}.0",
        f'vllm:cache_config_info{{block_size="{block}",engine="0"}} 1.0',
    ]
    return "\n".join(rows) + "\n"
