"""GPT-2: LayerNorm, learned positions, Conv1D layout, fused q/k/v, tied embeddings."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .family import Entry, Family
from .layouts import Conv1D
from .spec import FFN, Attention, Norms, Spec


def _spec(config: Any) -> Spec:
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, option, False):
            raise LmcError(f"GPT-2 with {option}=true is not supported; use a checkpoint without it")
    if not config.scale_attn_weights:
        raise LmcError("GPT-2 with scale_attn_weights=false is not supported; use a checkpoint without it")
    return Spec(
        family="gpt2",
        layers=config.n_layer,
        width=config.n_embd,
        vocab=config.vocab_size,
        attention=Attention(heads=config.n_head, kv_heads=config.n_head, head_dim=config.n_embd // config.n_head),
        ffn=FFN(width=config.n_inner or 4 * config.n_embd, activation=config.activation_function),
        max_positions=config.n_positions,
        norms=Norms(kind="layernorm", eps=config.layer_norm_epsilon),
        tied=config.tie_word_embeddings,
        biases=frozenset({"q", "k", "v", "o", "up", "down"}),
        position_table=True,
    )


_LAYER = "transformer.h.{i}."

FAMILY = Family(
    name="gpt2",
    spec=_spec,
    prefix="transformer.",
    ends=(
        Entry("transformer.wte.weight", ("embed",)),
        Entry("transformer.wpe.weight", ("positions",)),
        Entry("transformer.ln_f.weight", ("final_norm",)),
        Entry("transformer.ln_f.bias", ("final_norm_bias",)),
        Entry("lm_head.weight", ("head",)),
    ),
    block=(
        Entry(_LAYER + "ln_1.weight", ("attn_norm",)),
        Entry(_LAYER + "ln_1.bias", ("attn_norm_bias",)),
        Entry(_LAYER + "ln_2.weight", ("ffn_norm",)),
        Entry(_LAYER + "ln_2.bias", ("ffn_norm_bias",)),
        Entry(_LAYER + "attn.c_attn.weight", ("q", "k", "v"), Conv1D(3)),
        Entry(_LAYER + "attn.c_attn.bias", ("q_bias", "k_bias", "v_bias"), Conv1D(3)),
        Entry(_LAYER + "attn.c_proj.weight", ("o",), Conv1D()),
        Entry(_LAYER + "attn.c_proj.bias", ("o_bias",)),
        Entry(_LAYER + "mlp.c_fc.weight", ("up",), Conv1D()),
        Entry(_LAYER + "mlp.c_fc.bias", ("up_bias",)),
        Entry(_LAYER + "mlp.c_proj.weight", ("down",), Conv1D()),
        Entry(_LAYER + "mlp.c_proj.bias", ("down_bias",)),
    ),
    buffers=(r"attn\.(bias|masked_bias)$",),
)
