"""Whole models in normal form: logits and losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.weights import Weights
from .block import block, norm, rope_table
from .loss import cross_entropy


def embed(weights: Weights, tokens: Tensor) -> Tensor:
    """tokens (batch, T) -> residual stream (batch, T, d)."""
    x = F.embedding(tokens, weights.ends["embed"])
    if "positions" in weights.ends:
        x = x + weights.ends["positions"][: tokens.shape[1]]
    return x


def final_stream(weights: Weights, tokens: Tensor) -> Tensor:
    """tokens (batch, T) -> what the head reads (batch, T, d)."""
    spec = weights.spec
    x = embed(weights, tokens)
    rope = rope_table(spec, tokens.shape[1], x.dtype, x.device)
    for slots in weights.blocks:
        x = block(spec, slots, x, rope)
    return norm(spec, weights.ends, "final_norm", x)


def logits(weights: Weights, tokens: Tensor) -> Tensor:
    """tokens (batch, T) -> (batch, T, V)."""
    return F.linear(final_stream(weights, tokens), weights.ends["head"], weights.ends.get("head_bias"))


def next_token_loss(weights: Weights, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting tokens[:, 1:] from tokens[:, :-1]; differentiable."""
    hidden = final_stream(weights, tokens[:, :-1]).flatten(0, 1)
    return cross_entropy(hidden, weights.ends["head"], weights.ends.get("head_bias"), tokens[:, 1:].flatten())


@torch.no_grad()
def mean_loss(weights: Weights, blocks: Tensor, batch: int = 32) -> float:
    """Mean next-token loss in nats over token blocks (n, T), each block on its own."""
    total = 0.0
    for part in blocks.split(batch):
        total += next_token_loss(weights, part).item() * len(part)
    return total / len(blocks)
