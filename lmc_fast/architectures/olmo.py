"""OLMo: LayerNorm without parameters, perhaps clamped queries, keys, values. OLMo-2: norms on what a branch adds."""

from __future__ import annotations

from typing import Any

from .checks import positive
from .decoder import ATTENTION, GATED, QK_NORMS, ROPE_BUFFERS, block_norms, decoder_spec, embeddings
from .family import Family
from .spec import Spec


def _olmo(config: Any) -> Spec:
    return decoder_spec(
        config,
        attention={"clip_qkv": positive(config, "clip_qkv")},
        norms={"kind": "layernorm", "eps": 1e-5, "parametric": False},
    )


def _olmo2(config: Any) -> Spec:
    return decoder_spec(config, norms={"placement": "branch"}, attention={"qk_norm": "full"})


_POST = {"attn_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
_SHARED: dict[str, Any] = {"ends": embeddings("weight"), "prefix": "model.", "buffers": ROPE_BUFFERS}

FAMILIES = (
    Family(name="olmo", spec=_olmo, block=ATTENTION + GATED, **_SHARED),
    Family(name="olmo2", spec=_olmo2, block=block_norms(_POST, "weight") + ATTENTION + GATED + QK_NORMS, **_SHARED),
)
