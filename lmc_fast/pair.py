"""Two checkpoints that can be compared weight by weight."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .architectures import Spec, flat_fields
from .checkpoints import Model
from .errors import LmcError
from .tokenizer import Comparison, compare_tokenizers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Endpoints A and B of one architecture; nothing is loaded yet."""

    a: Model
    b: Model

    @property
    def spec(self) -> Spec:
        return self.a.spec

    @cached_property
    def tokenizers(self) -> Comparison:
        return Comparison() if self.spec.image else compare_tokenizers(self.a.path, self.b.path)


def open_pair(a: str | Path, b: str | Path) -> Pair:
    """Opens two checkpoint directories or hub ids. Raises LmcError if either is unusable or they do not match."""
    pair = Pair(Model(a), Model(b))
    problem = mismatch(pair)
    if problem:
        raise LmcError(f"{a} and {b} cannot be aligned: {problem}")
    for warning in pair.tokenizers.warnings:
        log.warning(warning)
    return pair


def mismatch(pair: Pair) -> str | None:
    """Why the two models cannot be aligned, or None."""
    x, y = pair.a.spec, pair.b.spec
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
    return None if x.image else pair.tokenizers.problem


def _show(value: object) -> str:
    return ", ".join(sorted(value)) or "none" if isinstance(value, frozenset) else str(value)
