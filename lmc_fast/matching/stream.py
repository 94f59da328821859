"""Matching of the residual stream: evidence for R from all that writes to the stream or reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import BLOCK_READERS, BLOCK_WRITERS, END_WRITERS, POST_NORMS, Spec
from ..checkpoints.lazy import Slots, Table
from ..checkpoints.weights import Weights
from ..engine.block import norm
from ..symmetry.groups import resolves_embedding
from .procrustes import residual_rotation

_ROWS = ("positions", "types", "cls", "distill")
WIDE = 1024  # from this width on products are float32: float64 doubles their memory and time, and a sum of a thousand
# products that is 1e-6 off changes no assignment that means anything. Sums of products are float64 always.


def work_dtype(spec: Spec) -> torch.dtype:
    """What evidence is multiplied in."""
    return torch.float32 if spec.width >= WIDE else torch.float64


def at_work(spec: Spec, w: Slots) -> Slots:
    return {name: t.to(work_dtype(spec)) for name, t in w.items()}


@dataclass
class StreamEvidence:
    """What R should fit: tr(Rᵀ total) and, where gains lie in the stream, tr(|R|ᵀ gains) are to be large; float64."""

    total: Tensor  # (d, d)
    gains: Tensor  # (d, d)

    @staticmethod
    def none(spec: Spec, device: torch.device) -> StreamEvidence:
        zero = torch.zeros(spec.width, spec.width, dtype=torch.float64, device=device)
        return StreamEvidence(zero, zero.clone())

    def add(self, other: StreamEvidence) -> None:
        self.total += other.total
        self.gains += other.gains

    def best(self, spec: Spec, activations: Tensor | None, shares: tuple[float, float]) -> Tensor:
        """The legal R (d, d) float64. activations (d, d): evidence beside the weights; shares: how much either counts.

        Uses the evidence up.
        """
        return residual_rotation(spec, weigh(self.total, activations, shares), self.gains * shares[0])


def block_evidence(spec: Spec, x: Slots, y: Slots) -> StreamEvidence:
    """From a block of a and the same of b, its heads and units in place."""
    found = StreamEvidence.none(spec, x["o"].device)
    for name in BLOCK_READERS:
        if name in x:
            found.total += x[name].flatten(0, -2).mT @ y[name].flatten(0, -2)
    for name in BLOCK_WRITERS:
        if name in x:
            found.total += (x[name] @ y[name].mT).reshape(-1, spec.width, spec.width).sum(0)
        if f"{name}_bias" in x:
            found.total += torch.outer(x[f"{name}_bias"], y[f"{name}_bias"])
    _add_norms(found, x, y, POST_NORMS)
    return found


def ends_evidence(a: Weights, b: Weights) -> StreamEvidence:
    """From all outside the blocks but a head transform, whose units have to be known."""
    spec = a.spec
    x, y = at_work(spec, a.small_ends), at_work(spec, b.small_ends)
    head = a.table("head")
    assert head is not None
    found = StreamEvidence.none(spec, head.rows(0, 0).device)
    for name in ("embed",) if spec.head_transform else ("embed", "head"):
        left, right = a.table(name), b.table(name)
        if left is not None and right is not None:
            for start, stop in left.runs():
                rows = (
                    _written(spec, x, name, left.rows(start, stop)),
                    _written(spec, y, name, right.rows(start, stop)),
                )
                p, q = (r.reshape(-1, spec.width) for r in rows)
                found.total += p.mT @ q
    for name in _ROWS:
        if name in x:
            found.total += x[name].mT @ y[name]
    for name in END_WRITERS:
        if name in x:
            found.total += x[name] @ y[name].mT
        if f"{name}_bias" in x:
            found.total += torch.outer(x[f"{name}_bias"], y[f"{name}_bias"])
    _add_norms(found, x, y, ("embed_norm",))
    return found


def transform_evidence(a: Weights, b: Weights, head_units: Tensor) -> Tensor:
    """From a head transform, its units in place: (d, d) float64."""
    return a.ends["head_transform"].double().mT @ b.ends["head_transform"].double()[head_units]


def weigh(from_weights: Tensor, from_activations: Tensor | Table | None, shares: tuple[float, float]) -> Tensor:
    """Weighted sum of two pieces of evidence (m, n), in the place of the first (float64); both may be large.

    Activations are first scaled to the weights' Frobenius norm. Weights themselves are never normalised one matrix at a
    time: large matrices should count more (measured: 0.57 against 0.71 nats).
    """
    if from_activations is None:
        return from_weights.mul_(shares[0])
    table = Table.of(from_activations) if isinstance(from_activations, Tensor) else from_activations
    size = torch.stack([part.double().norm() for _, part in table.chunks()]).norm()
    scale = float(shares[1] * from_weights.norm() / size.clamp(min=1e-30))
    from_weights.mul_(shares[0])
    for start, part in table.chunks():
        from_weights[start : start + len(part)].add_(part.to(from_weights.device), alpha=scale)
    return from_weights


def _written(spec: Spec, w: Slots, name: str, rows: Tensor) -> Tensor:
    """What rows of an input table add to the stream; rows of the head as they are."""
    rows = rows.to(work_dtype(spec))
    if name != "embed":
        return rows
    return norm(spec, w, "embed_norm", rows) if resolves_embedding(spec) else rows * spec.embed_scale


def _add_norms(found: StreamEvidence, x: Slots, y: Slots, names: tuple[str, ...]) -> None:
    """Norms in the stream's own path."""
    for name in names:
        if name in x:
            found.gains += torch.outer(x[name], y[name])
        if f"{name}_bias" in x:
            found.total += torch.outer(x[f"{name}_bias"], y[f"{name}_bias"])
