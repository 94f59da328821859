"""Rotary frequencies of a transformers config, as the module that transformers would build of it has them."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch

from ..errors import LmcError
from .checks import require_positive

_FACTORS = {  # which numbers each type uses
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("factor",),
    "yarn": ("factor", "attention_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    "longrope": ("factor", "attention_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def inverse_frequencies(
    config: Any, head_dim: int, layer_type: str | None = None, *, partial: bool = False
) -> tuple[tuple[float, ...], float]:
    """(inverse frequency of each rotary pair, factor on cos and sin) of one type of layer, where there are several.

    partial: the family may turn a part of each head, the others always turn all of it. Frequencies that depend on the
    length of the text are those of texts within `trained_positions`. Raises LmcError for what transformers refuses or
    computes to NaN.
    """
    rope = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in _FACTORS:
        raise LmcError(f"rope_type '{kind}' is not supported; known are {', '.join(_FACTORS)}")
    require_positive(rope, ("rope_theta", *_FACTORS[kind]), "rope_parameters: ")
    if partial or kind != "default":
        require_positive(rope, ("partial_rotary_factor",), "rope_parameters: ")
        share = rope.get("partial_rotary_factor") or 1.0
        if share > 1:
            raise LmcError(f"rope_parameters: partial_rotary_factor is {share}; it must be at most 1")
    try:
        frequencies, scaling = _quickly(config, rope, head_dim, layer_type, partial) or _of_module(config, layer_type)
    except Exception as error:  # transformers checks little and fails in many ways
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise LmcError(f"rope_parameters of type '{kind}' are refused by transformers ({reason})") from error
    if not all(0 <= f < math.inf for f in [*frequencies, scaling]):
        raise LmcError(f"rope_parameters of type '{kind}' give frequencies that are no numbers; correct them")
    turned = 2 * len(frequencies)
    if turned > head_dim or (turned < head_dim and not partial):
        raise LmcError(
            f"rope_parameters turn {turned} of the {head_dim} dimensions of a head, which transformers does not "
            f"compute for {config.model_type}; correct partial_rotary_factor or head_dim"
        )
    return frequencies, scaling


def trained_positions(config: Any) -> int:
    """How long texts may be for the frequencies to stay as they are: longrope and dynamic RoPE change them beyond."""
    limits = [
        part["original_max_position_embeddings"] for part in _parts(config) if part.get("rope_type") == "longrope"
    ]
    return min([config.max_position_embeddings, *limits])


def changing_rope(config: Any) -> str:
    """The type of a RoPE that changes with the length of the text; empty where there is none."""
    kinds = [part.get("rope_type") for part in _parts(config)]
    return next((kind for kind in kinds if kind in ("longrope", "dynamic")), "")


def _parts(config: Any) -> list[dict[str, Any]]:
    """Rope parameters, of all layers and of each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def _quickly(
    config: Any, rope: dict[str, Any], head_dim: int, layer_type: str | None, partial: bool
) -> tuple[tuple[float, ...], float] | None:
    """What `_of_module` returns, for the common types without a second spent on importing the modelling file."""
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor") or 1.0
    theirs = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim != theirs or (share != 1 and not partial):  # families differ in what they turn then
        return None
    if kind == "default":
        return default_frequencies(int(head_dim * share), rope["rope_theta"]), 1.0
    if kind in ("linear", "llama3", "yarn"):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, **({"layer_type": layer_type} if layer_type else {}))
        return tuple(frequencies.tolist()), float(scaling)
    return None


def _of_module(config: Any, layer_type: str | None) -> tuple[tuple[float, ...], float]:
    module = _rotary_class(config)(config)
    prefix = f"{layer_type}_" if layer_type else ""
    return tuple(getattr(module, f"{prefix}inv_freq").tolist()), float(getattr(module, f"{prefix}attention_scaling"))


def _rotary_class(config: Any) -> Any:
    """The rotary embedding of the config's own modelling file."""
    home = type(config).__module__.replace(".configuration_", ".modeling_")
    module = importlib.import_module(home)
    found = [c for name, c in vars(module).items() if name.endswith("RotaryEmbedding") and c.__module__ == home]
    if len(found) != 1:
        raise LmcError(f"transformers {config.model_type} has {len(found)} rotary embeddings; one was expected")
    return found[0]


def default_frequencies(dim: int, theta: float) -> tuple[float, ...]:
    """theta^(-2i/dim) for each pair i."""
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    return tuple((1.0 / theta**exponent).tolist())
