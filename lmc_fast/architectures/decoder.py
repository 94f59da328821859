"""What the many relatives of Llama share: config fields, tensor names, and the options that set them apart."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..errors import LmcError
from .family import Entry, linear
from .layouts import InterleavedPairs, Layout, Plain
from .rope import inverse_frequencies, trained_positions
from .spec import FFN, Attention, Norms, Rope, Spec

_SLIDING = "sliding_attention"
LAYER = "model.layers.{i}."
ROPE_BUFFERS = (r"rotary_emb\.inv_freq$",)


def decoder_spec(config: Any, **features: Any) -> Spec:
    """The spec of a Llama-like config; `features` are what the family sets otherwise (Spec.changed)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    biased = "attention_bias" in type(config).__dataclass_fields__ and config.attention_bias
    base = Spec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=Attention(heads=config.num_attention_heads, kv_heads=kv_heads, head_dim=head_dim),
        ffn=FFN(width=config.intermediate_size, activation=getattr(config, "hidden_act", ""), gated=True),
        max_positions=trained_positions(config),
        norms=Norms(kind="rmsnorm", eps=getattr(config, "rms_norm_eps", math.nan)),  # nan: the family sets it
        tied=config.tie_word_embeddings,
        biases=frozenset("qkvo") if biased else frozenset(),
    )
    if "rope" not in features:
        features["rope"] = Rope(*inverse_frequencies(config, head_dim))
    return base.changed(**features)


def partial_rope(config: Any, head_dim: int) -> Rope:
    """RoPE on a part of each head, for attention that cuts that part off before it looks at the frequencies."""
    rope = Rope(*inverse_frequencies(config, head_dim, partial=True))
    cut = int(head_dim * config.rope_parameters["partial_rotary_factor"])
    if cut != rope.rotary_dim:
        raise LmcError(
            f"partial_rotary_factor cuts {cut} dimensions off a head and turns {rope.rotary_dim}; correct it"
        )
    return rope


def two_ropes(config: Any, head_dim: int) -> Rope:
    """RoPE with frequencies of their own in the blocks that have a window. Raises LmcError where those are scaled."""
    kinds = set(config.layer_types)
    everywhere = "full_attention" if "full_attention" in kinds else _SLIDING
    inv_freq, scaling = inverse_frequencies(config, head_dim, everywhere)
    local, local_scaling = inverse_frequencies(config, head_dim, _SLIDING) if _SLIDING in kinds else (inv_freq, 1.0)
    if local_scaling != 1.0:
        raise LmcError("a scaled RoPE in sliding-window layers is not supported; use a checkpoint without it")
    return Rope(inv_freq, scaling, local)


def windows(config: Any, by_layer: bool) -> tuple[int, ...]:
    """Each block's sliding window, of the layers that config.layer_types says or of all; () where all see everything.

    Raises LmcError for a window that is no positive number, and for other types of layers.
    """
    size = config.sliding_window
    if by_layer:
        kinds = config.layer_types
    else:
        kinds = ["full_attention" if size is None else _SLIDING] * config.num_hidden_layers
    unknown = set(kinds) - {_SLIDING, "full_attention"}
    if unknown:
        raise LmcError(f"layer type {min(unknown)!r} is not supported; use a checkpoint with full or sliding attention")
    if _SLIDING not in kinds:
        return ()
    if not isinstance(size, int) or size < 1:
        raise LmcError(f"sliding_window is {size!r}; layers with sliding attention need a positive whole number")
    return tuple(size if kind == _SLIDING else 0 for kind in kinds)


def embeddings(*norms: str, layout: Layout | None = None) -> tuple[Entry, ...]:
    """Token embeddings, the final norm under each of the endings, the head."""
    return (
        Entry("model.embed_tokens.weight", ("embed",)),
        *(Entry(f"model.norm.{end}", (_norm_slot("final_norm", end),), layout or Plain()) for end in norms),
        Entry("lm_head.weight", ("head",)),
    )


def block_norms(names: dict[str, str], *ends: str, layout: Layout | None = None) -> tuple[Entry, ...]:
    """Norms of a block: slot -> name on disk."""
    return tuple(
        Entry(f"{LAYER}{name}.{end}", (_norm_slot(slot, end),), layout or Plain())
        for slot, name in names.items()
        for end in ends
    )


def _norm_slot(slot: str, end: str) -> str:
    return f"{slot}_bias" if end == "bias" else slot


PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ATTENTION = tuple(e for n in "qkvo" for e in linear(f"{LAYER}self_attn.{n}_proj", n))
QK_NORMS = tuple(Entry(f"{LAYER}self_attn.{n}_norm.weight", (f"{n}_norm",)) for n in "qk")
GATED = tuple(e for n in ("gate", "up", "down") for e in linear(f"{LAYER}mlp.{n}_proj", n))


def mlp_biases(config: Any) -> frozenset[str]:
    """Of a gated FFN, or of a plain one, which has no gate."""
    return frozenset({"up", "gate", "down"}) if config.mlp_bias else frozenset()


def paired_neighbours(attention: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The same with rotary pairs (2i, 2i + 1)."""
    return tuple(
        replace(entry, layout=InterleavedPairs()) if entry.slots[0][0] in "qk" else entry for entry in attention
    )


def stored_as(entries: tuple[Entry, ...], layout: Layout) -> tuple[Entry, ...]:
    """The same tensors in another layout."""
    return tuple(replace(entry, layout=layout) for entry in entries)
