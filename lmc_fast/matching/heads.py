"""Matching of heads: an assignment of groups and of the queries in them, whose maps are best fits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.lazy import Slots, Table
from ..solvers import solve_assignments
from ..symmetry.elements import Dense, Element, Wreath
from ..symmetry.groups import heads_move
from .evidence import add_evidence, weigh
from .procrustes import nearest_query_key_map, nearest_value_map, query_key_score, value_score

# what activations say about an axis is kept under the name of what was looked at
_SEEN = {
    ("heads", "queries", "qk"): "q",
    ("heads", "qk"): "k",
    ("heads", "vo"): "v",
    ("heads", "queries", "vo"): "mixed",
}


def match_heads(
    spec: Spec, a: Slots, b: Slots, seen: Mapping[str, Table], shares: tuple[float, float | None]
) -> dict[str, Element]:
    """The elements of heads, queries, vo and qk whose Procrustes fits are best in sum; b already in a's basis."""
    g, r, e = spec.attention.kv_heads, spec.attention.queries_per_group, spec.attention.head_dim

    def evidence(*spaces: str) -> Tensor:
        """For every pair of heads: (count A, count B, e, e)."""
        count = g * r if "queries" in spaces else g
        c = torch.zeros(count * e, count * e, dtype=torch.float64, device=a["q"].device)
        add_evidence(c, spec, spaces, a, b)
        return weigh(c, seen.get(_SEEN[spaces]), shares).view(count, e, count, e).transpose(1, 2)

    out, q = evidence("heads", "queries", "vo"), evidence("heads", "queries", "qk")
    k, v = evidence("heads", "qk"), evidence("heads", "vo")
    places = torch.arange(g, device=q.device)
    found: dict[str, Element] = {}
    if not heads_move(spec):
        pick = places, places
        stay = torch.arange(r, device=q.device).expand(g, g, r)
        value, query = v + _along(out, stay, g, r), k + _along(q, stay, g, r)
    else:
        inner = _queries(spec, out, q, g, r)
        value, query = v + _along(out, inner, g, r), k + _along(q, inner, g, r)
        score = value_score(spec, value) + query_key_score(spec, query)
        pick = places, solve_assignments([score], maximize=True)[0].to(q.device)
        found["heads"] = Wreath(pick[1])
        if r > 1:
            found["queries"] = Wreath(inner[pick])
    found["vo"] = Dense.orthogonal(nearest_value_map(spec, value[pick]))
    found["qk"] = Dense.orthogonal(nearest_query_key_map(spec, query[pick]))
    return found


def _queries(spec: Spec, out: Tensor, q: Tensor, g: int, r: int) -> Tensor:
    """Within each pair of groups, queries are assigned first, by their own evidence: (g, g, r)."""
    if r == 1:
        return torch.zeros(g, g, 1, dtype=torch.int64, device=q.device)
    pair_score = value_score(spec, out) + query_key_score(spec, q)
    pair_score = pair_score.view(g, r, g, r).transpose(1, 2).flatten(0, 1)
    return torch.stack(solve_assignments(list(pair_score), maximize=True)).to(q.device).view(g, g, r)


def _along(c: Tensor, inner: Tensor, g: int, r: int) -> Tensor:
    """Sums (g r, g r, e, e) evidence over matched queries of each pair of groups: (g, g, e, e)."""
    if r == 1:
        return c
    c = c.view(g, r, g, r, *c.shape[2:])
    i, j, x = torch.meshgrid(*(torch.arange(n, device=c.device) for n in (g, g, r)), indexing="ij")
    return c[i, x, j, inner].sum(2)
