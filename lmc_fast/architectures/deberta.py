"""DeBERTa-v2 and -v3: BERT whose scores add products of queries and keys with those of relative positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..errors import LmcError
from .family import Entry, Family, Head, linear
from .heads import classifier, no_head, tagger
from .spec import FFN, Attention, Norms, Spec
from .text import BERT_FFN, BERT_HEAD, BERT_POST_NORMS, bert_trunk, layers

_LINEAR = frozenset({"q", "k", "v", "o", "up", "down", "head", "head_transform"})


def _spec(config: Any) -> Spec:
    def option(name: str, default: Any) -> Any:
        return getattr(config, name, default)

    head_dim = config.hidden_size // config.num_attention_heads
    terms = [term for term in ("c2p", "p2c") if term in (config.pos_att_type or [])]
    refused = {
        "conv_kernel_size": option("conv_kernel_size", 0) > 0,
        "embedding_size": option("embedding_size", config.hidden_size) != config.hidden_size,
        "attention_head_size": option("attention_head_size", head_dim) != head_dim,
        "share_att_key=false": config.relative_attention and bool(terms) and not option("share_att_key", False),
        "legacy=false": not config.legacy and "DebertaV2ForMaskedLM" in (config.architectures or []),
        "pooler_hidden_size": config.pooler_hidden_size != config.hidden_size,
    }
    for name in (name for name, given in refused.items() if given):
        raise LmcError(f"DeBERTa with {name} is not supported; use one like DeBERTa-v3")
    attention = Attention(
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        causal=False,
        logit_scale=(head_dim * (1 + len(terms))) ** -0.5,
    )
    base = Spec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=attention,
        ffn=FFN(width=config.intermediate_size, activation=config.hidden_act),
        max_positions=config.max_position_embeddings,
        norms=Norms(kind="layernorm", eps=config.layer_norm_eps, placement="post", embedded=True),
        tied=config.tie_word_embeddings,
        biases=_LINEAR,
        position_table=config.position_biased_input,
        task="masked",
        types=config.type_vocab_size,
        head_transform=True,
    )
    return base.changed(attention=_distances(config, terms)) if config.relative_attention and terms else base


def _distances(config: Any, terms: list[str]) -> dict[str, Any]:
    """Fields of Attention: which row of the table each distance has, as transformers puts them into buckets."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    most, buckets = config.max_relative_positions, getattr(config, "position_buckets", -1)
    most = config.max_position_embeddings if most < 1 else most
    span = buckets if buckets > 0 else most
    found = torch.arange(1 - config.max_position_embeddings, config.max_position_embeddings)
    if buckets > 0:
        found = make_log_bucket_position(found, buckets, most).long()
    norms = [part.strip() for part in getattr(config, "norm_rel_ebd", "none").lower().split("|")]
    return {
        "distances": tuple((found + span).clamp(0, 2 * span - 1).tolist()),
        "distance_rows": 2 * span,
        "distance_terms": "".join({"c2p": "q", "p2c": "k"}[term] for term in terms),
        "distances_normed": "layer_norm" in norms,
    }


def _classifier(spec: Spec, config: Any) -> Spec:
    return classifier(spec, config, pooling="cls", transform=config.pooler_hidden_act)


_HOME = "deberta.encoder."
_ATTENTION = {"q": "query_proj", "k": "key_proj", "v": "value_proj"}

FAMILIES = (
    Family(
        name="deberta-v2",
        spec=_spec,
        prefix="deberta.",
        ends=(
            *bert_trunk("deberta"),
            Entry(_HOME + "rel_embeddings.weight", ("relative",)),
            *linear(_HOME + "LayerNorm", "relative_norm"),
            *(e for e in BERT_HEAD if not e.optional),
        ),
        block=layers(
            _HOME + "layer.{i}.",
            **{slot: f"attention.self.{name}" for slot, name in _ATTENTION.items()},
            o="attention.output.dense",
            **BERT_FFN,
            **BERT_POST_NORMS,
        ),
        buffers=(r"embeddings\.position_ids$",),
        architectures=("ForMaskedLM",),
        heads=(
            Head(
                ("ForSequenceClassification",),
                _classifier,
                (*linear("pooler.dense", "head_transform"), *linear("classifier", "head")),
            ),
            Head(("ForTokenClassification",), tagger, linear("classifier", "head")),
            Head(("ForQuestionAnswering",), partial(tagger, answers=True), linear("qa_outputs", "head")),
            no_head("DebertaV2Model"),
        ),
    ),
)
