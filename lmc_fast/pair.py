"""Checkpoints that can be compared weight by weight: two, or more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

from .architectures import Spec, flat_fields
from .checkpoints import Model, Place
from .errors import LmcError
from .members import listed, member_names
from .symmetry.grown import GrownModel, alike
from .tokenizer import Comparison, compare_tokenizers

log = logging.getLogger(__name__)

_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")


M = TypeVar("M", bound="Models")


@dataclass(frozen=True)
class Models:
    """Checkpoints of one architecture; nothing is loaded yet.

    Attributes:
        members: the models, limited to what they have in common, and grown where sizes differ.
        warnings: what is not as it might be expected, in sentences.

    >>> lmc.open_models(["A", "B", "C"]).names
    ['a', 'b', 'c']
    """

    members: tuple[Model, ...]
    warnings: tuple[str, ...] = ()

    @property
    def spec(self) -> Spec:
        """The architecture that all have."""
        return self.members[0].spec

    @property
    def a(self) -> Model:
        """The first model."""
        return self.members[0]

    @property
    def b(self) -> Model:
        """The second model."""
        return self.members[1]

    @property
    def names(self) -> list[str]:
        """What the members are called in files: a, b, c, ..."""
        return member_names(len(self.members))

    @property
    def homes(self) -> list[Path | None]:
        """The members' directories; None for one in memory."""
        return [model.home for model in self.members]

    def with_members(self: M, members: Sequence[Model]) -> M:
        """The same with others in the place of the members.

        Args:
            members: models of the same architecture, as many.

        Returns:
            A copy; it shares the warnings.
        """
        found = copy(self)
        object.__setattr__(found, "members", tuple(members))
        return found


class Pair(Models):
    """Two of them: the endpoints A and B.

    Args:
        a: endpoint A.
        b: endpoint B.
        warnings: as in Models.

    >>> lmc.open_pair("A", "B").names
    ['a', 'b']
    """

    def __init__(self, a: Model, b: Model, warnings: tuple[str, ...] = ()):
        super().__init__((a, b), warnings)


def open_pair(a: Place, b: Place, headers_only: bool = False) -> Pair:
    """Opens two checkpoints that are to be aligned. What is in memory is not copied: leave it as it is.

    Args:
        a: a checkpoint directory, a hub id (OWNER/NAME, OWNER/NAME@REVISION, or an address on huggingface.co), a
            transformers model, or (config, state dict).
        b: the other, likewise.
        headers_only: do not download weights, which cannot be read then.

    Returns:
        The pair; `warnings` says what differs harmlessly. Vocabularies padded to different sizes are cut to the smaller
        one; models of different sizes are grown to the smallest that has room for both.

    Raises:
        LmcError: either is unusable, or they cannot be aligned; the sentence says why.

    >>> pair = lmc.open_pair("A", "B")
    >>> pair.a.spec.family
    'gpt_neox'
    """
    one, two = Model(a, headers_only), Model(b, headers_only)
    try:
        return pair_of(one, two)
    except LmcError as error:
        raise LmcError(f"{one.source} and {two.source} cannot be aligned: {error}") from error


def open_models(sources: Sequence[Place], headers_only: bool = False) -> Models:
    """As `open_pair`, of any number of checkpoints.

    Args:
        sources: 2 to 26 of what open_pair takes.
        headers_only: do not download weights, which cannot be read then.

    Returns:
        The models; of two it is a Pair.

    Raises:
        LmcError: one is unusable, does not fit the others, or is given twice; the sentence names it.

    >>> len(lmc.open_models(["A", "B", "C"]).members)
    3
    """
    if isinstance(sources, str) or not isinstance(sources, Sequence):
        raise LmcError(f"models are given in a list, not as {sources!r}")
    names = member_names(len(sources))
    if len(names) == 2:
        return open_pair(sources[0], sources[1], headers_only)
    return models_of([Model(source, headers_only) for source in sources])


def pair_of(a: Model, b: Model, grow: bool = True) -> Pair:
    """A pair of two opened models. Vocabularies padded to different sizes are cut to the smaller one, with a warning;
    models of different sizes are grown to the smallest that has room for both (symmetry.growth). grow: whether they
    may be.

    Raises LmcError with what sets them apart.
    """
    warnings, found = _compared(a, b, grow), in_common(a, b)
    a, b = alike(found) if grow else found
    _tell(warnings, (a, b))
    return Pair(a, b, tuple(warnings))


def models_of(models: Sequence[Model], repeated: bool = False) -> Models:
    """The same of any number. repeated: whether one of more than two may be there more than once."""
    if len(models) == 2:
        return pair_of(models[0], models[1])
    for one, two in () if repeated else _same(models):
        names = [one.source] if one.source == two.source else [one.source, two.source]
        what = f"{listed(names)} {'are the same model' if names[1:] else 'is given twice'}"
        raise LmcError(f"{what}; give each once (merge has --weights, so that one counts more)")
    first, *others = models
    problems: dict[Model, str] = {}
    warnings: list[str] = []
    for other in others:
        try:
            warnings += _compared(first, other)
        except LmcError as error:
            problems[other] = str(error)
    if problems:
        culprit, problem = next(iter(problems.items()))
        if len(problems) == len(others) and not any(_problem(others[0], other) for other in others[1:]):
            raise LmcError(f"{first.source} cannot be aligned with the others: {problem}")  # which would get on
        raise LmcError(f"{culprit.source} cannot be aligned with {first.source}: {problem}")
    warnings, found = list(dict.fromkeys(warnings)), tuple(alike(in_common(*models)))
    _tell(warnings, found)
    return Models(found, tuple(warnings))


def _same(models: Sequence[Model]) -> list[tuple[Model, Model]]:
    """Every two that are read from one and the same directory."""
    return [(x, y) for x, y in combinations(models, 2) if x.home and y.home and x.home.samefile(y.home)]


def _compared(a: Model, b: Model, grow: bool = True) -> list[str]:
    """Warnings. Raises LmcError with what sets two models apart."""
    text = a.family is b.family and not a.spec.image
    found = _tokenizers(a, b) if text else Comparison()
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
    return warnings


def _problem(a: Model, b: Model) -> str | None:
    try:
        _compared(a, b)
    except LmcError as error:
        return str(error)
    return None


def _tell(warnings: Sequence[str], models: Sequence[Model]) -> None:
    for model in models:
        if isinstance(model, GrownModel):
            log.info(model.summary)
    for warning in warnings:
        log.warning(warning)


def _tokenizers(a: Model, b: Model) -> Comparison:
    """Compared, where both have directories."""
    if a.home is not None and b.home is not None:
        return compare_tokenizers(a.home, b.home)
    text = "a model in memory has no tokenizer: that ids mean the same to both is taken for granted"
    return Comparison(None, (text,))


def in_common(*models: Model) -> tuple[Model, ...]:
    """All, limited to the tokens that all have and, where positions are no table, to lengths that all can read."""
    if any(model.family is not models[0].family for model in models) or models[0].spec.image:
        return models
    tokens = min(model.vocabulary for model in models)
    least = min(model.spec.max_positions for model in models)
    return tuple(m.limited(tokens, m.spec.max_positions if m.spec.position_table else least) for m in models)


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
