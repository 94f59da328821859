"""Matching of FFN units, of experts and their units, and of a head transform's units: assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.lazy import Slots, Table, row_runs
from ..solvers import solve_assignments
from ..symmetry.groups import unit_scale_signs
from .stream import weigh

SAMPLED_UNITS = 256  # of each of A's experts, when experts are compared


def unit_scores(
    spec: Spec, a: Slots, b: Slots, activations: Table | None, shares: tuple[float, float]
) -> tuple[Tensor, Tensor | None]:
    """(how well each of a's FFN units (rows) pairs up with each of b's, whether with its negative): (f, f) float64 and
    bool, or None where signs are not free; b's reads and writes already in a's basis.

    The scores may be larger than the block: they are made in place, by runs of rows.
    """
    count = len(a["up"])
    score = torch.empty(count, count, dtype=torch.float64, device=a["up"].device)
    for run in row_runs(score):
        score[run] = a["down"][:, run].mT @ b["down"]
        score[run] += _rows(a, b, "up", run)
    score = weigh(score, activations, shares)
    negative = None
    if unit_scale_signs(spec) == "any":  # a unit and its negative are one choice
        negative = score < 0
        score.abs_()
    if "gate" in a:
        for run in row_runs(score):
            score[run].add_(_rows(a, b, "gate", run), alpha=shares[0])
    return score, negative


def match_units(score: Tensor, negative: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(permutation (f,), signs (f,) or None) of b's FFN units, from `unit_scores`; uses them up."""
    units = solve_assignments([score.neg_()], maximize=False)[0].to(score.device)  # negated here without a copy
    if negative is None:
        return units, None
    return units, _signs(negative, units).to(score)


def match_experts(spec: Spec, a: Slots, b: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """(experts (E,), their units (E, x), signs (E, x)), from weights alone; b already in a's basis.

    Two experts are compared by their router rows and by the best partner of each of SAMPLED_UNITS of a's units; units
    are assigned exactly within the experts so paired.
    """
    count, width = spec.ffn.experts.count, spec.ffn.experts.width
    sample = torch.linspace(0, width - 1, min(width, SAMPLED_UNITS), device=a["router"].device).round().long()
    alike = _rows(a, b, "router")
    for i in range(count):
        few = {"up": a["experts_up"][i][sample], "gate": a["experts_gate"][i][sample]}
        few["down"] = a["experts_down"][i][:, sample]
        for j in range(count):
            score, _ = _expert_score(few, _expert(b, j))
            alike[i, j] += score.max(1)[0].sum() * (width / len(sample))
    experts = solve_assignments([alike], maximize=True)[0].to(alike.device)
    scores = [_expert_score(_expert(a, i), _expert(b, int(j))) for i, j in enumerate(experts)]
    units = torch.stack(solve_assignments([score for score, _ in scores], maximize=True)).to(alike.device)
    signs = [_signs(negative, p) for (_, negative), p in zip(scores, units, strict=True)]
    return experts, units, torch.stack(signs).to(alike)


def match_head_units(a: Slots, b: Slots, heads: tuple[Table, Table]) -> Tensor:
    """Permutation (d,) of the units between a head transform and the head; b's transform already in a's basis."""
    score = _rows(a, b, "head_transform")
    for start, stop in heads[0].runs():
        score += heads[0].rows(start, stop).double().mT @ heads[1].rows(start, stop).double()
    return solve_assignments([score], maximize=True)[0].to(score.device)


def _expert(w: Slots, index: int) -> Slots:
    return {name: w[f"experts_{name}"][index] for name in ("up", "gate", "down")}


def _expert_score(a: Slots, b: Slots) -> tuple[Tensor, Tensor]:
    """(how well units pair up, whether with the negative) for every unit of a (rows) and of b (columns)."""
    score = a["down"].mT @ b["down"] + a["up"] @ b["up"].mT
    negative = score < 0
    return score.abs_().add_(a["gate"] @ b["gate"].mT), negative


def _rows(a: Slots, b: Slots, slot: str, run: slice = slice(None)) -> Tensor:
    """Products of a run of rows of a slot, by default of all, with all of the other's, in float64."""
    score, bias = (a[slot][run] @ b[slot].mT).double(), f"{slot}_bias"
    return score.addr_(a[bias][run].double(), b[bias].double()) if bias in a else score


def _signs(negative: Tensor, units: Tensor) -> Tensor:
    return 1.0 - 2.0 * negative[torch.arange(len(units), device=units.device), units]
