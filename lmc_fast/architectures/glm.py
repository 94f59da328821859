"""GLM-4 and relatives: part of each head turned in pairs of neighbours, gate and up fused; perhaps sandwich norms."""

from __future__ import annotations

from typing import Any

from .decoder import (
    ATTENTION,
    LAYER,
    PRE_NORMS,
    ROPE_BUFFERS,
    block_norms,
    decoder_spec,
    embeddings,
    paired_neighbours,
)
from .family import Entry, Family, linear
from .layouts import Stacked
from .rope import inverse_frequencies
from .spec import Rope, Spec


def _glm(config: Any, **features: Any) -> Spec:
    return decoder_spec(
        config,
        rope=Rope(*inverse_frequencies(config, config.head_dim, partial=True)),
        biases=frozenset("qkv" if config.attention_bias else ""),
        **features,
    )


def _glm4(config: Any) -> Spec:
    return _glm(config, norms={"placement": "sandwich"})


_POST = {"attn_post_norm": "post_self_attn_layernorm", "ffn_post_norm": "post_mlp_layernorm"}
_GATE_UP = ("gate", "up")
_BLOCK = (
    *block_norms(PRE_NORMS, "weight"),
    *paired_neighbours(ATTENTION),
    Entry(f"{LAYER}mlp.gate_up_proj.weight", _GATE_UP, Stacked(_GATE_UP)),
    *linear(f"{LAYER}mlp.down_proj", "down"),
)
_SHARED: dict[str, Any] = {"ends": embeddings("weight"), "prefix": "model.", "buffers": ROPE_BUFFERS}

FAMILIES = (
    Family(name="glm", spec=_glm, block=_BLOCK, **_SHARED),
    Family(name="glm4", spec=_glm4, block=_BLOCK + block_norms(_POST, "weight"), **_SHARED),
)
