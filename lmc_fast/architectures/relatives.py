"""Relatives of Llama: other biases, windows, multipliers, blocks without RoPE, plain FFNs, other norms."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .checks import positive
from .decoder import (
    ATTENTION,
    GATED,
    LAYER,
    PRE_NORMS,
    ROPE_BUFFERS,
    block_norms,
    decoder_spec,
    embeddings,
    mlp_biases,
    paired_neighbours,
    partial_rope,
    windows,
)
from .family import Entry, Family, linear
from .layouts import LessOne
from .rope import inverse_frequencies
from .spec import Rope, Spec


def _windowed(config: Any) -> Spec:
    return decoder_spec(config, attention={"windows": windows(config, by_layer=True)})


def _seed_oss(config: Any) -> Spec:
    attention = {*("qkv" if config.attention_bias else ""), *("o" if config.attention_out_bias else "")}
    return decoder_spec(config, biases=frozenset(attention) | mlp_biases(config))


def _smollm3(config: Any) -> Spec:
    if config.sliding_window is not None and not config.use_sliding_window:
        kinds = set(config.layer_types) - {"full_attention"}
        if kinds:
            raise LmcError("layer_types asks for sliding attention, which use_sliding_window switches off; correct one")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = tuple(bool(use) for use in config.no_rope_layers[: config.num_hidden_layers])
    if len(turned) != config.num_hidden_layers:
        raise LmcError(f"no_rope_layers has {len(turned)} entries for {config.num_hidden_layers} layers")
    rope = Rope(*inverse_frequencies(config, head_dim), blocks=() if all(turned) else turned)
    slides = config.use_sliding_window and config.sliding_window is not None
    return decoder_spec(
        config,
        rope=rope,
        biases=frozenset("qkvo" if config.attention_bias else "") | mlp_biases(config),
        attention={"windows": windows(config, by_layer=True) if slides else ()},
    )


def _with_mlp_bias(config: Any, **features: Any) -> Spec:
    biases = frozenset("qkvo" if config.attention_bias else "") | mlp_biases(config)
    return decoder_spec(config, biases=biases, **features)


def _plain(config: Any) -> Spec:
    return _with_mlp_bias(config, ffn={"gated": False})


def _helium(config: Any) -> Spec:
    biases = frozenset("qkv" if config.attention_bias else "") | mlp_biases(config)
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        raise LmcError("Helium whose heads together are not as wide as its stream is refused by transformers, too")
    return decoder_spec(config, biases=biases)


def _ernie(config: Any) -> Spec:
    return decoder_spec(config, biases=frozenset(_LINEAR) if config.use_bias else frozenset())


def multipliers(config: Any, divides: bool = True) -> dict[str, Any]:
    """The features that muP's factors are; divides: whether logits_scaling divides the logits."""
    logits = positive(config, "logits_scaling") or 1.0
    return {
        "embed_scale": positive(config, "embedding_multiplier") or 1.0,
        "branch_scale": positive(config, "residual_multiplier") or 1.0,
        "head_scale": 1 / logits if divides else logits,
        "attention": {"logit_scale": positive(config, "attention_multiplier") or 1.0},
    }


def _granite(config: Any) -> Spec:
    return _with_mlp_bias(config, **multipliers(config))


def _hyperclovax(config: Any) -> Spec:
    placement = "sandwich" if config.use_post_norm else "pre"
    return _with_mlp_bias(config, norms={"placement": placement}, **multipliers(config, divides=False))


def _hunyuan(config: Any) -> Spec:
    if config.rope_parameters.get("rope_type") == "dynamic" and not config.rope_parameters.get("alpha"):
        raise LmcError("HunYuan with dynamic RoPE and no alpha is not supported; use a checkpoint with another")
    return decoder_spec(config, attention={"qk_norm": "head", "qk_norm_last": True})


def _jais2(config: Any) -> Spec:
    return _with_mlp_bias(config, ffn={"gated": False}, norms={"kind": "layernorm", "eps": config.layer_norm_eps})


