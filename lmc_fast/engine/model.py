"""Whole models in normal form: from tokens or images to logits and losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.weights import Slots, Weights
from ..errors import LmcError
from ..examples import Data, Examples
from .attention import Positions
from .block import block, norm
from .ffn import ACTIVATIONS
from .loss import capped, cross_entropy


def embed(weights: Weights, inputs: Tensor) -> Tensor:
    """Token ids (batch, T), or images (batch, c, size, size), -> residual stream (batch, T, d)."""
    spec, w = weights.spec, weights.ends
    if spec.image:
        x = _embed_image(spec, w, inputs)
    else:
        x = F.embedding(inputs, w["embed"]) * spec.embed_scale
        if "positions" in w:
            x = x + w["positions"][_places(spec, inputs)]
        if "types" in w:
            x = x + w["types"][0]
    return norm(spec, w, "embed_norm", x) if spec.embed_norm else x


def _places(spec: Spec, tokens: Tensor) -> Tensor:
    """Which row of the positions table each token takes."""
    if spec.pad_token < 0:
        return torch.arange(tokens.shape[1], device=tokens.device) + spec.position_offset
    real = (tokens != spec.pad_token).long()
    return real.cumsum(1) * real + spec.position_offset - 1


def _embed_image(spec: Spec, w: Slots, pixels: Tensor) -> Tensor:
    assert spec.image is not None
    size = spec.image.patch
    patches = F.unfold(pixels.to(w["patch"].dtype), size, stride=size).mT  # (batch, patches, c p²)
    x = F.linear(patches, w["patch"], w.get("patch_bias"))
    front = torch.cat([w[name] for name in ("cls", "distill") if name in w])
    return torch.cat([front.expand(len(x), -1, -1), x], dim=1) + w["positions"]


def final_stream(weights: Weights, inputs: Tensor) -> Tensor:
    """Inputs as in `embed` -> the stream behind the last norm (batch, T, d)."""
    spec = weights.spec
    x = embed(weights, inputs)
    positions = Positions.of(spec, x.shape[1], x.dtype, x.device)
    for i, slots in enumerate(weights.blocks):
        x = block(spec, slots, x, positions, i)
    return last_norm(weights, x)


def last_norm(weights: Weights, x: Tensor) -> Tensor:
    """What the norm behind the blocks makes of the stream, where there is one."""
    return x if weights.spec.placement == "post" else norm(weights.spec, weights.ends, "final_norm", x)


def head_input(weights: Weights, inputs: Tensor) -> Tensor:
    """What the head reads: (batch, T, d) for language models, (batch, d or 2d) where one vector stands for all."""
    return read_out(weights, final_stream(weights, inputs), inputs)


def read_out(weights: Weights, x: Tensor, inputs: Tensor) -> Tensor:
    """`head_input` from the stream x (batch, T, d) behind the last norm; needs the small ends alone."""
    spec, w = weights.spec, weights.ends
    if spec.head_transform:
        x = ACTIVATIONS[spec.activation](F.linear(x, w["head_transform"], w["head_transform_bias"]))
        return norm(spec, w, "head_norm", x)
    if spec.pooling == "cls":
        return x[:, 0]
    if spec.pooling == "cls+mean":
        return torch.cat([x[:, 0], x[:, spec.front :].mean(1)], dim=-1)
    if spec.pooling == "end":
        end = inputs.argmax(1) if spec.end_token < 0 else (inputs == spec.end_token).int().argmax(1)
        return x[torch.arange(len(x), device=x.device), end]
    return x


def logits(weights: Weights, inputs: Tensor) -> Tensor:
    """Inputs as in `embed` -> (batch, T, V), or (batch, V) where one vector stands for the input."""
    out = F.linear(head_input(weights, inputs), weights.ends["head"], weights.ends.get("head_bias"))
    return capped(out, weights.spec.head_softcap)


def prediction_rows(weights: Weights, data: Data) -> Tensor:
    """What the head reads wherever a batch asks for a prediction: (n, d), in the order of `answers`.

    Next tokens for tokens (batch, T); else where the examples have a target.
    """
    if weights.spec.task == "features":
        raise LmcError(
            f"{weights.spec.family} computes features, not predictions, so that it has no loss to learn from or to "
            "draw a barrier with; match it with --method weight and check it with verify"
        )
    return predicting(head_input(weights, predicted_from(data)), data)


def predicted_from(data: Data) -> Tensor:
    """The inputs that predictions are made from: tokens without the last one of each block."""
    return data.inputs if isinstance(data, Examples) else data[:, :-1]


def predicting(x: Tensor, data: Data) -> Tensor:
    """Those rows of the head's input for `predicted_from(data)` that predict something."""
    if isinstance(data, Examples):
        return x[data.targets >= 0] if x.dim() == 3 else x
    return x.flatten(0, 1)


def answers(data: Data) -> Tensor:
    """The right answers (n,) int64 to what `prediction_rows` predicts."""
    if isinstance(data, Examples):
        return data.targets[data.targets >= 0]
    return data[:, 1:].flatten()


def task_loss(weights: Weights, data: Data) -> Tensor:
    """Mean cross-entropy in nats of a batch's predictions; differentiable."""
    w, cap = weights.ends, weights.spec.head_softcap
    return cross_entropy(prediction_rows(weights, data), w["head"], w.get("head_bias"), answers(data), softcap=cap)


def next_token_loss(weights: Weights, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting tokens[:, 1:] from tokens[:, :-1]; differentiable."""
    return task_loss(weights, tokens)


@torch.no_grad()
def mean_loss(weights: Weights, data: Data, batch: int = 32) -> float:
    """Mean loss in nats per prediction over blocks of tokens (n, T), each on its own, or examples."""
    total, count = 0.0, 0
    for part in data.split(batch):
        n = len(answers(part))
        if n:
            total += task_loss(weights, part).item() * n
            count += n
    return total / count


@torch.no_grad()
def accuracy(weights: Weights, data: Examples, batch: int = 256) -> float:
    """Share of examples whose most probable class is the right one."""
    right = 0
    for part in data.split(batch):
        rows = prediction_rows(weights, part)
        guess = F.linear(rows, weights.ends["head"], weights.ends.get("head_bias")).argmax(-1)
        right += int((guess == answers(part)).sum())
    return right / len(answers(data))
