"""Command R: LayerNorm without biases, parallel branches, a factor on logits; R7B: windows, blocks without RoPE."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .checks import positive
from .decoder import (
    ATTENTION,
    GATED,
    ROPE_BUFFERS,
    block_norms,
    decoder_spec,
    embeddings,
    paired_neighbours,
    windows,
)
from .family import Family
from .rope import inverse_frequencies
from .spec import Rope, Spec


def _cohere(config: Any, **features: Any) -> Spec:
    if getattr(config, "use_qk_norm", False):
        raise LmcError(
            "Cohere with use_qk_norm=true (Command R+) is not supported: its norms on queries and keys subtract the "
            "mean of each head, which is not computed here; use a checkpoint without it"
        )
    return decoder_spec(
        config,
        norms={"kind": "layernorm", "eps": config.layer_norm_eps, "biased": False, "shared": True},
        parallel=True,
        head_scale=positive(config, "logit_scale") or 1.0,
        **features,
    )


def _cohere2(config: Any) -> Spec:
    back = windows(config, by_layer=True)
    turned = tuple(bool(back and back[i]) for i in range(config.num_hidden_layers))
    inv_freq, scaling = inverse_frequencies(config, config.hidden_size // config.num_attention_heads)
    rope = Rope(inv_freq, scaling, blocks=() if all(turned) else turned) if any(turned) else Rope()
    return _cohere(config, rope=rope, attention={"windows": back})


_SHARED: dict[str, Any] = {
    "ends": embeddings("weight"),
    "block": block_norms({"attn_norm": "input_layernorm"}, "weight") + paired_neighbours(ATTENTION) + GATED,
    "prefix": "model.",
    "buffers": ROPE_BUFFERS,
}

FAMILIES = (
    Family(name="cohere", spec=_cohere, **_SHARED),
    Family(name="cohere2", spec=_cohere2, **_SHARED),
)
