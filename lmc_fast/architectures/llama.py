"""Llama, TinyLlama, SmolLM: RMSNorm, RoPE, grouped queries, SwiGLU."""

from __future__ import annotations

from typing import Any

from .rope import inverse_frequencies
from .spec import Entry, Family, Spec


def _spec(config: Any) -> Spec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inv_freq, scaling = inverse_frequencies(config, head_dim)
    biases = {"q", "k", "v", "o"} if config.attention_bias else set()
    if config.mlp_bias:
        biases |= {"up", "gate", "down"}
    return Spec(
        family="llama",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffn_width=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        norm="rmsnorm",
        norm_eps=config.rms_norm_eps,
        activation=config.hidden_act,
        gated=True,
        parallel=False,
        tied=config.tie_word_embeddings,
        biases=frozenset(biases),
        inv_freq=inv_freq,
        rope_scaling=scaling,
    )


_LAYER = "model.layers.{i}."


def _linear(name: str, slot: str) -> tuple[Entry, Entry]:
    return Entry(_LAYER + name + ".weight", (slot,)), Entry(_LAYER + name + ".bias", (slot + "_bias",))


FAMILY = Family(
    name="llama",
    spec=_spec,
    prefix="model.",
    ends=(
        Entry("model.embed_tokens.weight", ("embed",)),
        Entry("model.norm.weight", ("final_norm",)),
        Entry("lm_head.weight", ("head",)),
    ),
    block=(
        Entry(_LAYER + "input_layernorm.weight", ("attn_norm",)),
        Entry(_LAYER + "post_attention_layernorm.weight", ("ffn_norm",)),
        *_linear("self_attn.q_proj", "q"),
        *_linear("self_attn.k_proj", "k"),
        *_linear("self_attn.v_proj", "v"),
        *_linear("self_attn.o_proj", "o"),
        *_linear("mlp.gate_proj", "gate"),
        *_linear("mlp.up_proj", "up"),
        *_linear("mlp.down_proj", "down"),
    ),
    buffers=(r"rotary_emb\.inv_freq$",),
)
