"""Matching of FFN units, of experts and their units, and of a head transform's units: assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.lazy import Slots, Table, row_runs
from ..solvers import solve_assignments
from ..symmetry.elements import Element, Wreath, units
from ..symmetry.groups import unit_scale_signs
from .evidence import ORDERED, add_evidence, weigh

SAMPLED_UNITS = 256  # of each of A's experts, when experts are compared
_UNITS = ("units",)


def unit_scores(
    spec: Spec, a: Slots, b: Slots, activations: Table | None = None, shares: tuple[float, float | None] = (1.0, 0.0)
) -> tuple[Tensor, Tensor | None]:
    """(how well each of a's FFN units (rows) pairs up with each of b's, whether with its negative): (f, f) float64 and
    bool, or None where signs are not free; b's reads and writes already in a's basis.

    The scores may be larger than the block: they are made in place, by runs of rows.
    """
    up = a["up"]
    score = torch.zeros(len(up), len(b["up"]), dtype=torch.float64, device=up.device)
    for run in row_runs(score):
        add_evidence(score[run], spec, _UNITS, a, b, run=run)
    score = weigh(score, activations, shares)
    negative = None
    if unit_scale_signs(spec) == "any":  # a unit and its negative are one choice
        negative = score < 0
        score.abs_()
    for run in row_runs(score):
        add_evidence(score[run], spec, _UNITS, a, b, moves=ORDERED, run=run, share=shares[0])
    return score, negative


def match_units(score: Tensor, negative: Tensor | None) -> Element:
    """The element of b's FFN units, from `unit_scores`; uses them up."""
    places = solve_assignments([score.neg_()], maximize=False)[0].to(score.device)  # negated here without a copy
    return units(places, None if negative is None else _signs(negative, places).to(score))


def match_experts(spec: Spec, a: Slots, b: Slots) -> dict[str, Element]:
    """The elements of experts and of their units, from weights alone; b already in a's basis.

    Two experts are compared by their router rows and by the best partner of each of SAMPLED_UNITS of a's units; units
    are assigned exactly within the experts so paired.
    """
    count, width = spec.ffn.experts.count, spec.ffn.experts.width
    alike = torch.zeros(count, count, dtype=torch.float64, device=a["router"].device)
    add_evidence(alike, spec, ("experts",), {"router": a["router"]}, b, moves=ORDERED)
    sample = torch.linspace(0, width - 1, min(width, SAMPLED_UNITS), device=alike.device).round().long()
    for i in range(count):
        few = _expert(a, i)
        few = {"up": few["up"][sample], "gate": few["gate"][sample], "down": few["down"][:, sample]}
        for j in range(count):
            score, _ = unit_scores(spec, few, _expert(b, j))
            alike[i, j] += score.max(1)[0].sum() * (width / len(sample))
    experts = solve_assignments([alike], maximize=True)[0].to(alike.device)
    scores = [unit_scores(spec, _expert(a, i), _expert(b, int(j))) for i, j in enumerate(experts)]
    places = torch.stack(solve_assignments([score for score, _ in scores], maximize=True)).to(alike.device)
    signs = [_signs(negative, p) for (_, negative), p in zip(scores, places, strict=True) if negative is not None]
    return {"experts": Wreath(experts), "expert_units": units(places, torch.stack(signs).to(alike) if signs else None)}


def match_head_units(spec: Spec, a: Slots, b: Slots, heads: tuple[Table, Table]) -> Element:
    """The element of the units between a head transform and the head; b's transform already in a's basis."""
    width = len(a["head_transform"])
    score = torch.zeros(width, width, dtype=torch.float64, device=a["head_transform"].device)
    add_evidence(score, spec, ("head_units",), a, b)
    for start, stop in heads[0].runs():
        rows = ({"head": head.rows(start, stop).double()} for head in heads)
        add_evidence(score, spec, ("head_units",), *rows)
    return Wreath(solve_assignments([score], maximize=True)[0].to(score.device))


def _expert(w: Slots, index: int) -> Slots:
    return {name: w[f"experts_{name}"][index] for name in ("up", "gate", "down")}


def _signs(negative: Tensor, places: Tensor) -> Tensor:
    return 1.0 - 2.0 * negative[torch.arange(len(places), device=places.device), places]
