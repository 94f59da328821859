"""How what one endpoint learned is added to another model: in which basis, and how much of each matrix.

An alignment holds two elements for each endpoint. Matching lays on top of each other what both have in common. Learning
makes averages good, for which it also turns what they do not have in common out of each other's way: what was trained
on one endpoint then reads places where the other has something else. So matching's element carries more, and learning's
is the one for averages (benchmarks/carry.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..architectures.axes import BLOCK_READERS
from ..checkpoints import Slots, Weights
from ..errors import LmcError
from ..symmetry import Transform
from .endpoints import Endpoint, Known
from .progress import Visits, Watch

BASES = ("auto", "aligned", "matched")
_SAME = 1 - 1e-9  # a cosine from which on two matrices are the same but for rounding
Agreement = Sequence[Mapping[str, float]]  # of every block: slot -> 0 (nothing in common) to 1 (the same)


@dataclass(frozen=True)
class Addition:
    """How to add: see pipeline.carry.carry. Raises LmcError for what means nothing."""

    weight: float = 1.0
    basis: str = "auto"
    evenly: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not math.isfinite(self.weight):
            raise LmcError(f"weight {self.weight!r} is not a finite number")
        if self.basis not in BASES:
            raise LmcError(f"basis {self.basis!r} is unknown; choose one of {', '.join(BASES)}")


@dataclass(frozen=True)
class Place:
    """Where a member is for an addition: the element that brings its children there, itself there, the basis' name."""

    element: Transform
    base: Endpoint
    basis: str


def place_in(known: Known, basis: str, member: str, base: Endpoint, target: Endpoint) -> Place:
    """Where the endpoint `base` is nearest to `target`.

    "aligned": by the endpoint's own element. "matched": where matching laid it on another member, and on with what
    learning did to that one. "auto": any of them. Without learning, all are one.
    """
    own = known.element(member)
    found = [Place(own, base, "aligned")]
    if basis != "aligned" and known.is_learned:
        found = found if basis == "auto" else []
        for other in known.names:
            if other != member:
                element = known.element(other).compose(known.matched(other).inverse()).compose(known.matched(member))
                moved = element.compose(own.inverse()) if base.element is None else element
                found.append(Place(element, replace(base, element=moved), "matched"))
    if len(found) == 1:
        return found[0]
    return min(found, key=lambda place: distance_between(target.aligned(), place.base.aligned()))


def agreement(target: Endpoint, base: Endpoint, watch: Watch) -> Agreement:
    """Cosines, from 0, between all matrices of two models' blocks that read the stream into heads, units or experts.

    What such a matrix learned belongs to a head or a unit, and is worth as much as these have partners; what is
    written to the stream, or read by the model's head, all have in common.
    """
    x, y = target.aligned(), base.aligned()
    x = Visits(watch, "comparing", len(x.blocks)).of(x)
    return [_cosines(x.blocks[i], y.blocks[i]) for i in range(len(x.blocks))]


def _cosines(x: Slots, y: Slots) -> dict[str, float]:
    found = {}
    for name in sorted(x.keys() & y.keys() & set(BLOCK_READERS)):
        a, b = x[name], y[name]
        size = float(a.norm() * b.norm())
        cosine = float((a * b).sum()) / size if size else 1.0
        found[name] = 1.0 if cosine > _SAME else max(0.0, cosine)
    return found


def share_of(found: Mapping[str, float], slot: str) -> float:
    """How much counts of what a slot learned: a bias as much as its matrix."""
    return found.get(slot, found.get(slot.removesuffix("_bias"), 1.0))


def mean_agreement(found: Agreement) -> dict[str, float]:
    """Over all blocks, by slot."""
    names = sorted({name for block in found for name in block})
    return {name: round(sum(block.get(name, 1.0) for block in found) / len(found), 4) for name in names}


def distance_between(x: Weights, y: Weights) -> float:
    """How far the matrices of two models' blocks are apart: 0 where they are the same, about 1 for unrelated ones.

    √(|x - y|² / (|x|² + |y|²)), of all of them together.
    """
    apart = size = 0.0
    for i in range(len(x.blocks)):
        one, other = x.blocks[i], y.blocks[i]
        for name in [name for name, t in one.items() if t.dim() > 1]:
            a, b = one.pop(name), other.pop(name)
            apart += float((a - b).square().sum())
            size += float(a.square().sum() + b.square().sum())
        del one, other
    return math.sqrt(apart / size) if size else 0.0
