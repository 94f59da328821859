"""GPT-2: LayerNorm, learned positions, Conv1D layout, fused q/k/v, tied embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import LmcError
from .family import Entry, Family, Fold
from .layouts import Conv1D
from .spec import FFN, Attention, Norms, Spec


def _spec(config: Any) -> Spec:
    if config.add_cross_attention:
        raise LmcError("GPT-2 with add_cross_attention=true is not supported; use a checkpoint without it")
    heads, head_dim = config.n_head, config.n_embd // config.n_head
    return Spec(
        family="gpt2",
        layers=config.n_layer,
        width=config.n_embd,
        vocab=config.vocab_size,
        attention=Attention(heads, heads, head_dim, logit_scale=0.0 if config.scale_attn_weights else 1.0),
        ffn=FFN(width=config.n_inner or 4 * config.n_embd, activation=config.activation_function),
        max_positions=config.n_positions,
        norms=Norms(kind="layernorm", eps=config.layer_norm_epsilon),
        tied=config.tie_word_embeddings,
        biases=frozenset({"q", "k", "v", "o", "up", "down"}),
        position_table=True,
    )


def _by_layer(index: int, slots: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores of block i are divided by i + 1: so are the queries."""
    return {name: slots[name] / (index + 1) for name in ("q", "q_bias")}


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
    folds=(Fold("scale_attn_by_inverse_layer_idx", _by_layer),),
    buffers=(r"attn\.(bias|masked_bias)$",),
)
