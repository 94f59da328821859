"""StableLM: LayerNorm, partial RoPE, gated FFN, sequential or parallel with one norm, perhaps biases on q, k, v."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .decoder import ATTENTION, GATED, PRE_NORMS, ROPE_BUFFERS, block_norms, decoder_spec, embeddings, partial_rope
from .family import Family
from .spec import Spec


def _spec(config: Any) -> Spec:
    if config.qk_layernorm:
        raise LmcError("StableLM with qk_layernorm=true is not supported; use a checkpoint without it")
    head_dim = config.hidden_size // config.num_attention_heads
    return decoder_spec(
        config,
        rope=partial_rope(config, head_dim),
        attention={"head_dim": head_dim},
        norms={"kind": "layernorm", "eps": config.layer_norm_eps, "shared": config.use_parallel_residual},
        parallel=config.use_parallel_residual,
        biases=frozenset("qkv") if config.use_qkv_bias else frozenset(),
    )


FAMILIES = (
    Family(
        name="stablelm",
        spec=_spec,
        prefix="model.",
        ends=embeddings("weight", "bias"),
        block=(*block_norms(PRE_NORMS, "weight", "bias"), *ATTENTION, *GATED),
        buffers=ROPE_BUFFERS,
    ),
)
