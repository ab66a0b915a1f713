"""What the serdes are measured on: documents, their exact KV, and what a model says after it.

Documents are of two kinds. Those to choose by (`chosen_by`) are windows of the text that a model was not trained on:
the defaults of serdes were chosen on them. Those to report on (`reported_on`) are files, one document each, that no
model has learnt from and that nothing was chosen by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from benchmarks.tiny_llama import unseen_sources

CHUNK = 256
CONTEXT = 4 * CHUNK
CONTINUATION = 128
LENGTH = CONTEXT + CONTINUATION

Tokenize = Callable[[str], list[int]]


@dataclass
class Documents:
    """Token ids (documents, LENGTH), their exact KV and what the model says after it."""

    tokens: torch.Tensor
    kv: torch.Tensor  # (documents, layers, 2, heads, CONTEXT, dim) bfloat16
    log_probs: torch.Tensor  # (documents, CONTINUATION, vocabulary)


def load_model(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def chosen_by(directory: Path, count: int) -> torch.Tensor:
    """Token ids (count, LENGTH) of windows of the held-out text of the model there."""
    ids = _tokenize(directory)((directory / "held_out.txt").read_text())
    starts = [i * (len(ids) - LENGTH) // max(1, count - 1) for i in range(count)]
    return torch.tensor([ids[start : start + LENGTH] for start in starts])


def reported_on(directory: Path, count: int) -> torch.Tensor:
    """Token ids (count or fewer, LENGTH) of the beginnings of files that are long enough."""
    tokenize = _tokenize(directory)
    found: list[list[int]] = []
    for text in unseen_sources():
        if len(found) < count and len(ids := tokenize(text[: 16 * LENGTH])) >= LENGTH:
            found.append(ids[:LENGTH])
    return torch.tensor(found)


def _tokenize(directory: Path) -> Tokenize:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return lambda text: list(tokenizer(text)["input_ids"])


@torch.inference_mode()
def read(model: LlamaForCausalLM, tokens: torch.Tensor) -> Documents:
    """Compute documents once, with KV rounded to bfloat16."""
    kv = []
    for document in tokens:
        cache = model(document[None, :CONTEXT], use_cache=True).past_key_values
        layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
        kv.append(torch.stack(layers).to(torch.bfloat16))
    exact = torch.stack(kv)
    log_probs = torch.stack([continue_with(model, row, document) for row, document in zip(exact, tokens, strict=True)])
    return Documents(tokens, exact, log_probs)


@torch.inference_mode()
def continue_with(model: LlamaForCausalLM, kv: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    """Log probabilities (CONTINUATION, vocabulary) of what follows a context whose KV is `kv`."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kv.float()):
        cache.update(keys[None], values[None], layer)
    logits = model(document[None, CONTEXT:], past_key_values=cache, use_cache=True).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)
