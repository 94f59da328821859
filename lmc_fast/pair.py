"""Two checkpoints that can be compared weight by weight."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .architectures import Spec, flat_fields
from .checkpoints import Model, Place
from .errors import LmcError
from .symmetry.grown import GrownModel, alike
from .tokenizer import Comparison, compare_tokenizers

log = logging.getLogger(__name__)

_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")


@dataclass(frozen=True)
class Pair:
    """Endpoints A and B of one architecture; nothing is loaded yet. `warnings`: what is not as it might be expected."""

    a: Model
    b: Model
    warnings: tuple[str, ...] = ()

    @property
    def spec(self) -> Spec:
        return self.a.spec


def open_pair(a: Place, b: Place, headers_only: bool = False) -> Pair:
    """Opens two checkpoint directories or hub ids (OWNER/NAME, OWNER/NAME@REVISION, or an address on huggingface.co),
    transformers models, or (config, state dict) pairs. What is in memory is not copied: leave it as it is.

    headers_only: do not download weights, which cannot be read then. Raises LmcError if either is unusable or they do
    not match.
    """
    one, two = Model(a, headers_only), Model(b, headers_only)
    try:
        return pair_of(one, two)
    except LmcError as error:
        raise LmcError(f"{one.source} and {two.source} cannot be aligned: {error}") from error


def pair_of(a: Model, b: Model, grow: bool = True) -> Pair:
    """A pair of two opened models. Vocabularies padded to different sizes are cut to the smaller one, with a warning;
    models of different sizes are grown to the smallest that has room for both (symmetry.growth). grow: whether they
    may be.

    Raises LmcError with what sets them apart.
    """
    text = a.family is b.family and not a.spec.image
    found = _compared(a, b) if text else Comparison()
    if found.problem:
        raise LmcError(found.problem)
    warnings = list(found.warnings)
    if text and a.vocabulary != b.vocabulary:
        warnings.append(_cut(a, b, found.used))
    a, b = in_common(a, b)
    if grow:
        a, b = alike((a, b))
    problem = unlike(a.spec, b.spec)
    if problem:
        raise LmcError(problem)
    for model in (a, b):
        if isinstance(model, GrownModel):
            log.info(model.summary)
    for warning in warnings:
        log.warning(warning)
    return Pair(a, b, tuple(warnings))


def _compared(a: Model, b: Model) -> Comparison:
    """Their tokenizers, where both have directories."""
    if a.home is not None and b.home is not None:
        return compare_tokenizers(a.home, b.home)
    text = "a model in memory has no tokenizer: that ids mean the same to both is taken for granted"
    return Comparison(None, (text,))


def in_common(a: Model, b: Model) -> tuple[Model, Model]:
    """Both, limited to the tokens that both have and, where positions are no table, to lengths that both can read."""
    if a.family is not b.family or a.spec.image:
        return a, b
    tokens = min(a.vocabulary, b.vocabulary)
    least = min(a.spec.max_positions, b.spec.max_positions)
    positions = [m.spec.max_positions if m.spec.position_table else least for m in (a, b)]
    return a.limited(tokens, positions[0]), b.limited(tokens, positions[1])


def _cut(a: Model, b: Model, used: int | None) -> str:
    """What is lost where the larger vocabulary is cut. Raises LmcError if that would be tokens in use."""
    small, large = sorted((a, b), key=lambda model: model.vocabulary)
    tokens = small.vocabulary
    special = [getattr(large.config, key, None) for key in _SPECIAL]
    special += [i for ids in special if isinstance(ids, list) for i in ids]  # there may be several ends
    last = max((i for i in special if isinstance(i, int)), default=-1)
    if max(used or 0, last + 1) > tokens:
        raise LmcError(
            f"{large.source} uses {max(used or 0, last + 1)} tokens, {small.source} has rows for {tokens}; give "
            "that one as many with transformers (resize_token_embeddings, save_pretrained)"
        )
    known = "no token uses them" if used is not None else "there is no tokenizer to tell whether tokens use them"
    return (
        f"the vocabularies are padded to {a.vocabulary} and {b.vocabulary} rows: rows {tokens} to "
        f"{large.vocabulary - 1} of {large.source} are left out ({known})"
    )


def unlike(x: Spec, y: Spec) -> str | None:
    """What sets two specs apart so that their models cannot be aligned, or None."""
    if x.family != y.family:
        return f"their architectures differ ({x.family} and {y.family})"
    theirs = flat_fields(y)
    for name, left in flat_fields(x).items():
        right = theirs[name]
        if name not in ("max_positions", "tied") and left != right:
            if name in ("inv_freq", "local_inv_freq"):
                return "their rope settings differ"
            return f"{name} differs ({_show(left)} and {_show(right)})"
    if x.position_table and x.max_positions != y.max_positions:
        return f"max_positions differs ({x.max_positions} and {y.max_positions})"
    return None


def _show(value: object) -> str:
    return ", ".join(sorted(value)) or "none" if isinstance(value, frozenset) else str(value)
