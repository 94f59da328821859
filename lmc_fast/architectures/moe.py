"""Mixtures of experts: Mixtral, Granite (multipliers), OLMoE, FlexOlmo, Qwen2-MoE, Qwen3-MoE, GPT-OSS."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .checks import positive
from .decoder import (
    ATTENTION,
    LAYER,
    PRE_NORMS,
    QK_NORMS,
    ROPE_BUFFERS,
    block_norms,
    decoder_spec,
    embeddings,
    windows,
)
from .family import Entry, Family, linear
from .layouts import FusedExperts, InterleavedExperts, Transposed
from .relatives import multipliers
from .spec import Experts, Spec


def _mixtral(config: Any, activation: dict[str, Any] | None = None, **features: Any) -> Spec:
    """The routed experts' probabilities add up to 1, whether they are scaled so or those of the others left out."""
    return decoder_spec(
        config,
        ffn={
            "width": 0,
            "experts": Experts(
                count=config.num_local_experts,
                per_token=config.num_experts_per_tok,
                width=config.intermediate_size,
                renormalised=True,
            ),
            **(activation or {}),
        },
        **features,
    )


def _windowed_mixtral(config: Any) -> Spec:
    return _mixtral(config, attention={"windows": windows(config, by_layer=False)})


def _granitemoe(config: Any) -> Spec:
    return _mixtral(config, **multipliers(config))


def _mixture(config: Any, width: int, *, shared: int = 0, **features: Any) -> Spec:
    """width: of one expert; shared: of an expert that is always active, behind a switch."""
    experts = Experts(
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        width=width,
        renormalised=config.norm_topk_prob,
        switched=bool(shared),
    )
    return decoder_spec(config, ffn={"width": shared, "experts": experts}, **features)


def _olmoe(config: Any) -> Spec:
    return _mixture(
        config, config.intermediate_size, attention={"qk_norm": "full", "clip_qkv": positive(config, "clip_qkv")}
    )


def _flex_olmo(config: Any) -> Spec:
    return _mixture(config, config.intermediate_size, norms={"placement": "branch"}, attention={"qk_norm": "full"})


def _require_experts_everywhere(config: Any) -> None:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise LmcError(f"{config.model_type} with layers that have no experts is not supported; use another checkpoint")


def _qwen2_moe(config: Any) -> Spec:
    _require_experts_everywhere(config)
    return _mixture(
        config,
        config.moe_intermediate_size,
        shared=config.shared_expert_intermediate_size,
        biases=frozenset("qkv") if config.qkv_bias else frozenset(),
        attention={"windows": windows(config, by_layer=True)},
    )


def _qwen3_moe(config: Any) -> Spec:
    _require_experts_everywhere(config)
    return _mixture(
        config, config.moe_intermediate_size, attention={"qk_norm": "head", "windows": windows(config, by_layer=False)}
    )


def _gpt_oss(config: Any) -> Spec:
    if config.swiglu_alpha != 1.702:
        raise LmcError(f"swiglu_alpha is {config.swiglu_alpha}; 1.702 is computed, as in GPT-OSS")
    limit = positive(config, "swiglu_limit")
    if not limit:
        raise LmcError(f"swiglu_limit is {config.swiglu_limit!r}; it must be a positive number")
    return _mixtral(
        config,
        activation={"activation": "quick_gelu", "clamped": limit},
        attention={"windows": windows(config, by_layer=True), "sinks": True},
        biases=frozenset({"experts", *("qkvo" if config.attention_bias else "")}),
    )


def _experts(home: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    names = {"experts_gate": gate, "experts_up": up, "experts_down": down}
    experts = tuple(Entry(f"{LAYER}{home}.experts.{{j}}.{name}.weight", (slot,)) for slot, name in names.items())
    return (Entry(f"{LAYER}{home}.gate.weight", ("router",)), *experts)


_COMMON = block_norms(PRE_NORMS, "weight") + ATTENTION
_MLP = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_GRANITE = f"{LAYER}block_sparse_moe."
_GRANITE_EXPERTS = (
    Entry(_GRANITE + "router.layer.weight", ("router",)),
    Entry(_GRANITE + "input_linear.weight", ("experts_gate", "experts_up"), FusedExperts()),
    Entry(_GRANITE + "output_linear.weight", ("experts_down",)),
)
_GATE_UP = ("experts_gate", "experts_up")
_OSS = (
    Entry(f"{LAYER}self_attn.sinks", ("sinks",)),
    *linear(f"{LAYER}mlp.router", "router"),
    Entry(f"{LAYER}mlp.experts.gate_up_proj", _GATE_UP, InterleavedExperts()),
    Entry(f"{LAYER}mlp.experts.gate_up_proj_bias", ("experts_gate_bias", "experts_up_bias"), InterleavedExperts()),
    Entry(f"{LAYER}mlp.experts.down_proj", ("experts_down",), Transposed()),
    Entry(f"{LAYER}mlp.experts.down_proj_bias", ("experts_down_bias",)),
)
_BRANCHED = block_norms(
    {"attn_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}, "weight"
)
_SHARED_EXPERT = (
    *(e for n in ("gate", "up", "down") for e in linear(f"{LAYER}mlp.shared_expert.{n}_proj", n)),
    Entry(f"{LAYER}mlp.shared_expert_gate.weight", ("switch",)),
)
_SHARED: dict[str, Any] = {"ends": embeddings("weight"), "prefix": "model.", "buffers": ROPE_BUFFERS}

FAMILIES = (
    Family(
        name="mixtral",
        spec=_windowed_mixtral,
        block=_COMMON + _experts("block_sparse_moe", "w1", "w3", "w2"),
        **_SHARED,
    ),
    Family(name="gpt_oss", spec=_gpt_oss, block=_COMMON + _OSS, **_SHARED),
    Family(name="granitemoe", spec=_granitemoe, block=_COMMON + _GRANITE_EXPERTS, **_SHARED),
    Family(name="flex_olmo", spec=_flex_olmo, block=_BRANCHED + ATTENTION + QK_NORMS + _MLP, **_SHARED),
    Family(name="olmoe", spec=_olmoe, block=_COMMON + QK_NORMS + _MLP, **_SHARED),
    Family(name="qwen2_moe", spec=_qwen2_moe, block=_COMMON + _MLP + _SHARED_EXPERT, **_SHARED),
    Family(name="qwen3_moe", spec=_qwen3_moe, block=_COMMON + QK_NORMS + _MLP, **_SHARED),
)
