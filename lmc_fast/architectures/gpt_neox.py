"""GPT-NeoX, Pythia: LayerNorm, partial RoPE, parallel or sequential residual, biases, fused q/k/v by head."""

from __future__ import annotations

from typing import Any

from .family import Entry, Family
from .layouts import InterleavedHeads
from .rope import inverse_frequencies, trained_positions
from .spec import FFN, Attention, Norms, Rope, Spec


def _spec(config: Any) -> Spec:
    head_dim = config.hidden_size // config.num_attention_heads
    inv_freq, scaling = inverse_frequencies(config, head_dim, partial=True)
    attention = {"q", "k", "v", "o"} if getattr(config, "attention_bias", True) else set()
    return Spec(
        family="gpt_neox",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=Attention(heads=config.num_attention_heads, kv_heads=config.num_attention_heads, head_dim=head_dim),
        ffn=FFN(width=config.intermediate_size, activation=config.hidden_act),
        max_positions=trained_positions(config),
        norms=Norms(kind="layernorm", eps=config.layer_norm_eps),
        parallel=config.use_parallel_residual,
        tied=config.tie_word_embeddings,
        biases=frozenset(attention | {"up", "down"}),
        rope=Rope(inv_freq=inv_freq, scaling=scaling),
    )


_LAYER = "gpt_neox.layers.{i}."

FAMILY = Family(
    name="gpt_neox",
    spec=_spec,
    prefix="gpt_neox.",
    ends=(
        Entry("gpt_neox.embed_in.weight", ("embed",)),
        Entry("gpt_neox.final_layer_norm.weight", ("final_norm",)),
        Entry("gpt_neox.final_layer_norm.bias", ("final_norm_bias",)),
        Entry("embed_out.weight", ("head",)),
    ),
    block=(
        Entry(_LAYER + "input_layernorm.weight", ("attn_norm",)),
        Entry(_LAYER + "input_layernorm.bias", ("attn_norm_bias",)),
        Entry(_LAYER + "post_attention_layernorm.weight", ("ffn_norm",)),
        Entry(_LAYER + "post_attention_layernorm.bias", ("ffn_norm_bias",)),
        Entry(_LAYER + "attention.query_key_value.weight", ("q", "k", "v"), InterleavedHeads()),
        Entry(_LAYER + "attention.query_key_value.bias", ("q_bias", "k_bias", "v_bias"), InterleavedHeads()),
        Entry(_LAYER + "attention.dense.weight", ("o",)),
        Entry(_LAYER + "attention.dense.bias", ("o_bias",)),
        Entry(_LAYER + "mlp.dense_h_to_4h.weight", ("up",)),
        Entry(_LAYER + "mlp.dense_h_to_4h.bias", ("up_bias",)),
        Entry(_LAYER + "mlp.dense_4h_to_h.weight", ("down",)),
        Entry(_LAYER + "mlp.dense_4h_to_h.bias", ("down_bias",)),
    ),
    other_names=(("embed_out.", "lm_head."),),
    buffers=(r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
)
