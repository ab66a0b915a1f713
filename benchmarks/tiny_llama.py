"""Trains a small Llama on the text that ships with Python, so that attention has structure to compress.

Run: ``python benchmarks/tiny_llama.py [--steps 800] [--model second]``. Random weights say nothing about codecs for KV:
their keys have no channels that stand out and their values no neighbours that are alike. The first model has 8 layers,
4 query and 2 KV heads of 64 and a vocabulary of 2,048 byte pairs, and learns the sources of the standard library and
`pydoc`'s topics; the second differs in seed and shape. A core of 2023 takes ten minutes for one, and up to 40 beside
other work. Deterministic for one Python and one torch; the result, a directory as Hugging Face writes it, is kept under
``.cache`` by a digest of the recipe. The last `HELD_OUT_SHARE` of the text is never trained on; ``training.json`` says
how well it is foretold, behind as much text as `benchmarks/serde.py` stores.

Matrices are trained by Muon (Jordan et al., 2024), whose steps are worth several of AdamW's here, all else by AdamW.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "trained-llama"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
NEVER_LEARNT = {"test", "tests", "idlelib", "encodings", "lib2to3"}

VOCABULARY = 2048
CONTEXT = 512  # tokens of a training sequence,
LONG_CONTEXT = 1152  # and of those of the last steps, as long as the documents of benchmarks/serde.py
LONG_SHARE = 0.25
STEP_TOKENS = 2048  # at least
MAX_POSITIONS = 2048
PEAK_RATE = 3e-3
MATRIX_RATE = 2e-2
WARMUP_STEPS = 40
HELD_OUT_SHARE = 0.02
STEPS = 800
RECIPE = 2


@dataclass(frozen=True)
class Variant:
    """What one of the models has of its own; the seed decides the weights it begins with, the batches, and the files
    that are held out."""

    seed: int
    layers: int
    head_dim: int


VARIANTS = {"first": Variant(seed=0, layers=8, head_dim=64), "second": Variant(seed=1, layers=6, head_dim=128)}


def shape(variant: Variant) -> LlamaConfig:
    """A model: narrow, but deep enough for a schedule over layers, and with grouped heads of a usual size."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=variant.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=variant.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )


def corpus(seed: int) -> str:
    """Every source of the standard library but its tests, in an order that mixes the packages, then held-out text."""
    salt = str(seed) if seed else ""
    paths = [path for path in _sources() if not NEVER_LEARNT & set(path.parts)]
    paths.sort(key=lambda path: hashlib.sha256((salt + path.as_posix()).encode()).digest())
    return "\n".join(_read(path) for path in paths)


def unseen_sources() -> list[str]:
    """The files that no model learns from, whatever its seed: tests, IDLE, 2to3. In an order that mixes them."""
    paths = [path for path in _sources() if NEVER_LEARNT & set(path.parts) and "encodings" not in path.parts]
    paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    return [_read(path) for path in paths]


def _sources() -> list[Path]:
    """Of the standard library, relative to where it lies."""
    packages = {"site-packages", "dist-packages"}
    paths = (path.relative_to(STDLIB) for path in STDLIB.rglob("*.py"))
    return [path for path in paths if not packages & set(path.parts)]


def _read(path: Path) -> str:
    return (STDLIB / path).read_text(encoding="utf-8", errors="replace")


def split(text: str) -> tuple[str, str]:
    """Text to learn, and text that is only ever evaluated on."""
    border = int(len(text) * (1 - HELD_OUT_SHARE))
    return text[:border], text[border:]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text[:3_000_000]], VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def batches(tokens: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Token ids (batch, context) from random places."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        context = CONTEXT if step < steps * (1 - LONG_SHARE) else LONG_CONTEXT
        starts = torch.randint(0, len(tokens) - context, (-(-STEP_TOKENS // context),), generator=generator)
        yield torch.stack([tokens[start : start + context] for start in starts.tolist()])


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for embeddings and norms."""
    matrices = [weights for weights in model.model.layers.parameters() if weights.ndim == 2]
    known = set(matrices)
    others = [weights for weights in model.parameters() if weights not in known]
    return [
        torch.optim.Muon(matrices, MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int, seed: int) -> list[float]:
    """Fit `model` to `tokens`; the loss, in nats per token, of each step."""
    fitting = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: rate(step, steps)) for each in fitting]
    losses, begin = [], time.monotonic()
    for step, batch in enumerate(batches(tokens, steps, seed)):
        with torch.autocast("cpu", torch.bfloat16, enabled=_has_fast_bfloat16()):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*fitting, *schedules):
            each.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}/{steps}: loss {losses[-1]:.3f}, {time.monotonic() - begin:.0f} s", flush=True)
    return losses


@torch.inference_mode()
def foretell(model: LlamaForCausalLM, tokens: torch.Tensor, num_documents: int = 24) -> float:
    """The mean loss, in nats per token, behind LONG_CONTEXT - 128 tokens of unseen text."""
    losses = []
    for first in range(0, len(tokens) - LONG_CONTEXT, len(tokens) // num_documents):
        document = tokens[first : first + LONG_CONTEXT]
        logits = model(input_ids=document[None]).logits[0, -129:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, document[-128:]).item())
    return sum(losses) / len(losses)


def _has_fast_bfloat16() -> bool:
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def recipe(steps: int, variant: Variant) -> str:
    """A digest of what the weights follow from, but for this file's code: raise RECIPE with a change of that."""
    numbers = (RECIPE, steps, CONTEXT, LONG_CONTEXT, LONG_SHARE, STEP_TOKENS, PEAK_RATE, MATRIX_RATE, WARMUP_STEPS)
    versions = f"{torch.__version__}/{sysconfig.get_python_version()}"
    text = f"{numbers}/{variant.seed}/{shape(variant).to_json_string()}/{versions}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trained(steps: int = STEPS, name: str = "first") -> Path:
    """The directory of a trained model; trains it if it is not there yet."""
    variant = VARIANTS[name]
    directory = CACHE / recipe(steps, variant)
    if (directory / "config.json").exists():
        return directory
    torch.manual_seed(variant.seed)
    text, held_out = split(corpus(variant.seed))
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    model = LlamaForCausalLM(shape(variant))
    print(f"Training a model, which takes a core 10 to 40 minutes; it is kept in {directory}", flush=True)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens to learn from", flush=True)
    losses = train(model, tokens, steps, variant.seed)
    partial = directory.with_name(f"{directory.name}.{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "held_out.txt").write_text(held_out)
    report = {"steps": steps, "loss": losses[-20:], **held_out_loss(model, tokenizer, held_out)}
    (partial / "training.json").write_text(json.dumps(report))
    partial.rename(directory)
    print(report, flush=True)
    return directory


def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, float]:
    ids = tokenizer(text)["input_ids"]
    nats = foretell(model.eval(), torch.tensor(ids))
    return {
        "held_out_nats_per_token": nats,
        "held_out_bits_per_byte": nats / math.log(2) * len(ids) / len(text.encode()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--model", choices=VARIANTS, default="first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(trained(options.steps, options.model))


if __name__ == "__main__":
    main()
