"""A tiny random model with a tokenizer and a chat template, made in code: nothing is downloaded.

    python examples/tiny_model.py DIR [--arch llama|gemma3] [--layers 4] [--seed 0] [--lora DIR]

The same arguments always give the same weights, and a directory that already holds them is left
alone. One UTF-8 byte is one token, so a prompt of 4,000 ASCII characters is 4,000 tokens and every
text round-trips. The default (4 layers, 4 KV heads of 64) keeps 8 KiB of float32 KV per token; serve
it with --dtype=float32, which CPUs without AVX-512 BF16 compute nine times faster than bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

Arch = Literal["llama", "gemma3"]

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_1|>", "<|extra_2|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STAMP = "tiny_model.json"  # written last: a directory with it is complete
FORMAT = 1  # raise it when the same arguments should give other files


@dataclass(frozen=True)
class Recipe:
    """All that decides the files: two equal recipes give equal bytes."""

    arch: Arch = "llama"
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    max_position: int = 32768
    sliding_window: int = 256  # gemma3 only; every fourth layer sees everything
    seed: int = 0
    format: int = FORMAT


def build(path: str | Path, arch: Arch = "llama", **options: int) -> Path:
    """Make the model at `path` unless it is there already; returns the path. Options are Recipe's fields."""
    path = Path(path)
    recipe = Recipe(arch=arch, **options)
    stamp = json.dumps(asdict(recipe), sort_keys=True)
    if (path / STAMP).is_file() and (path / STAMP).read_text() == stamp:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    _write_model(draft, recipe)
    (draft / STAMP).write_text(stamp)
    return _publish(draft, path)


def build_lora(path: str | Path, base: str | Path, *, rank: int = 8, seed: int = 1) -> Path:
    """Make a random LoRA adapter in PEFT's format for the model at `base`; returns the path."""
    path, base = Path(path), Path(base)
    recipe = Recipe(**json.loads((base / STAMP).read_text()))
    stamp = json.dumps({"base": asdict(recipe), "rank": rank, "seed": seed}, sort_keys=True)
    if (path / STAMP).is_file() and (path / STAMP).read_text() == stamp:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    save_file(_lora_weights(recipe, rank, seed), draft / "adapter_model.safetensors", metadata={"format": "pt"})
    (draft / "adapter_config.json").write_text(json.dumps(_lora_config(base, rank), indent=2))
    (draft / STAMP).write_text(stamp)
    return _publish(draft, path)


def _publish(draft: Path, path: Path) -> Path:
    """Two builders may race: whoever renames last wins, and both wrote the same bytes."""
    if path.exists():
        shutil.rmtree(path)
    draft.chmod(0o755)
    draft.rename(path)
    return path


def _write_model(path: Path, recipe: Recipe) -> None:
    tokenizer = make_tokenizer(recipe.max_position)
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _gemma3(recipe) if recipe.arch == "gemma3" else _llama(recipe)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 4], pad_token_id=0)
    model.save_pretrained(path)


def make_tokenizer(max_position: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token per UTF-8 byte, specials first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_position,
        clean_up_tokenization_spaces=False,
    )


def _shape(recipe: Recipe) -> dict[str, Any]:
    return {
        "vocab_size": len(SPECIAL_TOKENS) + 256,
        "hidden_size": recipe.hidden,
        "intermediate_size": 2 * recipe.hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": recipe.max_position,
        # wide enough that attention depends on content, so that a wrong KV page changes the answer
        "initializer_range": 1.5 / recipe.hidden**0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def _llama(recipe: Recipe) -> Any:
    return LlamaForCausalLM(LlamaConfig(**_shape(recipe), tie_word_embeddings=False))


def _gemma3(recipe: Recipe) -> Any:
    kinds = ["full_attention" if (layer + 1) % 4 == 0 else "sliding_attention" for layer in range(recipe.layers)]
    config = Gemma3TextConfig(
        **_shape(recipe),
        layer_types=kinds,
        sliding_window=recipe.sliding_window,
        query_pre_attn_scalar=recipe.head_dim,
    )
    return Gemma3ForCausalLM(config)


def _lora_weights(recipe: Recipe, rank: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    outputs = {"q_proj": recipe.heads * recipe.head_dim, "v_proj": recipe.kv_heads * recipe.head_dim}
    for layer in range(recipe.layers):
        for name, width in outputs.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            # A: [rank, hidden], B: [width, rank]
            weights[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(rank, recipe.hidden, generator=generator)
            weights[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(width, rank, generator=generator)
    return weights


def _lora_config(base: Path, rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny random model for trying the server without a download.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--arch", choices=["llama", "gemma3"], default="llama")
    parser.add_argument("--layers", type=int, default=Recipe.layers)
    parser.add_argument("--hidden", type=int, default=Recipe.hidden)
    parser.add_argument("--kv-heads", type=int, default=Recipe.kv_heads)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--lora", type=Path, help="also make a random LoRA adapter for it, in this directory")
    args = parser.parse_args()
    path = build(args.path, args.arch, layers=args.layers, hidden=args.hidden, kv_heads=args.kv_heads, seed=args.seed)
    print(path)
    if args.lora:
        print(build_lora(args.lora, path))


if __name__ == "__main__":
    main()
