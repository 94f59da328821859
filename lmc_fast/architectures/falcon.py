"""Falcon and BLOOM: LayerNorm, q/k/v fused by head or group; RoPE or ALiBi; BLOOM also normalises its embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import LmcError
from .family import Entry, Family
from .layouts import InterleavedGroups, Plain
from .rope import inverse_frequencies, trained_positions
from .spec import FFN, Attention, Norms, Rope, Spec

_LINEAR = frozenset({"q", "k", "v", "o", "up", "down"})


def _falcon(config: Any) -> Spec:
    new = config.new_decoder_architecture
    head_dim = config.hidden_size // config.num_attention_heads
    kv_heads = config.num_kv_heads if new else config.num_attention_heads
    if config.multi_query and not new:
        kv_heads = 1
    norms = config.num_ln_in_parallel_attn or (2 if new else 1)
    if new and not config.parallel_attn:
        raise LmcError("Falcon with new_decoder_architecture and without parallel_attn is not supported")
    if config.output_attentions or (config.alibi and config._attn_implementation == "eager"):
        raise LmcError(
            "transformers computes another function of Falcon with output_attentions (tokens see later ones), and with "
            "eager attention beside alibi (counted twice); remove that option"
        )
    return Spec(
        family="falcon",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=Attention(
            heads=config.num_attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            alibi=head_dim**-0.5 if config.alibi else 0.0,
            alibi_rounded=bool(config.alibi),
        ),
        ffn=FFN(width=config.ffn_hidden_size, activation=config.activation),
        max_positions=config.max_position_embeddings if config.alibi else trained_positions(config),
        norms=Norms(kind="layernorm", eps=config.layer_norm_epsilon, shared=config.parallel_attn and norms == 1),
        parallel=config.parallel_attn,
        tied=config.tie_word_embeddings,
        biases=_LINEAR if config.bias else frozenset(),
        rope=Rope() if config.alibi else Rope(*inverse_frequencies(config, head_dim)),
    )


def _bloom(config: Any) -> Spec:
    if config.apply_residual_connection_post_layernorm:
        raise LmcError("BLOOM with apply_residual_connection_post_layernorm=true is not supported")
    return Spec(
        family="bloom",
        layers=config.n_layer,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=Attention(
            heads=config.n_head, kv_heads=config.n_head, head_dim=config.hidden_size // config.n_head, alibi=1.0
        ),
        ffn=FFN(width=4 * config.hidden_size, activation="bloom_gelu"),
        max_positions=getattr(config, "seq_length", None) or 2048,
        norms=Norms(kind="layernorm", eps=config.layer_norm_epsilon, embedded=True),
        tied=config.tie_word_embeddings,
        biases=_LINEAR,
    )


def _two_norms(spec: Spec) -> bool:
    return spec.parallel and not spec.norms.shared


def _one_name(spec: Spec) -> bool:
    return not _two_norms(spec)


def _pair(
    name: str, slot: str, *, slots: tuple[str, ...] = (), when: Callable[[Spec], bool] | None = None
) -> tuple[Entry, Entry]:
    """Weight and bias of a norm or linear layer; `slots` where several are fused."""
    parts, layout = slots or (slot,), InterleavedGroups() if slots else Plain()
    biases = tuple(f"{part}_bias" for part in parts)
    return Entry(f"{name}.weight", parts, layout, when=when), Entry(f"{name}.bias", biases, layout, when=when)


_LAYER = "transformer.h.{i}."
_ENDS = (
    Entry("transformer.word_embeddings.weight", ("embed",)),
    *_pair("transformer.ln_f", "final_norm"),
    Entry("lm_head.weight", ("head",)),
)
_REST = (
    *_pair(_LAYER + "self_attention.query_key_value", "", slots=("q", "k", "v")),
    *_pair(_LAYER + "self_attention.dense", "o"),
    *_pair(_LAYER + "mlp.dense_h_to_4h", "up"),
    *_pair(_LAYER + "mlp.dense_4h_to_h", "down"),
)

FAMILIES = (
    Family(
        name="falcon",
        spec=_falcon,
        prefix="transformer.",
        ends=_ENDS,
        block=(
            *_pair(_LAYER + "ln_attn", "attn_norm", when=_two_norms),
            *_pair(_LAYER + "ln_mlp", "ffn_norm", when=_two_norms),
            *_pair(_LAYER + "input_layernorm", "attn_norm", when=_one_name),
            *_pair(_LAYER + "post_attention_layernorm", "ffn_norm", when=_one_name),
            *_REST,
        ),
        buffers=(r"rotary_emb\.inv_freq$", r"self_attention\.(maybe_rotary|rotary)\.inv_freq$"),
    ),
    Family(
        name="bloom",
        spec=_bloom,
        prefix="transformer.",
        ends=(*_ENDS, *_pair("transformer.word_embeddings_layernorm", "embed_norm")),
        block=(
            *_pair(_LAYER + "input_layernorm", "attn_norm"),
            *_pair(_LAYER + "post_attention_layernorm", "ffn_norm"),
            *_REST,
        ),
    ),
)
