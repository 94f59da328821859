"""Text encoders: BERT, RoBERTa (norms after each branch, masked-token head), and CLIP's text tower."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .family import Entry, Family, linear
from .spec import FFN, Attention, Norms, Spec
from .vision import clip_block

_LINEAR = frozenset({"q", "k", "v", "o", "up", "down"})


def _encoder(config: Any, **features: Any) -> Spec:
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise LmcError(f"{config.model_type} as a decoder is not supported; use a masked language model")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise LmcError(f"{config.model_type} with relative positions is not supported; use one with absolute ones")
    base = Spec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            causal=False,
        ),
        ffn=FFN(width=config.intermediate_size, activation=config.hidden_act),
        max_positions=config.max_position_embeddings,
        norms=Norms(kind="layernorm", eps=config.layer_norm_eps, placement="post", embedded=True),
        tied=config.tie_word_embeddings,
        biases=_LINEAR | {"head", "head_transform", "pooler", "relation"},
        position_table=True,
        task="masked",
        types=config.type_vocab_size,
        head_transform=True,
    )
    return base.changed(**features)


def _roberta(config: Any) -> Spec:
    if config.hidden_act != "gelu":
        raise LmcError(
            f"hidden_act is {config.hidden_act!r}; RoBERTa's head uses gelu whatever it is, so must its blocks"
        )
    if not isinstance(config.pad_token_id, int) or config.pad_token_id < 0:
        raise LmcError(f"pad_token_id is {config.pad_token_id!r}; RoBERTa counts its positions from there")
    offset = config.pad_token_id + 1
    positions = config.max_position_embeddings - offset
    return _encoder(config, max_positions=positions, position_offset=offset, pad_token=config.pad_token_id)


def _clip_text(config: Any) -> Spec:
    if not isinstance(config.eos_token_id, int):
        raise LmcError(
            f"eos_token_id is {config.eos_token_id!r}; CLIP needs one number, the token whose place it reads"
        )
    return Spec(
        family="clip_text_model",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.projection_dim,
        table=config.vocab_size,
        attention=Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
        ),
        ffn=FFN(width=config.intermediate_size, activation=config.hidden_act),
        max_positions=config.max_position_embeddings,
        norms=Norms(kind="layernorm", eps=config.layer_norm_eps),
        tied=False,
        biases=_LINEAR,
        position_table=True,
        task="features",
        pooling="end",
        end_token=-1 if config.eos_token_id == 2 else config.eos_token_id,  # 2 was a mistake that transformers keeps
    )


def _ends(home: str, head: tuple[Entry, ...]) -> tuple[Entry, ...]:
    return (
        Entry(f"{home}.embeddings.word_embeddings.weight", ("embed",)),
        Entry(f"{home}.embeddings.position_embeddings.weight", ("positions",)),
        Entry(f"{home}.embeddings.token_type_embeddings.weight", ("types",)),
        *linear(f"{home}.embeddings.LayerNorm", "embed_norm"),
        Entry(f"{home}.pooler.dense.weight", ("pooler",), optional=True),
        Entry(f"{home}.pooler.dense.bias", ("pooler_bias",), optional=True),
        *head,
    )


def _block(home: str) -> tuple[Entry, ...]:
    layer = f"{home}.encoder.layer.{{i}}."
    names = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attn_post_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "ffn_post_norm": "output.LayerNorm",
    }
    return tuple(e for slot, name in names.items() for e in linear(layer + name, slot))


def _untied(spec: Spec) -> bool:
    """An untied head adds its own copy of the bias, and that one is used."""
    return not spec.tied


_BERT_HEAD = (
    *linear("cls.predictions.transform.dense", "head_transform"),
    *linear("cls.predictions.transform.LayerNorm", "head_norm"),
    Entry("cls.predictions.decoder.weight", ("head",)),
    Entry("cls.predictions.bias", ("head_bias",)),
    Entry("cls.predictions.decoder.bias", ("head_bias",), when=_untied),
    Entry("cls.seq_relationship.weight", ("relation",), optional=True),
    Entry("cls.seq_relationship.bias", ("relation_bias",), optional=True),
)
_ROBERTA_HEAD = (
    *linear("lm_head.dense", "head_transform"),
    *linear("lm_head.layer_norm", "head_norm"),
    Entry("lm_head.decoder.weight", ("head",)),
    Entry("lm_head.bias", ("head_bias",)),
    Entry("lm_head.decoder.bias", ("head_bias",), when=_untied),
)
_MASKED = ("ForMaskedLM", "ForPreTraining")
_BUFFERS = (r"embeddings\.position_ids$",)

FAMILIES = (
    Family(
        name="bert",
        spec=_encoder,
        prefix="bert.",
        ends=_ends("bert", _BERT_HEAD),
        block=_block("bert"),
        buffers=_BUFFERS,
        architectures=_MASKED,
    ),
    Family(
        name="roberta",
        spec=_roberta,
        prefix="roberta.",
        ends=_ends("roberta", _ROBERTA_HEAD),
        block=_block("roberta"),
        buffers=_BUFFERS,
        architectures=_MASKED,
    ),
    Family(
        name="clip_text_model",
        spec=_clip_text,
        prefix="text_model.",
        ends=(
            Entry("text_model.embeddings.token_embedding.weight", ("embed",)),
            Entry("text_model.embeddings.position_embedding.weight", ("positions",)),
            *linear("text_model.final_layer_norm", "final_norm"),
            Entry("text_projection.weight", ("head",)),
        ),
        block=clip_block("text_model"),
        buffers=_BUFFERS,
        architectures=("CLIPTextModelWithProjection",),
    ),
)
