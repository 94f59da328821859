"""What a config.json must say before it is taken at its word: sizes and numbers, by the names of its keys."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..errors import LmcError
from .activations import ACTIVATIONS
from .spec import Spec

_LARGEST = 2**31 - 1
_LARGEST_HEAD = 2**16
_SIZES = (
    *("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "head_dim", "hidden_size", "n_embd"),
    *(
        "n_heads",
        "num_heads",
        "d_model",
        "dim",
        "hidden_dim",
        "n_layers",
        "num_layers",
        "max_seq_len",
        "expansion_ratio",
    ),
    *("num_hidden_layers", "n_layer", "vocab_size", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    *("max_position_embeddings", "n_positions", "original_max_position_embeddings", "word_embed_proj_dim"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "projection_dim", "num_channels", "type_vocab_size", "mlp_ratio"),
)


def check_sizes(values: dict[str, Any], config_class: Any) -> None:
    """Every size that the configuration class has is a positive whole number. Raises LmcError."""
    own = {*config_class.__dataclass_fields__, *config_class.attribute_map.values()}
    if own & {"rope_parameters", "qkv_bias"}:
        own.add("head_dim")  # read wherever it is given
    for key in _SIZES:
        value = values.get(key) if key in own else None
        if value is None:
            continue
        largest = _LARGEST_HEAD if key == "head_dim" else _LARGEST
        if value == 0 and key == "type_vocab_size" and "relative_attention" in own:
            continue  # DeBERTa may have none
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
            raise LmcError(f"{key} is {value!r}; it must be a positive whole number, at most {largest}")


def check_kind(config: Any, spec: Spec) -> None:
    """Raises LmcError for options of all configurations that are not computed here."""
    if getattr(config, "is_heterogeneous", False):
        raise LmcError("per_layer_config is not supported; use a checkpoint whose layers are alike")
    causal = getattr(config, "is_causal", None)
    if causal is not None and causal != spec.attention.causal:
        raise LmcError(f"is_causal is {causal}, which is not supported in {spec.family}; remove that option")


def positive(config: Any, key: str) -> float:
    """The value of a key, 0.0 where it is absent or null. Raises LmcError unless it is a positive number then."""
    value = getattr(config, key, None)
    if value is None:
        return 0.0
    require_positive({key: value}, (key,))
    return float(value)


def require_positive(values: dict[str, Any], keys: Iterable[str], where: str = "") -> None:
    """Raises LmcError for a key of these that is there, not null, and no positive finite number."""
    for key in keys:
        value = values.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise LmcError(f"{where}{key} is {value!r}; it must be a positive number")


def check_spec(spec: Spec) -> None:
    """What a spec's numbers must be to each other, whatever keys they come from. Raises LmcError."""
    a, experts = spec.attention, spec.ffn.experts
    if spec.ffn.activation not in ACTIVATIONS or (spec.ffn.activation == "bloom_gelu") != (spec.family == "bloom"):
        known = ", ".join(sorted(ACTIVATIONS.keys() - {"bloom_gelu"}))
        raise LmcError(f"the activation {spec.ffn.activation!r} is not computed here; known are {known}")
    if a.heads % a.kv_heads:
        raise LmcError(f"{a.heads} attention heads cannot share {a.kv_heads} key/value heads evenly")
    if a.head_dim < 1:
        raise LmcError(f"hidden_size {spec.width} is too small for {a.heads} attention heads")
    if not 0 <= spec.norms.eps < math.inf or (spec.norms.eps == 0 and spec.norms.embedded):
        raise LmcError(f"the norms' epsilon is {spec.norms.eps}; it must be a positive number")
    if experts.per_token > experts.count:
        raise LmcError(f"num_experts_per_tok is {experts.per_token}, but there are {experts.count} experts")
    if not spec.image and spec.max_positions < 2:
        raise LmcError(f"a model of {spec.max_positions} positions predicts nothing; correct max_position_embeddings")
    if not spec.image and a.windows and len(a.windows) != spec.layers:
        raise LmcError(f"layer_types has {len(a.windows)} entries for {spec.layers} layers")
    if spec.vocab < 1 or spec.layers < 1 or spec.width < 1:
        raise LmcError(f"a model of {spec.layers} layers, width {spec.width} and {spec.vocab} outputs is empty")
