"""Phi-1, Phi-2 (one LayerNorm before parallel branches, biases everywhere) and Phi-3 (Llama-like, fused)."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .decoder import LAYER, PRE_NORMS, ROPE_BUFFERS, block_norms, decoder_spec, embeddings, partial_rope, windows
from .family import Entry, Family, linear
from .layouts import Stacked
from .rope import inverse_frequencies
from .spec import Rope, Spec


def _phi(config: Any) -> Spec:
    if config.qk_layernorm:
        raise LmcError("Phi with qk_layernorm=true is not supported; use a checkpoint without it")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return decoder_spec(
        config,
        rope=partial_rope(config, head_dim),
        ffn={"gated": False},
        norms={"kind": "layernorm", "eps": config.layer_norm_eps, "shared": True},
        parallel=True,
        biases=frozenset({"q", "k", "v", "o", "up", "down", "head"}),
    )


def _phi3(config: Any) -> Spec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = Rope(*inverse_frequencies(config, head_dim, partial=True))
    return decoder_spec(config, rope=rope, attention={"windows": windows(config, by_layer=False)})


_PHI = Family(
    name="phi",
    spec=_phi,
    prefix="model.",
    ends=(
        Entry("model.embed_tokens.weight", ("embed",)),
        Entry("model.final_layernorm.weight", ("final_norm",)),
        Entry("model.final_layernorm.bias", ("final_norm_bias",)),
        *linear("lm_head", "head"),
    ),
    block=(
        *block_norms({"attn_norm": "input_layernorm"}, "weight", "bias"),
        *(e for n in "qkv" for e in linear(f"{LAYER}self_attn.{n}_proj", n)),
        *linear(f"{LAYER}self_attn.dense", "o"),
        *linear(f"{LAYER}mlp.fc1", "up"),
        *linear(f"{LAYER}mlp.fc2", "down"),
    ),
    buffers=ROPE_BUFFERS,
)
_QKV, _GATE_UP = ("q", "k", "v"), ("gate", "up")
_PHI3 = Family(
    name="phi3",
    spec=_phi3,
    prefix="model.",
    ends=embeddings("weight"),
    block=(
        *block_norms(PRE_NORMS, "weight"),
        Entry(f"{LAYER}self_attn.qkv_proj.weight", _QKV, Stacked(_QKV)),
        Entry(f"{LAYER}self_attn.o_proj.weight", ("o",)),
        Entry(f"{LAYER}mlp.gate_up_proj.weight", _GATE_UP, Stacked(_GATE_UP)),
        Entry(f"{LAYER}mlp.down_proj.weight", ("down",)),
    ),
    buffers=ROPE_BUFFERS,
)
FAMILIES = (_PHI, _PHI3)
