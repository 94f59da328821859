"""Matching without gradients: alternate Procrustes for rotation and head maps with assignment of heads and FFN units.

One algorithm serves weight matching (evidence: the weights), activation matching (evidence: cross-covariances of what
both endpoints compute on the same tokens) and their sum. Every kind of evidence for a map M between a part of A and a
part of B is a matrix C that asks for a large tr(Mᵀ C).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import HEAD_UNITS, STREAM
from ..checkpoints.lazy import Slots, Table
from ..checkpoints.weights import Weights
from ..symmetry.elements import Dense, Element, Elements, Scale, Wreath, dense, orthogonal
from ..symmetry.groups import rotates
from ..symmetry.transform import Transform, apply
from .activations import Statistics
from .evidence import StreamEvidence, at_work, ends_evidence, weigh, work_dtype
from .heads import match_heads
from .procrustes import residual_rotation
from .units import match_experts, match_head_units, match_units, unit_scores

MAX_ROUNDS = 50
GAIN = 5e-5  # of the fit: a round that gains less is the last (measured: later ones change no barrier by a hundredth)
STILL = 1e-4  # by what share of itself the stream's element may move: the next round would find the same assignments
Changes = Sequence[tuple[int, int]]  # for each round: how many assignments changed, how many there are
_log = logging.getLogger("lmc_fast")


@dataclass(frozen=True)
class Evidence:
    """How much the weights and the activations count."""

    weights: float = 1.0
    activations: float = 0.0

    @property
    def shares(self) -> tuple[float, float]:
        return self.weights, self.activations


def match(
    a: Weights,
    b: Weights,
    evidence: Evidence,
    statistics: Statistics | None = None,
    rounds: int = MAX_ROUNDS,
    visited: Callable[[int, int, Changes], None] | None = None,
) -> Transform:
    """The transform (float64) of canonical, balanced `b` that brings it closest to `a`.

    Rounds go on until no assignment changes, the stream's element moves by less than STILL or the fit gains less than
    GAIN, at most `rounds`; each loads every block once, one at a time.
    `statistics` are needed if the activations count. visited: told, before each block, the number of the round, that of
    the block, and the changes of earlier rounds.
    """
    changes: list[tuple[int, int]] = []
    spec, seen_stream = a.spec, statistics.stream if statistics else None
    ends = ends_evidence(a, b)
    stream, fit = _stream(spec, ends.copy(), seen_stream, evidence)
    found, why = Transform({STREAM: stream}, [{} for _ in range(spec.layers)]), f"as many as allowed ({rounds})"
    for done in range(1, rounds + 1):
        before = _assignments(found)
        total = ends.copy()
        for i in range(spec.layers):
            if visited:
                visited(done, i, changes)
            x, y = a.blocks[i], b.blocks[i]
            seen = statistics.blocks[i] if statistics else {}
            found.blocks[i] = match_block(spec, x, y, found.model, total, evidence, seen)
            del x, y
        if spec.head_transform:
            found.model[HEAD_UNITS] = _match_head(a, b, found.model, total)
        earlier, gained = found.model[STREAM], -fit
        found.model[STREAM], fit = _stream(spec, total, seen_stream, evidence)
        gained += fit
        after = _assignments(found)
        changed = sum(name not in before or not torch.equal(before[name], p) for name, p in after.items())
        changes.append((changed, len(after)))
        if not changed:
            why = "no assignment changed any more"
        elif _apart(earlier, found.model[STREAM]) < STILL:
            why = "the residual stream's map stays as it is"
        elif done > 1 and gained < GAIN * abs(fit):
            why = f"the last one improved the fit by {max(gained, 0) / abs(fit):.0e} of itself"
        else:
            continue
        break
    _log.info("matched in %d round%s: %s", len(changes), "s" * (len(changes) > 1), why)
    return found


def _stream(spec: Spec, found: StreamEvidence, activations: Tensor | None, evidence: Evidence) -> tuple[Element, float]:
    """The legal element of the stream (float64) that fits best, and how well; uses `found` up. activations (d, d)."""
    mapped, ordered = weigh(found.mapped, activations, evidence.shares), found.ordered * evidence.weights
    best = residual_rotation(spec, mapped, ordered)
    fit = float((best * mapped).sum() + (best.abs() * ordered).sum())
    return Dense.orthogonal(best) if rotates(spec) else orthogonal(best), fit


def _apart(x: Element, y: Element) -> float:
    """By what share of themselves two orthogonal elements differ."""
    one, two = dense(x).matrix, dense(y).matrix
    return float((one - two).norm() / two.norm())


def match_block(
    spec: Spec,
    a: Slots,
    b: Slots,
    model: Elements,
    total: StreamEvidence,
    evidence: Evidence,
    seen: Mapping[str, Table],
) -> dict[str, Element]:
    """The elements of b's block; adds to `total` what the block, so moved, says about the stream.

    model: of the stream, as found so far. seen: statistics of the block's activations, if there are any.
    """
    a, b = at_work(spec, a), at_work(spec, b)
    turned = apply(spec, {STREAM: _in(work_dtype(spec), model[STREAM])}, b)
    found = match_heads(spec, a, turned, seen, evidence.shares)
    for name in ("q", "k", "v", "o"):
        del turned[name]
    if spec.ffn.experts.count:
        found |= match_experts(spec, a, turned)
    if spec.ffn.width:
        score, negative = unit_scores(spec, a, turned, seen.get("hidden"), evidence.shares)
        turned.clear()  # the assignment of many units takes much memory of its own
        found["units"] = match_units(score, negative)
        del score, negative
    moved = apply(spec, {space: _in(work_dtype(spec), g) for space, g in found.items()}, b)
    total.add(spec, a, moved)
    return found


def _match_head(a: Weights, b: Weights, model: Elements, total: StreamEvidence) -> Element:
    """The element of a head transform's units; adds to `total` what the transform, so moved, says about the stream."""
    spec, heads = a.spec, (a.table("head"), b.table("head"))
    assert heads[0] is not None and heads[1] is not None
    x, y = ({name: t.double() for name, t in w.small_ends.items()} for w in (a, b))
    found = match_head_units(spec, x, apply(spec, {STREAM: model[STREAM]}, y), (heads[0], heads[1]))
    name = "head_transform"
    total.add(spec, {name: x[name]}, apply(spec, {HEAD_UNITS: found}, {name: y[name]}))
    return found


def _in(dtype: torch.dtype, g: Element) -> Element:
    return g.map(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _assignments(found: Transform) -> dict[str, Tensor]:
    """All of a transform that is discrete: permutations, and signs of the stream's."""
    out: dict[str, Tensor] = {}
    for i, elements in enumerate((found.model, *found.blocks)):
        for space, g in elements.items():
            if isinstance(g, Wreath):
                out[f"{space} {i}"] = g.places
    stream = found.stream
    if isinstance(stream, Wreath) and isinstance(stream.inner, Scale):
        out["signs"] = stream.inner.scale
    return out
