"""Two checkpoints that can be compared weight by weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .architectures import Spec, flat_fields
from .checkpoints import Model
from .errors import LmcError


@dataclass(frozen=True)
class Pair:
    """Endpoints A and B of one architecture; nothing is loaded yet."""

    a: Model
    b: Model

    @property
    def spec(self) -> Spec:
        return self.a.spec


def open_pair(a: str | Path, b: str | Path) -> Pair:
    """Opens two checkpoint directories or hub ids. Raises LmcError if either is unusable or they do not match."""
    pair = Pair(Model(a), Model(b))
    problem = mismatch(pair)
    if problem:
        raise LmcError(f"{a} and {b} cannot be aligned: {problem}")
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
    left, right = _vocabulary(pair.a.path), _vocabulary(pair.b.path)
    if left is not None and right is not None and left != right:
        return "their tokenizers give different ids to the same tokens; align models that share a tokenizer"
    return None


def _show(value: object) -> str:
    return ", ".join(sorted(value)) or "none" if isinstance(value, frozenset) else str(value)


def _vocabulary(path: Path) -> object:
    """Token -> id of a fast tokenizer, or None where there is none to read."""
    try:
        return json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
