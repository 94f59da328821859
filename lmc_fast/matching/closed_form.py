"""Matching without gradients: alternate Procrustes for rotation and head maps with assignment of heads and FFN units.

One algorithm serves weight matching (evidence: the weights), activation matching (evidence: cross-covariances of what
both endpoints compute on the same tokens) and their sum. Every kind of evidence for a map M between a part of A and a
part of B is a matrix C that asks for a large tr(Mᵀ C).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.lazy import Slots, Table
from ..checkpoints.weights import Weights
from ..solvers import solve_assignments
from ..symmetry.groups import heads_move, rotates
from ..symmetry.transform import BlockTransform, Transform, apply_block, apply_ends
from .activations import Statistics
from .procrustes import nearest_query_key_map, nearest_value_map, query_key_score, value_score
from .stream import StreamEvidence, at_work, block_evidence, ends_evidence, transform_evidence, weigh, work_dtype
from .units import match_experts, match_head_units, match_units, unit_scores

MAX_ROUNDS = 50
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
    a: Weights, b: Weights, evidence: Evidence, statistics: Statistics | None = None, rounds: int = MAX_ROUNDS
) -> Transform:
    """The transform (float64) of canonical, balanced `b` that brings it closest to `a`.

    Rounds go on until no assignment changes, at most `rounds`; each loads every block once, one at a time.
    `statistics` are needed if the activations count.
    """
    spec, shares = a.spec, evidence.shares
    stream = statistics.stream if statistics else None
    ends = ends_evidence(a, b)
    start = StreamEvidence(ends.total.clone(), ends.gains)
    found = Transform(start.best(spec, stream, shares), [BlockTransform() for _ in range(spec.layers)])
    for done in range(1, rounds + 1):
        before = _assignments(spec, found)
        total = StreamEvidence(ends.total.clone(), ends.gains.clone())
        for i in range(spec.layers):
            x, y = a.blocks[i], b.blocks[i]
            seen = statistics.blocks[i] if statistics else {}
            found.blocks[i], part = _match_block(spec, x, y, found.rotation, evidence, seen)
            total.add(part)
            del x, y
        if spec.head_transform:
            found.head_units = _match_head(a, b, found.rotation)
            total.total += transform_evidence(a, b, found.head_units)
        found.rotation = total.best(spec, stream, shares)
        pairs = list(zip(before, _assignments(spec, found), strict=True))
        changed = sum(not _same(p, q) for p, q in pairs)
        _log.info("matching, round %d: %d of %d assignments changed", done, changed, len(pairs))
        if not changed:
            break
    return found


def _match_block(
    spec: Spec, a: Slots, b: Slots, rotation: Tensor | None, evidence: Evidence, seen: Mapping[str, Table]
) -> tuple[BlockTransform, StreamEvidence]:
    """(the transform of b's block, what the block so transformed says about the next rotation).

    seen: statistics of its activations, if there are any.
    """
    dtype = work_dtype(spec)
    a, b = at_work(spec, a), at_work(spec, b)
    turned = apply_block(spec, None if rotation is None else rotation.to(dtype), BlockTransform(), b)
    heads, queries, vo, qk = _match_heads(spec, a, turned, evidence, seen)
    for name in ("q", "k", "v", "o"):
        del turned[name]
    found = BlockTransform(heads, queries, vo, vo.mT, qk, qk.mT)  # both orthogonal
    if spec.ffn.experts.count:
        found.experts, found.expert_units, found.expert_scale = match_experts(spec, a, turned)
    if spec.ffn.width:
        score, negative = unit_scores(spec, a, turned, seen.get("hidden"), evidence.shares)
        turned.clear()  # the assignment of many units takes much memory of its own
        found.units, found.unit_scale = match_units(score, negative)
        del score, negative
    moved = apply_block(spec, None, Transform(None, [found]).map(lambda t: t.to(dtype)).blocks[0], b)
    return found, block_evidence(spec, a, moved)


def _match_head(a: Weights, b: Weights, rotation: Tensor | None) -> Tensor:
    double = lambda w: {name: t.double() for name, t in w.small_ends.items()}  # noqa: E731
    heads = a.table("head"), b.table("head")
    assert heads[0] is not None and heads[1] is not None
    return match_head_units(double(a), apply_ends(a.spec, rotation, double(b)), (heads[0], heads[1]))


def _match_heads(
    spec: Spec, a: Slots, b: Slots, evidence: Evidence, seen: Mapping[str, Table]
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """(groups, queries within them, V/O maps, Q/K maps): the assignment whose Procrustes fits are best in sum."""
    g, r, e = spec.attention.kv_heads, spec.attention.queries_per_group, spec.attention.head_dim

    def rows(slot: str, count: int) -> Tensor:
        """Evidence for every pair of heads from a reader: (count A, count B, e, e)."""
        c = (a[slot] @ b[slot].mT).double()
        if f"{slot}_bias" in a:
            c = c + torch.outer(a[f"{slot}_bias"], b[f"{slot}_bias"])
        c = weigh(c, seen.get(slot), evidence.shares)
        return c.view(count, e, count, e).transpose(1, 2)

    out = (a["o"].mT @ b["o"]).double()
    out = weigh(out, seen.get("mixed"), evidence.shares).view(g * r, e, g * r, e).transpose(1, 2)
    q, k, v = rows("q", g * r), rows("k", g), rows("v", g)

    if not heads_move(spec):
        return None, None, *_maps_in_place(spec, v, k, out, q)
    if r == 1:
        inner = None
        value, query = v + out, k + q
    else:  # within each pair of groups, queries are assigned first, by their own evidence
        pair_score = value_score(spec, out) + query_key_score(spec, q)
        pair_score = pair_score.view(g, r, g, r).transpose(1, 2).flatten(0, 1)
        inner = torch.stack(solve_assignments(list(pair_score), maximize=True)).to(q.device).view(g, g, r)
        value, query = v + _along(out, inner, g, r), k + _along(q, inner, g, r)

    score = value_score(spec, value) + query_key_score(spec, query)
    heads = solve_assignments([score], maximize=True)[0].to(q.device)
    pick = torch.arange(g, device=q.device), heads
    queries = None if inner is None else inner[pick]
    return heads, queries, nearest_value_map(spec, value[pick]), nearest_query_key_map(spec, query[pick])


def _maps_in_place(spec: Spec, v: Tensor, k: Tensor, out: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(V/O maps, Q/K maps) where every head keeps its place."""
    g, r = spec.attention.kv_heads, spec.attention.queries_per_group
    groups, heads = torch.arange(g, device=q.device), torch.arange(g * r, device=q.device)
    by_group = lambda c: c[heads, heads].unflatten(0, (g, r)).sum(1)  # noqa: E731
    value, query = v[groups, groups] + by_group(out), k[groups, groups] + by_group(q)
    return nearest_value_map(spec, value), nearest_query_key_map(spec, query)


def _along(c: Tensor, inner: Tensor, g: int, r: int) -> Tensor:
    """Sums (g r, g r, e, e) evidence over matched queries of each pair of groups: (g, g, e, e)."""
    c = c.view(g, r, g, r, *c.shape[2:])
    i, j, x = torch.meshgrid(*(torch.arange(n, device=c.device) for n in (g, g, r)), indexing="ij")
    return c[i, x, j, inner].sum(2)


def _assignments(spec: Spec, t: Transform) -> list[Tensor | None]:
    """All of a transform that is discrete."""
    names = ("heads", "queries", "units", "experts", "expert_units")
    parts = [getattr(block, name) for block in t.blocks for name in names]
    return [*parts, t.head_units, None if rotates(spec) else t.rotation]


def _same(p: Tensor | None, q: Tensor | None) -> bool:
    return (p is None and q is None) or (p is not None and q is not None and torch.equal(p, q))
