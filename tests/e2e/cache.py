"""What the cache tests share: a server with a cache, prompts, and answers that can be compared bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.tiny_model import build
from tests.e2e.server import LMCACHE_ARGS, MODELS, Server, cached_tokens

CHUNK = 256
BLOCK = 128
ROW_BYTES = CHUNK * 8192  # a chunk of the tiny model


def model(arch: str = "llama", **options: int) -> Path:
    """A tiny model of its own directory per recipe."""
    suffix = "".join(f"-{name}{value}" for name, value in sorted(options.items()))
    return build(MODELS / f"tiny-{arch}{suffix}", arch=arch, **options)  # type: ignore[arg-type]


def prompt(seed: int, num_tokens: int, *, shared: int = 0) -> list[int]:
    """Random token ids; the first `shared` of them are the same for every seed."""
    common, own = random.Random(0), random.Random(seed)
    return [common.randrange(8, 264) for _ in range(shared)] + [
        own.randrange(8, 264) for _ in range(num_tokens - shared)
    ]


def cache_server(directory: Path | None = None, **options: Any) -> Server:
    """A server with the cache on. `gpu_blocks` bounds vLLM's own pool; `cache` are LMCACHE_* settings."""
    settings = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5", **options.pop("cache", {})}
    if directory is not None:
        settings |= {"LMCACHE_LOCAL_DISK": str(directory), "LMCACHE_MAX_LOCAL_DISK_SIZE": "2"} | settings
    args = [*LMCACHE_ARGS, *options.pop("args", ())]
    if (blocks := options.pop("gpu_blocks", None)) is not None:
        args.append(f"--num-gpu-blocks-override={blocks}")
    options.setdefault("max_model_len", 4608)
    return Server(options.pop("model", None) or model(), args, settings | options.pop("env", {}), **options)


def ask(server: Server, tokens: Sequence[int], **body: Any) -> dict[str, Any]:
    """A greedy completion with the logprobs that tell wrong KV from right."""
    options = {"max_tokens": 4, "logprobs": 5, "ignore_eos": True, "return_tokens_as_token_ids": True}
    return server.complete(list(tokens), **(options | body))


def evict(server: Server, seed: int = 900, *, prompts: int = 2, num_tokens: int = 4000) -> None:
    """Push everything else out of vLLM's own prefix cache (of a pool of about 40 blocks)."""
    for offset in range(prompts):
        ask(server, prompt(seed + offset, num_tokens), max_tokens=1)


def logprobs(answer: Mapping[str, Any]) -> list[dict[str, float]]:
    """The five likeliest tokens at every step, exactly as the engine computed them."""
    found: list[dict[str, float]] = answer["choices"][0]["logprobs"]["top_logprobs"]
    return found


def nearly_equal(one: Mapping[str, Any], other: Mapping[str, Any], *, nats: float = 0.8) -> bool:
    """Whether the first token's distributions agree, as after KV with a small loss.

    fp8 moves them by 0.4 nats, for random weights make much of little; KV of another prompt, of another head, or keys
    taken for values by 3.6 and more, and no likely token stays one.
    """
    first, second = logprobs(one)[0], logprobs(other)[0]
    common = first.keys() & second.keys()
    return len(common) >= 3 and all(math.isclose(first[token], second[token], abs_tol=nats) for token in common)


def external_hits(server: Server) -> float:
    """Tokens that came from outside vLLM's own prefix cache, so far."""
    return server.metrics().get("vllm:external_prefix_cache_hits_total", 0.0)


def chunk_files(directory: Path) -> list[Path]:
    """Every stored chunk."""
    return sorted(directory.glob("*/*/*.kv"))


__all__ = [
    "BLOCK",
    "CHUNK",
    "ROW_BYTES",
    "ask",
    "cache_server",
    "cached_tokens",
    "chunk_files",
    "evict",
    "external_hits",
    "logprobs",
    "model",
    "nearly_equal",
    "prompt",
]
