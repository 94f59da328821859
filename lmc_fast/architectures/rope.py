"""Rotary frequencies of a transformers config, in float32 as transformers computes them."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import LmcError


def inverse_frequencies(config: Any, head_dim: int, layer_type: str | None = None) -> tuple[tuple[float, ...], float]:
    """(inverse frequency of each rotary pair, factor on cos and sin) of one type of layer, where there are several.

    Raises LmcError for rope types whose frequencies depend on the sequence length.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        return default_frequencies(dim, rope["rope_theta"]), 1.0
    if kind in ("dynamic", "longrope") or kind not in ROPE_INIT_FUNCTIONS:
        raise LmcError(f"rope_type '{kind}' is not supported: its frequencies change with the sequence length")
    options = {"layer_type": layer_type} if layer_type else {}
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **options)
    return tuple(inv_freq.tolist()), float(scaling)


def default_frequencies(dim: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i/dim) for each pair i."""
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    return tuple((1.0 / theta**exponent).tolist())
