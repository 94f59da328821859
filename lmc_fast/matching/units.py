"""Matching of FFN units, of experts and their units, and of a head transform's units: assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.weights import Slots
from ..solvers import solve_assignments
from ..symmetry.groups import unit_scale_signs
from .stream import weigh

SAMPLED_UNITS = 256  # of each of A's experts, when experts are compared


def match_units(
    spec: Spec, a: Slots, b: Slots, activations: Tensor | None, shares: tuple[float, float]
) -> tuple[Tensor, Tensor | None]:
    """(permutation (f,), signs (f,) or None) of b's FFN units; b's reads and writes already in a's basis, float64."""
    score = a["down"].mT @ b["down"] + _rows(a, b, "up")
    score = weigh(score, activations, shares)
    signs = _sign(score) if unit_scale_signs(spec) == "any" else None  # a unit and its negative are one choice
    score = score if signs is None else score.abs()
    score = score + shares[0] * _rows(a, b, "gate") if "gate" in a else score
    units = solve_assignments([score], maximize=True)[0].to(score.device)
    return units, None if signs is None else signs[torch.arange(len(units), device=units.device), units]


def match_experts(spec: Spec, a: Slots, b: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """(experts (E,), their units (E, x), signs (E, x)), from weights alone; b already in a's basis, float64.

    Two experts are compared by their router rows and by the best partner of each of SAMPLED_UNITS of a's units; units
    are assigned exactly within the experts so paired.
    """
    count, width = spec.experts, spec.expert_width
    sample = torch.linspace(0, width - 1, min(width, SAMPLED_UNITS), device=a["router"].device).round().long()
    alike = a["router"] @ b["router"].mT
    for i in range(count):
        few = {"up": a["experts_up"][i][sample], "gate": a["experts_gate"][i][sample]}
        few["down"] = a["experts_down"][i][:, sample]
        for j in range(count):
            score, _ = _expert_score(few, _expert(b, j))
            alike[i, j] += score.max(1)[0].sum() * (width / len(sample))
    experts = solve_assignments([alike], maximize=True)[0].to(alike.device)
    scores = [_expert_score(_expert(a, i), _expert(b, int(j))) for i, j in enumerate(experts)]
    units = torch.stack(solve_assignments([score for score, _ in scores], maximize=True)).to(alike.device)
    rows = torch.arange(width, device=alike.device)
    return experts, units, torch.stack([signs[rows, p] for (_, signs), p in zip(scores, units, strict=True)])


def match_head_units(a: Slots, b: Slots) -> Tensor:
    """Permutation (d,) of the units between a head transform and the head; b's transform already in a's basis."""
    score = _rows(a, b, "head_transform") + a["head"].mT @ b["head"]
    return solve_assignments([score], maximize=True)[0].to(score.device)


def _expert(w: Slots, index: int) -> Slots:
    return {name: w[f"experts_{name}"][index] for name in ("up", "gate", "down")}


def _expert_score(a: Slots, b: Slots) -> tuple[Tensor, Tensor]:
    """(how well units pair up, with which sign) for every unit of a (rows) and of b (columns)."""
    score = a["down"].mT @ b["down"] + a["up"] @ b["up"].mT
    return score.abs() + a["gate"] @ b["gate"].mT, _sign(score)


def _rows(a: Slots, b: Slots, slot: str) -> Tensor:
    score, bias = a[slot] @ b[slot].mT, f"{slot}_bias"
    return score + torch.outer(a[bias], b[bias]) if bias in a else score


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))
