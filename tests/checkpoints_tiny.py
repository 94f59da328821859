"""Tiny checkpoints of every family, made by transformers with random parameters (norm gains and biases too)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # measured crossovers of tiny layers are nobody's business

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB = 40


def _neox(**changes):
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(options | changes)))


def _gpt2(**changes):
    options = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(options | {"eos_token_id": 0} | changes)))


def _llama(**changes):
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**(options | changes)))


VARIANTS: dict[str, Callable] = {
    "neox": _neox,
    "neox-sequential": lambda: _neox(use_parallel_residual=False, hidden_act="relu"),
    "neox-no-attention-bias": lambda: _neox(attention_bias=False),
    "gpt2": lambda: _gpt2(tie_word_embeddings=False),
    "gpt2-tied": lambda: _gpt2(n_inner=72),
    "llama": _llama,
    "llama-tied-biased": lambda: _llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-scaled-rope": lambda: _llama(
        num_key_value_heads=4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random, at a scale that makes attention and the FFN matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            gain = p.dim() == 1 and "weight" in name
            p.copy_(1 + 0.3 * noise if gain else noise * (0.3 if p.dim() == 1 else 0.25))


def save_tokenizer(directory: Path) -> None:
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(directory)


@contextmanager
def true_float64() -> Iterator[None]:
    """transformers casts to float32 inside norms, softmax and RoPE; here every such cast gives float64 instead."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "float32", torch.float64)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    try:
        yield
    finally:
        patch.undo()


def reference_logits(directory: Path, tokens: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """What transformers alone computes."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        if dtype == torch.float64:
            with true_float64():
                return model(input_ids=tokens).logits
        return model(input_ids=tokens).logits


def write_lines(file: Path, count: int = 400) -> Path:
    """Text of `count` random words of the tiny tokenizer."""
    picks = torch.randint(2, VOCAB, (count,), generator=torch.Generator().manual_seed(9)).tolist()
    file.write_text(" ".join(f"w{i}" for i in picks))
    return file


def edit_config(directory: Path, name: str = "config.json", /, **changes) -> None:
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
