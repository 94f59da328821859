"""GPT-2: LayerNorm, learned positions, Conv1D layout, fused q/k/v, tied embeddings; SantaCoder: perhaps one key."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import LmcError
from .family import Entry, Family, Fold, linear
from .layouts import Conv1D, InterleavedHeads, Stacked
from .spec import FFN, Attention, Norms, Spec


def _spec(config: Any) -> Spec:
    if config.add_cross_attention:
        raise LmcError(
            f"{config.model_type} with add_cross_attention=true is not supported; use a checkpoint without it"
        )
    heads, head_dim = config.n_head, config.n_embd // config.n_head
    kv_heads = 1 if config.model_type == "gpt_bigcode" and config.multi_query else heads
    return Spec(
        family=config.model_type,
        layers=config.n_layer,
        width=config.n_embd,
        vocab=config.vocab_size,
        attention=Attention(heads, kv_heads, head_dim, logit_scale=0.0 if config.scale_attn_weights else 1.0),
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


def _one_key(spec: Spec) -> bool:
    return spec.attention.kv_heads == 1 < spec.attention.heads


def _own_keys(spec: Spec) -> bool:
    return not _one_key(spec)


_LAYER = "transformer.h.{i}."
_QKV, _QKV_BIAS = ("q", "k", "v"), ("q_bias", "k_bias", "v_bias")
_ENDS = (
    Entry("transformer.wte.weight", ("embed",)),
    Entry("transformer.wpe.weight", ("positions",)),
    *linear("transformer.ln_f", "final_norm"),
    Entry("lm_head.weight", ("head",)),
)
_NORMS = (*linear(_LAYER + "ln_1", "attn_norm"), *linear(_LAYER + "ln_2", "ffn_norm"))

_GPT2 = Family(
    name="gpt2",
    spec=_spec,
    prefix="transformer.",
    ends=_ENDS,
    block=(
        *_NORMS,
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
_BIGCODE = Family(
    name="gpt_bigcode",
    spec=_spec,
    prefix="transformer.",
    ends=_ENDS,
    block=(
        *_NORMS,
        Entry(_LAYER + "attn.c_attn.weight", _QKV, Stacked(_QKV), when=_one_key),
        Entry(_LAYER + "attn.c_attn.bias", _QKV_BIAS, Stacked(_QKV_BIAS), when=_one_key),
        Entry(_LAYER + "attn.c_attn.weight", _QKV, InterleavedHeads(), when=_own_keys),
        Entry(_LAYER + "attn.c_attn.bias", _QKV_BIAS, InterleavedHeads(), when=_own_keys),
        *linear(_LAYER + "attn.c_proj", "o"),
        *linear(_LAYER + "mlp.c_fc", "up"),
        *linear(_LAYER + "mlp.c_proj", "down"),
    ),
    buffers=(r"attn\.(bias|masked_bias)$",),
)
FAMILIES = (_GPT2, _BIGCODE)
