"""OLMo: LayerNorm without parameters, perhaps clamped queries, keys, values. OLMo-2, OLMo-3 (sliding windows) and
EXAONE-4 (blocks without RoPE): norms on what a branch adds.
"""

from __future__ import annotations

from typing import Any

from .checks import positive
from .decoder import (
    ATTENTION,
    GATED,
    QK_NORMS,
    ROPE_BUFFERS,
    block_norms,
    decoder_spec,
    embeddings,
    two_ropes,
    windows,
)
from .family import Family
from .rope import inverse_frequencies
from .spec import Rope, Spec


def _olmo(config: Any) -> Spec:
    return decoder_spec(
        config,
        attention={"clip_qkv": positive(config, "clip_qkv")},
        norms={"kind": "layernorm", "eps": 1e-5, "parametric": False},
    )


def _olmo2(config: Any) -> Spec:
    return decoder_spec(config, norms={"placement": "branch"}, attention={"qk_norm": "full"})


def _olmo3(config: Any) -> Spec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return decoder_spec(
        config,
        norms={"placement": "branch"},
        attention={"qk_norm": "full", "windows": windows(config, by_layer=True)},
        rope=two_ropes(config, head_dim),
    )


def _exaone4(config: Any) -> Spec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    back = windows(config, by_layer=True)
    turned = tuple(config.sliding_window is None or bool(back and back[i]) for i in range(config.num_hidden_layers))
    rope = Rope(*inverse_frequencies(config, head_dim), blocks=() if all(turned) else turned) if any(turned) else Rope()
    return decoder_spec(
        config, norms={"placement": "branch"}, attention={"qk_norm": "head", "windows": back}, rope=rope
    )


_POST = {"attn_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
_SHARED: dict[str, Any] = {"ends": embeddings("weight"), "prefix": "model.", "buffers": ROPE_BUFFERS}

_BRANCHED = block_norms(_POST, "weight") + ATTENTION + GATED + QK_NORMS

FAMILIES = (
    Family(name="olmo", spec=_olmo, block=ATTENTION + GATED, **_SHARED),
    Family(name="olmo2", spec=_olmo2, block=_BRANCHED, **_SHARED),
    Family(name="olmo3", spec=_olmo3, block=_BRANCHED, **_SHARED),
    Family(name="exaone4", spec=_exaone4, block=_BRANCHED, **_SHARED),
)
