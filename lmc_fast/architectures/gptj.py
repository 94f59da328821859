"""GPT-J: one LayerNorm before parallel branches, rotary pairs (2i, 2i + 1), biases in FFN and head alone."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .family import Entry, Family, linear
from .layouts import InterleavedPairs
from .rope import default_frequencies
from .spec import FFN, Attention, Norms, Rope, Spec


def _spec(config: Any) -> Spec:
    head_dim = config.n_embd // config.n_head
    dim = config.rotary_dim
    if not 0 < dim <= head_dim or dim % 2:
        raise LmcError(f"rotary_dim is {dim}; it must be even and at most the {head_dim} dimensions of a head")
    return Spec(
        family="gptj",
        layers=config.n_layer,
        width=config.n_embd,
        vocab=config.vocab_size,
        attention=Attention(heads=config.n_head, kv_heads=config.n_head, head_dim=head_dim),
        ffn=FFN(width=config.n_inner or 4 * config.n_embd, activation=config.activation_function),
        max_positions=config.n_positions,
        norms=Norms(kind="layernorm", eps=config.layer_norm_epsilon, shared=True),
        parallel=True,
        tied=config.tie_word_embeddings,
        biases=frozenset({"up", "down", "head"}),
        rope=Rope(inv_freq=default_frequencies(dim, 10000.0)),
    )


_LAYER = "transformer.h.{i}."

FAMILIES = (
    Family(
        name="gptj",
        spec=_spec,
        prefix="transformer.",
        ends=(
            Entry("transformer.wte.weight", ("embed",)),
            Entry("transformer.ln_f.weight", ("final_norm",)),
            Entry("transformer.ln_f.bias", ("final_norm_bias",)),
            *linear("lm_head", "head"),
        ),
        block=(
            Entry(_LAYER + "ln_1.weight", ("attn_norm",)),
            Entry(_LAYER + "ln_1.bias", ("attn_norm_bias",)),
            Entry(_LAYER + "attn.q_proj.weight", ("q",), InterleavedPairs()),
            Entry(_LAYER + "attn.k_proj.weight", ("k",), InterleavedPairs()),
            Entry(_LAYER + "attn.v_proj.weight", ("v",)),
            Entry(_LAYER + "attn.out_proj.weight", ("o",)),
            *linear(_LAYER + "mlp.fc_in", "up"),
            *linear(_LAYER + "mlp.fc_out", "down"),
        ),
        buffers=(r"attn\.(bias|masked_bias|embed_positions)$",),
    ),
)
