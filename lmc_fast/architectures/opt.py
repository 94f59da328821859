"""OPT: LayerNorm, learned positions that start at row 2, ReLU."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .family import Entry, Family, linear
from .spec import FFN, Attention, Norms, Spec


def _spec(config: Any) -> Spec:
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        raise LmcError("OPT with norms after the blocks or projected embeddings (opt-350m) is not supported")
    if config._remove_final_layer_norm:
        raise LmcError("OPT without its final LayerNorm is not supported; use a checkpoint that has it")
    return Spec(
        family="opt",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
        ),
        ffn=FFN(width=config.ffn_dim, activation=config.activation_function),
        max_positions=config.max_position_embeddings,
        norms=Norms(kind="layernorm", eps=1e-5, parametric=config.layer_norm_elementwise_affine),
        tied=config.tie_word_embeddings,
        biases=frozenset({"q", "k", "v", "o", "up", "down"}) if config.enable_bias else frozenset(),
        position_table=True,
        position_offset=2,
    )


_LAYER = "model.decoder.layers.{i}."

FAMILIES = (
    Family(
        name="opt",
        spec=_spec,
        prefix="model.",
        ends=(
            Entry("model.decoder.embed_tokens.weight", ("embed",)),
            Entry("model.decoder.embed_positions.weight", ("positions",)),
            *linear("model.decoder.final_layer_norm", "final_norm"),
            Entry("lm_head.weight", ("head",)),
        ),
        block=(
            *linear(_LAYER + "self_attn_layer_norm", "attn_norm"),
            *linear(_LAYER + "final_layer_norm", "ffn_norm"),
            *(e for n in "qkv" for e in linear(f"{_LAYER}self_attn.{n}_proj", n)),
            *linear(_LAYER + "self_attn.out_proj", "o"),
            *linear(_LAYER + "fc1", "up"),
            *linear(_LAYER + "fc2", "down"),
        ),
    ),
)
