"""Whole models in normal form: from tokens or images to logits and losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import Spec
from ..architectures.activations import ACTIVATIONS
from ..checkpoints.weights import Weights
from ..errors import LmcError
from ..examples import Data, Examples
from .attention import Positions
from .block import block, norm
from .head import capped
from .slots import Slots


def embed(spec: Spec, w: Slots, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
    """Token ids (batch, T), or images (batch, c, size, size), -> residual stream (batch, T, d).

    w: slots outside the blocks. rows (batch, T): which row of w["embed"] each token takes, if not that of its id.
    """
    if spec.image:
        x = _embed_image(spec, w, inputs)
    else:
        x = F.embedding(inputs if rows is None else rows, w["embed"]) * spec.embed_scale
        if "positions" in w:
            x = x + w["positions"][_places(spec, inputs)]
        if "types" in w:
            x = x + w["types"][0]
    return norm(spec, w, "embed_norm", x) if spec.norms.embedded else x


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
    """Inputs as in `embed` -> the stream behind the last block (batch, T, d)."""
    spec = weights.spec
    x = embed(spec, weights.ends, inputs)
    positions = Positions.of(spec, x.shape[1], x.dtype, x.device)
    for i, slots in enumerate(weights.blocks):
        x = block(spec, slots, x, positions, i)
    return x


def head_input(spec: Spec, w: Slots, x: Tensor, inputs: Tensor) -> Tensor:
    """Stream behind the last block -> what the head reads: (batch, T, d), or (batch, d or 2d) one vector for all.

    Without a head (batch, T + 1, d) where there is a pooled output: it lies below the others.
    """
    if spec.pooling == "raw":
        return torch.cat([x, norm(spec, w, "final_norm", x[:, :1])], dim=1)
    x = x if spec.norms.placement == "post" else norm(spec, w, "final_norm", x)
    if spec.head_scale != 1:
        x = x * spec.head_scale
    if spec.headless:
        return _with_pooled(spec, w, x, inputs)
    x = _pooled(spec, x, inputs)
    if spec.head_transform:
        activation = ACTIVATIONS[spec.head_activation or spec.ffn.activation]
        x = activation(F.linear(x, w["head_transform"], w.get("head_transform_bias")))
        return norm(spec, w, "head_norm", x) if spec.head_normed else x
    return x


def _with_pooled(spec: Spec, w: Slots, x: Tensor, inputs: Tensor) -> Tensor:
    """The normed stream and, below it, what the model makes one vector of each input, if it does."""
    if "pooler" in w:
        return torch.cat([x, F.linear(x[:, :1], w["pooler"], w["pooler_bias"]).tanh()], dim=1)
    return torch.cat([x, _pooled(spec, x, inputs)[:, None]], dim=1) if spec.pooling else x


def _pooled(spec: Spec, x: Tensor, inputs: Tensor) -> Tensor:
    """Of the normed stream (batch, T, d), what is read of it: all, or one vector for each input."""
    if spec.pooling == "cls":
        return x[:, 0]
    if spec.pooling == "mean":
        return x.mean(1)
    if spec.pooling == "cls+mean":
        return torch.cat([x[:, 0], x[:, spec.front :].mean(1)], dim=-1)
    if spec.pooling == "end":
        end = inputs.argmax(1) if spec.end_token < 0 else (inputs == spec.end_token).int().argmax(1)
    elif spec.pooling == "last":
        places = torch.arange(inputs.shape[1], device=x.device)
        end = (places * (inputs != spec.end_token)).argmax(1)
    else:
        return x
    return x[torch.arange(len(x), device=x.device), end]


def last_hidden(weights: Weights, inputs: Tensor) -> Tensor:
    """Inputs as in `embed` -> what the head reads: `head_input` of the stream behind the last block."""
    return head_input(weights.spec, weights.ends, final_stream(weights, inputs), inputs)


def logits(weights: Weights, inputs: Tensor) -> Tensor:
    """Inputs as in `embed` -> (batch, T, V), or (batch, V) where one vector stands for the input."""
    out = F.linear(last_hidden(weights, inputs), weights.ends["head"], weights.ends.get("head_bias"))
    return capped(out, weights.spec.head_softcap)


def prediction_rows(weights: Weights, data: Data) -> Tensor:
    """What the head reads wherever a batch asks for a prediction: (n, d), in the order of `answers`.

    Next tokens for tokens (batch, T); else where the examples have a target.
    """
    return head_rows(weights.spec, weights.ends, final_stream(weights, model_inputs(data)), data)


def head_rows(spec: Spec, w: Slots, x: Tensor, data: Data) -> Tensor:
    """Stream behind the last block -> what the head reads wherever `data` asks for something: (n, d).

    Of a model without a head one vector for each input: its pooled output or, without one, the mean of all tokens, as
    sentence encoders take it.
    """
    inputs = model_inputs(data)
    read = head_input(spec, w, x, inputs)
    if spec.headless:
        read = read[:, -1] if spec.pooling else read[:, : spec.length(inputs.shape)].mean(1)
    return target_rows(read, data)


def require_task(spec: Spec) -> None:
    """Raises LmcError for models that predict nothing."""
    if spec.task == "features":
        raise LmcError(
            f"{spec.family} computes features, not predictions: this needs a model with a loss; its pair can be "
            "aligned, and the barrier is measured in the distance of features"
        )


def model_inputs(data: Data) -> Tensor:
    """The inputs of a batch that predictions need: all but the last token of a text."""
    return data.inputs if isinstance(data, Examples) else data[:, :-1]


def target_rows(x: Tensor, data: Data) -> Tensor:
    """What the head reads (from `head_input`) wherever a batch asks for a prediction: (n, d)."""
    if isinstance(data, Examples):
        return x[data.targets >= 0] if x.dim() == 3 else x
    return x.flatten(0, 1)


def labels(data: Data) -> Tensor:
    """The right answers (n,) int64 to what `prediction_rows` predicts."""
    if isinstance(data, Examples):
        return data.targets[data.targets >= 0]
    return data[:, 1:].flatten()


def label_counts(data: Data) -> Tensor:
    """How many predictions each input of a batch asks for: (batch,) int64."""
    if not isinstance(data, Examples):
        return torch.full((len(data),), data.shape[1] - 1, device=data.device)
    return (data.targets >= 0).reshape(len(data), -1).sum(1)
