"""GPT-J and CodeGen: one LayerNorm before parallel branches, pairs (2i, 2i + 1), biases in FFN and head alone."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .family import Entry, Family, linear
from .layouts import FourShards, InterleavedPairs
from .rope import default_frequencies
from .spec import FFN, Attention, Norms, Rope, Spec


def _spec(config: Any) -> Spec:
    head_dim = config.n_embd // config.n_head
    dim = config.rotary_dim
    if dim is None:
        raise LmcError("rotary_dim is null; give the number of dimensions of a head that are turned")
    if config.model_type == "codegen" and config.n_head % 4:
        raise LmcError(f"n_head is {config.n_head}; CodeGen's heads lie in four shards, so it must be a multiple of 4")
    if not 0 < dim <= head_dim or dim % 2:
        raise LmcError(f"rotary_dim is {dim}; it must be even and at most the {head_dim} dimensions of a head")
    return Spec(
        family=config.model_type,
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
_ENDS = (
    Entry("transformer.wte.weight", ("embed",)),
    *linear("transformer.ln_f", "final_norm"),
    *linear("lm_head", "head"),
)
_FFN = (*linear(_LAYER + "mlp.fc_in", "up"), *linear(_LAYER + "mlp.fc_out", "down"))

FAMILIES = (
    Family(
        name="gptj",
        spec=_spec,
        prefix="transformer.",
        ends=_ENDS,
        block=(
            *linear(_LAYER + "ln_1", "attn_norm"),
            Entry(_LAYER + "attn.q_proj.weight", ("q",), InterleavedPairs()),
            Entry(_LAYER + "attn.k_proj.weight", ("k",), InterleavedPairs()),
            Entry(_LAYER + "attn.v_proj.weight", ("v",)),
            Entry(_LAYER + "attn.out_proj.weight", ("o",)),
            *_FFN,
        ),
        buffers=(r"attn\.(bias|masked_bias|embed_positions)$",),
    ),
    Family(
        name="codegen",
        spec=_spec,
        prefix="transformer.",
        ends=_ENDS,
        block=(
            *linear(_LAYER + "ln_1", "attn_norm"),
            Entry(_LAYER + "attn.qkv_proj.weight", ("q", "k", "v"), FourShards()),
            Entry(_LAYER + "attn.out_proj.weight", ("o",)),
            *_FFN,
        ),
        buffers=(r"attn\.(bias|causal_mask|masked_bias|embed_positions)$",),
    ),
)