def _starcoder2(config: Any) -> Spec:
    return decoder_spec(
        config,
        ffn={"gated": False},
        norms={"kind": "layernorm", "eps": config.norm_epsilon},
        biases=frozenset(_PLAIN_LINEAR) if config.use_bias else frozenset(),
        attention={"windows": windows(config, by_layer=False)},
    )


def _nemotron(config: Any) -> Spec:
    return _with_mlp_bias(
        config,
        ffn={"gated": False},
        norms={"kind": "layernorm", "eps": config.norm_eps},
        rope=partial_rope(config, config.head_dim),
    )


_PLAIN_LINEAR = ("q", "k", "v", "o", "up", "down")
_LINEAR = (*_PLAIN_LINEAR, "gate")
_PLAIN_FFN = tuple(e for n in ("up", "down") for e in linear(f"{LAYER}mlp.{n}_proj", n))
_RMS, _LN = block_norms(PRE_NORMS, "weight"), block_norms(PRE_NORMS, "weight", "bias")
_NORM_1P = block_norms(PRE_NORMS, "weight", layout=LessOne()) + block_norms(PRE_NORMS, "bias")
_POST = block_norms({"attn_post_norm": "post_norm1", "ffn_post_norm": "post_norm2"}, "weight")
_NEIGHBOURS = paired_neighbours(ATTENTION)
_CODE_FFN = (*linear(f"{LAYER}mlp.c_fc", "up"), *linear(f"{LAYER}mlp.c_proj", "down"))
_HUNYUAN_NORMS = (
    Entry(f"{LAYER}self_attn.query_layernorm.weight", ("q_norm",)),
    Entry(f"{LAYER}self_attn.key_layernorm.weight", ("k_norm",)),
)
_SHARED: dict[str, Any] = {"prefix": "model.", "buffers": ROPE_BUFFERS}
_RMS_ENDS, _LN_ENDS = embeddings("weight"), embeddings("weight", "bias")
_1P_ENDS = tuple(
    Entry(e.name, e.slots, LessOne()) if e.slots == ("final_norm",) else e for e in embeddings("weight", "bias")
)

FAMILIES = (
    Family("ministral", _windowed, _RMS_ENDS, _RMS + ATTENTION + GATED, **_SHARED),
    Family("cwm", _windowed, _RMS_ENDS, _RMS + ATTENTION + GATED, **_SHARED),
    Family("seed_oss", _seed_oss, _RMS_ENDS, _RMS + ATTENTION + GATED, **_SHARED),
    Family("smollm3", _smollm3, _RMS_ENDS, _RMS + ATTENTION + GATED, **_SHARED),
    Family("helium", _helium, _RMS_ENDS, _RMS + _NEIGHBOURS + GATED, **_SHARED),
    Family("ernie4_5", _ernie, _RMS_ENDS, _RMS + _NEIGHBOURS + GATED, **_SHARED),
    Family("arcee", _plain, _RMS_ENDS, _RMS + ATTENTION + _PLAIN_FFN, **_SHARED),
    Family("granite", _granite, _RMS_ENDS, _RMS + ATTENTION + GATED, **_SHARED),
    Family("hyperclovax", _hyperclovax, _RMS_ENDS, _RMS + _POST + ATTENTION + GATED, **_SHARED),
    Family("hunyuan_v1_dense", _hunyuan, _RMS_ENDS, _RMS + ATTENTION + _HUNYUAN_NORMS + GATED, **_SHARED),
    Family("jais2", _jais2, _LN_ENDS, _LN + ATTENTION + _PLAIN_FFN, **_SHARED),
    Family("starcoder2", _starcoder2, _LN_ENDS, _LN + ATTENTION + _CODE_FFN, **_SHARED),
    Family("nemotron", _nemotron, _1P_ENDS, _NORM_1P + ATTENTION + _PLAIN_FFN, **_SHARED),
)
