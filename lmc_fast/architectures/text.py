"""Text encoders: BERT and RoBERTa with their relatives (norms after each branch), DistilBERT, ELECTRA, CLIP's tower."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .family import Entry, Family, linear
from .heads import encoder_heads, no_head
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
    if not isinstance(config.pad_token_id, int) or config.pad_token_id < 0:
        raise LmcError(f"pad_token_id is {config.pad_token_id!r}; RoBERTa counts its positions from there")
    offset = config.pad_token_id + 1
    positions = config.max_position_embeddings - offset
    return _encoder(
        config,
        max_positions=positions,
        position_offset=offset,
        pad_token=config.pad_token_id,
        head_activation="gelu",
    )


def _megatron(config: Any) -> Spec:
    return _encoder(config, norms={"placement": "pre", "embedded": False})


def _ernie(config: Any) -> Spec:
    if config.use_task_id:
        raise LmcError("ERNIE with use_task_id=true is not supported; use a checkpoint without task embeddings")
    return _encoder(config)


def _electra(config: Any) -> Spec:
    if config.embedding_size != config.hidden_size:
        raise LmcError(
            f"ELECTRA with embeddings of width {config.embedding_size} in a stream of {config.hidden_size} is not "
            "supported: they lie in a space of their own; use a checkpoint in which both are alike"
        )
    return _encoder(config, head_activation="gelu")


def _distilbert(config: Any) -> Spec:
    if config.sinusoidal_pos_embds:
        raise LmcError("DistilBERT with sinusoidal_pos_embds=true is not supported; use one with learned positions")
    return Spec(
        family="distilbert",
        layers=config.n_layers,
        width=config.dim,
        vocab=config.vocab_size,
        attention=Attention(config.n_heads, config.n_heads, config.dim // config.n_heads, causal=False),
        ffn=FFN(width=config.hidden_dim, activation=config.activation),
        max_positions=config.max_position_embeddings,
        norms=Norms(kind="layernorm", eps=1e-12, placement="post", embedded=True),
        tied=config.tie_word_embeddings,
        biases=_LINEAR | {"head", "head_transform"},
        position_table=True,
        task="masked",
        head_transform=True,
    )


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


def bert_trunk(home: str) -> tuple[Entry, ...]:
    embeddings = f"{home}.embeddings."
    return (
        Entry(embeddings + "word_embeddings.weight", ("embed",)),
        Entry(embeddings + "position_embeddings.weight", ("positions",)),
        Entry(embeddings + "token_type_embeddings.weight", ("types",)),
        *linear(embeddings + "LayerNorm", "embed_norm"),
    )


def _pooler(home: str) -> tuple[Entry, ...]:
    return tuple(Entry(e.name, e.slots, optional=True) for e in linear(f"{home}.pooler.dense", "pooler"))


def layers(layer: str, **names: str) -> tuple[Entry, ...]:
    return tuple(e for slot, name in names.items() for e in linear(layer + name, slot))


_QKVO = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
}
BERT_FFN = {"up": "intermediate.dense", "down": "output.dense"}
BERT_POST_NORMS = {"attn_post_norm": "attention.output.LayerNorm", "ffn_post_norm": "output.LayerNorm"}


def _block(home: str, norms: dict[str, str]) -> tuple[Entry, ...]:
    return layers(f"{home}.encoder.layer.{{i}}.", **_QKVO, **BERT_FFN, **norms)


def _untied(spec: Spec) -> bool:
    """An untied head adds its own copy of the bias, and that one is used."""
    return not spec.tied


BERT_HEAD = (
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
_DENSE_CLASSIFIER = (*linear("classifier.dense", "head_transform"), *linear("classifier.out_proj", "head"))
_MASKED = ("ForMaskedLM", "ForPreTraining")
_BUFFERS = (r"embeddings\.position_ids$",)


def _bert(
    name: str, home: str, spec: Any = _encoder, block: tuple[Entry, ...] = (), ends: tuple[Entry, ...] = ()
) -> Family:
    return Family(
        name=name,
        spec=spec,
        prefix=f"{home}.",
        ends=(ends or bert_trunk(home)) + _pooler(home) + BERT_HEAD,
        block=block or _block(home, BERT_POST_NORMS),
        buffers=_BUFFERS,
        architectures=_MASKED,
        heads=encoder_heads(
            (*linear(f"{home}.pooler.dense", "head_transform"), *linear("classifier", "head")), "tanh", home=home
        ),
    )


def _roberta_like(name: str, home: str = "roberta") -> Family:
    return Family(
        name=name,
        spec=_roberta,
        prefix=f"{home}.",
        ends=bert_trunk(home) + _pooler(home) + _ROBERTA_HEAD,
        block=_block(home, BERT_POST_NORMS),
        buffers=_BUFFERS,
        architectures=_MASKED,
        heads=encoder_heads(_DENSE_CLASSIFIER, "tanh", home=home),
    )


_MEGATRON_NORMS = {"attn_norm": "attention.ln", "ffn_norm": "ln"}
_MEGATRON_ENDS = tuple(e for e in bert_trunk("bert") if not e.slots[0].startswith("embed_norm"))
_DISTIL = "distilbert.embeddings."

FAMILIES = (
    _bert("bert", "bert"),
    _bert("ernie", "ernie", _ernie),
    _bert(
        "megatron-bert",
        "bert",
        _megatron,
        _block("bert", _MEGATRON_NORMS),
        _MEGATRON_ENDS + linear("bert.encoder.ln", "final_norm"),
    ),
    _roberta_like("roberta"),
    _roberta_like("xlm-roberta"),
    _roberta_like("camembert"),
    _roberta_like("data2vec-text", "data2vec_text"),
    Family(
        name="electra",
        spec=_electra,
        prefix="electra.",
        ends=(
            *bert_trunk("electra"),
            *linear("generator_predictions.dense", "head_transform"),
            *linear("generator_predictions.LayerNorm", "head_norm"),
            *linear("generator_lm_head", "head"),
        ),
        block=_block("electra", BERT_POST_NORMS),
        buffers=_BUFFERS,
        architectures=("ForMaskedLM",),
        heads=encoder_heads(_DENSE_CLASSIFIER, "gelu"),
    ),
    Family(
        name="distilbert",
        spec=_distilbert,
        prefix="distilbert.",
        ends=(
            Entry(_DISTIL + "word_embeddings.weight", ("embed",)),
            Entry(_DISTIL + "position_embeddings.weight", ("positions",)),
            *linear(_DISTIL + "LayerNorm", "embed_norm"),
            *linear("vocab_transform", "head_transform"),
            *linear("vocab_layer_norm", "head_norm"),
            *linear("vocab_projector", "head"),
        ),
        block=layers(
            "distilbert.transformer.layer.{i}.",
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            o="attention.out_lin",
            attn_post_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            ffn_post_norm="output_layer_norm",
        ),
        buffers=_BUFFERS,
        architectures=("ForMaskedLM",),
        heads=encoder_heads((*linear("pre_classifier", "head_transform"), *linear("classifier", "head")), "relu"),
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
        heads=(no_head("CLIPTextModel", pooling="end"),),
    ),
)
