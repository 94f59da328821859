"""What stands behind the final norm instead of a family's usual head: classifiers of texts or tokens, or nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..errors import LmcError
from .family import Entry, Head, linear
from .spec import Spec

_HEAD_BIASES = frozenset({"head", "head_transform", "pooler", "relation"})


def headless(spec: Spec, config: Any, *, pooling: str = "", pooler: bool = False) -> Spec:
    """The last hidden state is the output; pooler: so is a dense layer and a tanh of its first row."""
    if pooler:
        act, size = getattr(config, "pooler_act", "tanh"), getattr(config, "pooler_output_size", None)
        if act != "tanh" or size not in (None, spec.width):
            raise LmcError(f"pooler_act is {act!r} and pooler_output_size {size}; only tanh, as wide, is known")
    return _changed(
        spec,
        headless=True,
        task="features",
        vocab=spec.width,
        pooling=pooling,
        head_transform=False,
        biases=spec.biases - _HEAD_BIASES | ({"pooler"} if pooler else set()),
    )


def classifier(
    spec: Spec, config: Any, *, pooling: str, transform: str = "", normed: bool = False, biased: bool = True
) -> Spec:
    """One of config.num_labels for a text. transform: the activation behind a dense layer in front of the classifier.

    Regression, and several labels at once, have no loss here: they are features.
    """
    single = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
    return _changed(
        spec,
        task="label" if single else "features",
        vocab=config.num_labels,
        pooling=pooling,
        end_token=_padding(config) if pooling == "last" else -1,
        head_transform=bool(transform),
        head_activation=transform,
        head_normed=normed,
        biases=_biases(spec, biased, transform),
    )


def tagger(spec: Spec, config: Any, *, answers: bool = False, transform: str = "", normed: bool = False) -> Spec:
    """One of config.num_labels for each token; answers: the logits of an answer's first and last token instead."""
    if answers and config.num_labels != 2:
        raise LmcError(f"a model that finds answers has 2 outputs for each token, not {config.num_labels}")
    return _changed(
        spec,
        task="features" if answers else "tags",
        vocab=config.num_labels,
        pooling="",
        head_transform=bool(transform),
        head_activation=transform,
        head_normed=normed,
        biases=_biases(spec, True, transform),
    )


def _biases(spec: Spec, head: bool, transform: str) -> frozenset[str]:
    return spec.biases - _HEAD_BIASES | ({"head"} if head else set()) | ({"head_transform"} if transform else set())


def _changed(spec: Spec, **values: Any) -> Spec:
    table = 0 if spec.image else spec.table or spec.vocab
    return spec.changed(table=table, tied=False, head_softcap=0.0, head_scale=1.0, **values)


def _padding(config: Any) -> int:
    pad = config.pad_token_id
    return pad if isinstance(pad, int) else -1


def no_head(name: str, home: str = "", pooling: str = "") -> Head:
    """Of classes called `name`; home: where a pooler lies, if there may be one."""
    pooler = linear(f"{home}.pooler.dense", "pooler") if home else ()
    entries = tuple(Entry(e.name, e.slots, optional=True) for e in pooler)
    return Head((name,), partial(headless, pooling=pooling, pooler=bool(home)), entries)


def decoder_heads(tag: str = "score") -> tuple[Head, ...]:
    """Of a decoder: a classifier of its last token, and of every token. tag: where the latter's weights lie."""
    score = (Entry("score.weight", ("head",)),)
    return (
        Head(("ForSequenceClassification",), partial(classifier, pooling="last", biased=False), score),
        Head(("ForTokenClassification",), tagger, linear(tag, "head")),
    )


NO_HEAD = no_head("Model")


def encoder_heads(
    classify: tuple[Entry, ...], activation: str = "", *, home: str = "", tag: str = "classifier"
) -> tuple[Head, ...]:
    """Of a text encoder: classifiers of its first token (with the activation in front), of every token, and no head."""
    return (
        Head(("ForSequenceClassification",), partial(classifier, pooling="cls", transform=activation), classify),
        Head(("ForTokenClassification",), tagger, linear(tag, "head")),
        Head(("ForQuestionAnswering",), partial(tagger, answers=True), linear("qa_outputs", "head")),
        no_head("Model", home),
    )
