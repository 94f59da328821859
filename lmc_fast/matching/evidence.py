"""Evidence of how a space of A pairs up with the same space of B, gathered from every slot that has it.

For a map g of a space, Σ unfold(A) unfold(B)ᵀ over the axes that g moves, all other axes being moved already, is the
matrix C that asks for a large tr(gᵀ C). One loop over the table of axes serves the stream, heads and units alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import HEAD_UNITS, STREAM, Move, axes_of
from ..checkpoints.lazy import Slots, Table
from ..checkpoints.weights import Weights
from ..engine.block import norm
from ..symmetry.groups import resolves_embedding

MAPPED, ORDERED = (Move.CO, Move.CONTRA), (Move.ORDER,)
# biases of norms that were folded into readers, of which little is left, and what no forward pass reads
_LEFT_OUT = ("attn_norm_bias", "ffn_norm_bias", "final_norm_bias", "mask", "pooler")
WIDE = 512  # from this width on products are float32: float64 doubles their memory and time, and a sum of hundreds of
# products that is 1e-6 off changes no assignment that means anything. Sums of products are float64 always.


def work_dtype(spec: Spec) -> torch.dtype:
    """What evidence is multiplied in."""
    return torch.float32 if spec.width >= WIDE else torch.float64


def at_work(spec: Spec, w: Slots) -> Slots:
    return {name: t.to(work_dtype(spec)) for name, t in w.items()}


def add_evidence(
    total: Tensor,
    spec: Spec,
    spaces: tuple[str, ...],
    a: Slots,
    b: Slots,
    *,
    moves: tuple[Move, ...] = MAPPED,
    run: slice = slice(None),
    share: float = 1.0,
) -> None:
    """Adds to `total` (n, m) float64, or to a run of A's n rows of it, what slots of A and B say.

    spaces: the indices of the axis, such as ("heads", "queries", "qk"); moves: how it moves. share: a factor.
    """
    for slot, dim in _axes(spec, spaces, moves, a):
        x, y = (w[slot].reshape(-1, spec.width) if slot == "head" and dim else w[slot] for w in (a, b))
        total.add_(_cross(x, y, dim, run), alpha=share)


def _axes(spec: Spec, spaces: tuple[str, ...], moves: tuple[Move, ...], w: Slots) -> Iterator[tuple[str, int]]:
    for slot in w:
        for dim, axis in enumerate(axes_of(spec, slot)):
            here = tuple(index.space for index in axis if index.space)
            if here == spaces and axis[-1].move in moves and slot not in _LEFT_OUT:
                yield slot, dim


def _cross(x: Tensor, y: Tensor, dim: int, run: slice) -> Tensor:
    """Σ over all other indices of x and y of their products: (rows of the run, m)."""
    if x.dim() == 1:
        return torch.outer(x[run], y)
    if dim == 0:
        return x.flatten(1)[run] @ y.flatten(1).mT
    if dim == x.dim() - 1:
        return x.flatten(0, -2)[:, run].mT @ y.flatten(0, -2)
    return (x[:, run] @ y.mT).sum(0)


class StreamEvidence:
    """What the stream's element should fit: tr(Rᵀ mapped) and, where gains lie in the stream, tr(|R|ᵀ ordered)."""

    def __init__(self, spec: Spec, device: torch.device):
        self.mapped = torch.zeros(spec.width, spec.width, dtype=torch.float64, device=device)
        self.ordered = torch.zeros_like(self.mapped)

    def add(self, spec: Spec, a: Slots, b: Slots) -> None:
        """From slots of a and b, all of whose other spaces are in place."""
        add_evidence(self.mapped, spec, (STREAM,), a, b)
        add_evidence(self.ordered, spec, (STREAM,), a, b, moves=ORDERED)

    def copy(self) -> StreamEvidence:
        twin = StreamEvidence.__new__(StreamEvidence)
        twin.mapped, twin.ordered = self.mapped.clone(), self.ordered.clone()
        return twin


def ends_evidence(a: Weights, b: Weights) -> StreamEvidence:
    """From all outside the blocks but a head transform, whose units have to be known."""
    spec = a.spec
    head = a.table("head")
    assert head is not None
    found = StreamEvidence(spec, head.rows(0, 0).device)
    known = [name for name in a.small_ends if not _has(spec, name, HEAD_UNITS)]
    x, y = (at_work(spec, {name: w.ends[name] for name in known}) for w in (a, b))
    for name in ("embed", "head"):
        left, right = a.table(name), b.table(name)
        if left is not None and right is not None and not _has(spec, name, HEAD_UNITS):
            for start, stop in left.runs():
                rows = (_written(spec, w, name, t.rows(start, stop)) for w, t in ((x, left), (y, right)))
                found.add(spec, *({name: r} for r in rows))
    found.add(spec, x, y)
    return found


def _has(spec: Spec, slot: str, space: str) -> bool:
    return any(index.space == space for axis in axes_of(spec, slot) for index in axis)


def _written(spec: Spec, w: Slots, name: str, rows: Tensor) -> Tensor:
    """What rows of an input table add to the stream; rows of the head as they are."""
    rows = rows.to(work_dtype(spec))
    if name != "embed":
        return rows
    return norm(spec, w, "embed_norm", rows) if resolves_embedding(spec) else rows * spec.embed_scale


def weigh(from_weights: Tensor, from_activations: Tensor | Table | None, shares: tuple[float, float | None]) -> Tensor:
    """Weighted sum of two pieces of evidence (m, n), in the place of the first (float64); both may be large.

    Activations are first scaled to the weights' Frobenius norm; with a share of None they are taken as they are.
    Weights themselves are never normalised one matrix at a time: large matrices should count more (measured: 0.57
    against 0.71 nats).
    """
    if from_activations is None:
        return from_weights.mul_(shares[0])
    table = Table.of(from_activations) if isinstance(from_activations, Tensor) else from_activations
    scale = 1.0
    if shares[1] is not None:
        size = torch.stack([part.double().norm() for _, part in table.chunks()]).norm()
        scale = float(shares[1] * from_weights.norm() / size.clamp(min=1e-30))
    from_weights.mul_(shares[0])
    for start, part in table.chunks():
        from_weights[start : start + len(part)].add_(part.to(from_weights.device), alpha=scale)
    return from_weights
