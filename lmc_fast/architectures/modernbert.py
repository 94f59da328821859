"""ModernBERT: norms before each branch but the first, RoPE, gated units, windows to both sides in most blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from .decoder import two_ropes, windows
from .family import Entry, Family, Head, linear
from .heads import classifier, no_head, tagger
from .layouts import Stacked
from .spec import FFN, Attention, Norms, Spec


def _spec(config: Any) -> Spec:
    head_dim = config.hidden_size // config.num_attention_heads
    reach = windows(config, by_layer=True)  # tokens to each side, itself not included
    biases = {*("qkvo" if config.attention_bias else ""), *(("up", "gate", "down") if config.mlp_bias else ())}
    biases |= {*(("head",) if config.decoder_bias else ()), *(("head_transform",) if config.classifier_bias else ())}
    return Spec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=head_dim,
            causal=False,
            windows=tuple(size and size + 1 for size in reach),
        ),
        ffn=FFN(width=config.intermediate_size, activation=config.hidden_activation, gated=True),
        max_positions=config.max_position_embeddings,
        norms=Norms("layernorm", config.norm_eps, biased=config.norm_bias, embedded=True, bare_start=True),
        rope=two_ropes(config, head_dim),
        tied=config.tie_word_embeddings,
        biases=frozenset(biases),
        task="masked",
        head_transform=True,
        head_activation=config.classifier_activation,
    )


def _head(change: Any, spec: Spec, config: Any) -> Spec:
    """With the dense layer, activation and norm of the masked language model in front."""
    found: Spec = change(spec, config, transform=config.classifier_activation, normed=True)
    return found if config.classifier_bias else found.changed(biases=found.biases - {"head_transform"})


def _classifier(spec: Spec, config: Any, **transform: Any) -> Spec:
    return classifier(spec, config, pooling=config.classifier_pooling, **transform)


_LAYER = "model.layers.{i}."
_TRANSFORM = (*linear("head.dense", "head_transform"), *linear("head.norm", "head_norm"))
_CLASSIFY = (*_TRANSFORM, *linear("classifier", "head"))
_FUSED = {"attn.Wqkv": ("q", "k", "v"), "mlp.Wi": ("gate", "up")}

FAMILIES = (
    Family(
        name="modernbert",
        spec=_spec,
        prefix="model.",
        ends=(
            Entry("model.embeddings.tok_embeddings.weight", ("embed",)),
            *linear("model.embeddings.norm", "embed_norm"),
            *linear("model.final_norm", "final_norm"),
            *_TRANSFORM,
            *linear("decoder", "head"),
        ),
        block=(
            Entry(_LAYER + "attn_norm.weight", ("attn_norm",), first=1),
            Entry(_LAYER + "attn_norm.bias", ("attn_norm_bias",), first=1),
            *linear(_LAYER + "mlp_norm", "ffn_norm"),
            *(Entry(f"{_LAYER}{name}.weight", slots, Stacked(slots)) for name, slots in _FUSED.items()),
            *(
                Entry(f"{_LAYER}{name}.bias", biases, Stacked(biases))
                for name, slots in _FUSED.items()
                for biases in [tuple(f"{slot}_bias" for slot in slots)]
            ),
            *linear(_LAYER + "attn.Wo", "o"),
            *linear(_LAYER + "mlp.Wo", "down"),
        ),
        architectures=("ForMaskedLM",),
        heads=(
            Head(("ForSequenceClassification",), partial(_head, _classifier), _CLASSIFY),
            Head(("ForTokenClassification",), partial(_head, tagger), _CLASSIFY),
            Head(("ForQuestionAnswering",), partial(_head, partial(tagger, answers=True)), _CLASSIFY),
            no_head("ModernBertModel"),
        ),
    ),
)
