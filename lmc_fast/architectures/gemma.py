"""Gemma (gains stored less 1, scaled embeddings), Gemma-2 (sandwich norms, soft caps), Gemma-3 (QK-norm, two RoPEs);
VaultGemma (Gemma-2 without the norms on what a branch adds).
"""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .checks import positive
from .decoder import (
    ATTENTION,
    GATED,
    PRE_NORMS,
    QK_NORMS,
    ROPE_BUFFERS,
    block_norms,
    decoder_spec,
    embeddings,
    stored_as,
    two_ropes,
    windows,
)
from .family import Family
from .layouts import LessOne
from .spec import Spec


def _gemma(config: Any, **features: Any) -> Spec:
    if getattr(config, "use_bidirectional_attention", None):
        raise LmcError(
            f"{config.model_type} with use_bidirectional_attention is not supported; use a causal checkpoint"
        )
    return decoder_spec(config, embed_scale=config.hidden_size**0.5, **features)


def _gemma2(config: Any, qk_norm: str = "", **features: Any) -> Spec:
    attention = {
        "logit_scale": positive(config, "query_pre_attn_scalar") ** -0.5,
        "softcap": positive(config, "attn_logit_softcapping"),
        "windows": windows(config, by_layer=True),
        "qk_norm": qk_norm,
    }
    return _gemma(
        config,
        attention=attention,
        ffn={"activation": config.hidden_activation},
        norms={"placement": "sandwich"},
        head_softcap=positive(config, "final_logit_softcapping"),
        **features,
    )


def _gemma3(config: Any) -> Spec:
    if config.attn_logit_softcapping is not None:
        raise LmcError(
            "attn_logit_softcapping in Gemma-3 is computed by some of transformers' attentions only; remove it"
        )
    return _gemma2(config, qk_norm="head", rope=two_ropes(config, config.head_dim))


def _vaultgemma(config: Any) -> Spec:
    return _gemma2(config).changed(norms={"placement": "pre"})


_SANDWICH = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_VAULT = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_LINEAR = ATTENTION + GATED
_NORMS = block_norms(_SANDWICH, "weight", layout=LessOne())
_SHARED: dict[str, Any] = {
    "ends": embeddings("weight", layout=LessOne()),
    "prefix": "model.",
    "buffers": ROPE_BUFFERS,
}

FAMILIES = (
    Family(name="gemma", spec=_gemma, block=block_norms(PRE_NORMS, "weight", layout=LessOne()) + _LINEAR, **_SHARED),
    Family(name="gemma2", spec=_gemma2, block=_NORMS + _LINEAR, **_SHARED),
    Family(
        name="vaultgemma",
        spec=_vaultgemma,
        block=block_norms(_VAULT, "weight", layout=LessOne()) + _LINEAR,
        **_SHARED,
    ),
    Family(name="gemma3_text", spec=_gemma3, block=_NORMS + _LINEAR + stored_as(QK_NORMS, LessOne()), **_SHARED),
)
