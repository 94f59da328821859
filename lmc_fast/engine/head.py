"""The loss behind an interpolated head, by chunks of the vocabulary and of tokens, so that full logits never exist.

One chunk needs one pass (`whole`). Several need two: `scan` each for the normalisers (which is all that a
cross-entropy without gradients needs), then `add` each for the divergence and the gradients.

Where kernels.enabled has "softmax_loss" on, logits stay in the models' dtype, and one launch puts the slope
in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels.enabled import engaged

CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in float32


def capped(logits: Tensor, softcap: float) -> Tensor:
    """c tanh(logits / c), or the logits where c is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@dataclass
class HeadInputs:
    """Logits Σ share · x Wᵀ + bias; x (n, d) each. A model has one term, the line two: x, and x R for B's head."""

    inputs: list[Tensor]
    shares: list[float]
    normaliser: Tensor = field(init=False)  # (n,) log Σ exp over the vocabulary seen so far

    def __post_init__(self) -> None:
        n = len(self.inputs[0])
        self.normaliser = self.inputs[0].new_full((n,), -torch.inf, dtype=accurate(self.inputs[0].dtype))

    def products(self, weights: list[Tensor], bias: Tensor | None, rows: slice) -> Tensor:
        """The logits of some rows, uncapped, in the dtype of the inputs."""
        total = None
        for x, share, w in zip(self.inputs, self.shares, weights, strict=True):
            if total is not None:
                total.addmm_(x[rows], w.mT, alpha=share)
            elif bias is not None:
                total = torch.addmm(bias, x[rows], w.mT, alpha=share)
            else:
                total = torch.addmm(x.new_zeros(1), x[rows], w.mT, beta=0, alpha=share)
        assert total is not None
        return total

    def logits(self, weights: list[Tensor], bias: Tensor | None, rows: slice, softcap: float) -> Tensor:
        return capped(self.products(weights, bias, rows).to(self.normaliser.dtype), softcap)

    def see(self, log_sums: Tensor, rows: slice) -> None:
        """Takes a chunk's log Σ exp into the normaliser."""
        self.normaliser[rows] = torch.logaddexp(self.normaliser[rows], log_sums)


def softmax_(logits: Tensor, scaled: bool = True) -> Tensor:
    """log Σ exp of each row (n,). The rows become their softmax, or, not `scaled`, multiples of it."""
    top = logits.amax(1, keepdim=True)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    if scaled:
        logits.div_(total)
    return (top + total.log_())[:, 0]


def accurate(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class VocabChunk:
    """A run of the vocabulary: the rows of the heads, one weight for each term of HeadInputs, and its place."""

    weights: list[Tensor]
    bias: Tensor | None
    start: int = 0
    gradient: Tensor | None = None  # (rows, d), of the only weight: added to where it is wanted


class HeadLoss:
    """Sum over rows of a loss, and its gradients with respect to the student's inputs.

    target (n,) int64: cross-entropy with it. teachers: divergence KL(Σ share · softmax(teacher) ‖ softmax(student)).
    Exactly one of both. starts: the first of the student's rows that each teacher has rows for, by default 0 for all;
    shares of those that have a row add up to 1. gradients: one tensor like each of the student's inputs, if `learn`.
    """

    def __init__(
        self,
        student: HeadInputs,
        target: Tensor | None = None,
        teachers: list[tuple[float, HeadInputs]] | None = None,
        *,
        starts: Sequence[int] | None = None,
        softcap: float = 0.0,
        learn: bool = False,
        elements: int = CHUNK_ELEMENTS,
    ):
        self.student, self.target, self.teachers = student, target, teachers or []
        sizes = [len(teacher.inputs[0]) for _, teacher in self.teachers]
        self._spans = [(at, at + n) for at, n in zip(starts or [0] * len(sizes), sizes, strict=True)]
        self.softcap, self.elements = softcap, elements
        like = student.normaliser
        self._loss = like.new_zeros((), dtype=torch.float64)
        self._apart = target is not None  # the normaliser is not in _loss
        self.gradients = [torch.zeros_like(x) for x in student.inputs] if learn else []
        self.picked = torch.zeros_like(like)  # the targets' logits, where nothing is learned
        self.best = like.new_full(like.shape, -torch.inf)  # the largest logit so far, and where
        self.guess = torch.zeros(len(like), dtype=torch.int64, device=like.device)

    def _row_slices(self, chunk: VocabChunk) -> list[slice]:
        """Of as many logits as are held at a time, and the same teachers each."""
        n, step = len(self.student.inputs[0]), max(1, self.elements // len(chunk.weights[0]))
        edges = sorted({0, n, *(edge for span in self._spans for edge in span)})
        return [slice(i, min(b, i + step)) for a, b in pairwise(edges) for i in range(a, b, step)]

    def _taught(self, rows: slice) -> list[tuple[int, float, HeadInputs, slice]]:
        """(its number, share, teacher, its rows) of every teacher that has some rows of `_row_slices`."""
        found = []
        for i, ((share, teacher), (start, stop)) in enumerate(zip(self.teachers, self._spans, strict=True)):
            if start <= rows.start and rows.stop <= stop:
                found.append((i, share, teacher, slice(rows.start - start, rows.stop - start)))
        return found

    def whole(self, chunk: VocabChunk, teachers: list[VocabChunk]) -> None:
        """The only chunk."""
        fused = self._fused(chunk)
        if self.target is not None and not self.gradients:
            return self.scan(chunk, teachers)
        self._apart &= not fused
        add = self._add_by_kernel if fused else self._add
        for rows in self._row_slices(chunk):
            add(chunk, teachers, rows, None)
        return None

    def scan(self, chunk: VocabChunk, teachers: list[VocabChunk]) -> None:
        """First of two passes over a chunk."""
        scan = self._scan_by_kernel if self._fused(chunk) else self._scan
        for rows in self._row_slices(chunk):
            scan(chunk, teachers, rows)

    def add(self, chunk: VocabChunk, teachers: list[VocabChunk]) -> None:
        """Second of two passes over a chunk."""
        if self.target is not None and not self.gradients:
            return
        add = self._add_by_kernel if self._fused(chunk) else self._add
        for rows in self._row_slices(chunk):
            taught = [teacher.normaliser[own] for _, _, teacher, own in self._taught(rows)]
            add(chunk, teachers, rows, torch.stack([self.student.normaliser[rows], *taught]))

    def _fused(self, chunk: VocabChunk) -> bool:
        """Whether the operations of kernels.softmax_loss take this chunk."""
        most = max((len(self._taught(rows)) for rows in self._row_slices(chunk)), default=0)
        return most <= 2 and engaged("softmax_loss", self.student.inputs[0], chunk.weights[0])

    def _add_by_kernel(self, chunk: VocabChunk, teachers: list[VocabChunk], rows: slice, seen: Tensor | None) -> None:
        """Loss and gradients of some rows. seen: the normalisers of student and teachers, where chunks add up."""
        from ..kernels.softmax_loss import cross_entropy_, divergence_

        logits = self.student.products(chunk.weights, chunk.bias, rows)
        if self.target is not None:
            known = None if seen is None else seen[0]
            loss = cross_entropy_(logits, self.target[rows], 1.0, chunk.start, known, self.softcap)
        else:
            taught = [
                (t.products(teachers[i].weights, teachers[i].bias, own), share)
                for i, share, t, own in self._taught(rows)
            ]
            loss = divergence_(logits, taught, 1.0, seen, self.softcap)
        self._loss += loss.sum(dtype=torch.float64)
        self._pull(chunk, rows, logits)

    def _scan_by_kernel(self, chunk: VocabChunk, teachers: list[VocabChunk], rows: slice) -> None:
        from ..kernels.softmax_loss import row_statistics

        logits = self.student.products(chunk.weights, chunk.bias, rows)
        target = None if self.target is None else self.target[rows]
        log_sums, picked = row_statistics(logits, target, chunk.start, self.softcap)
        self.student.see(log_sums, rows)
        if target is not None:
            self._loss -= picked.sum(dtype=torch.float64)
            self.picked[rows] += picked
        if target is not None and not self.gradients:
            self._guess(logits, chunk, rows)  # a cap keeps the order
        for i, _, teacher, own in self._taught(rows):
            taught = teacher.products(teachers[i].weights, teachers[i].bias, own)
            teacher.see(row_statistics(taught, softcap=self.softcap)[0], own)

    def _scan(self, chunk: VocabChunk, teachers: list[VocabChunk], rows: slice) -> None:
        logits = self.student.logits(chunk.weights, chunk.bias, rows, self.softcap)
        if self.target is not None:
            self._pick(logits, chunk, rows)
            if not self.gradients:
                self._guess(logits, chunk, rows)
        self.student.see(softmax_(logits, scaled=False), rows)
        for i, _, teacher, own in self._taught(rows):
            taught = teacher.logits(teachers[i].weights, teachers[i].bias, own, self.softcap)
            teacher.see(softmax_(taught, scaled=False), own)

    def _pick(self, logits: Tensor, chunk: VocabChunk, rows: slice) -> None:
        """Takes the targets' logits off the loss."""
        assert self.target is not None
        index, here = self._targets(self.target[rows], chunk)
        picked = logits.gather(1, index) * here
        self._loss -= picked.sum()
        self.picked[rows] += picked[:, 0]

    def _guess(self, logits: Tensor, chunk: VocabChunk, rows: slice) -> None:
        value, place = logits.max(1)
        better = value > self.best[rows]
        self.best[rows] = torch.where(better, value, self.best[rows])
        self.guess[rows] = torch.where(better, place + chunk.start, self.guess[rows])

    @staticmethod
    def _targets(target: Tensor, chunk: VocabChunk) -> tuple[Tensor, Tensor]:
        """(places within a chunk, whether they lie in it), each (rows, 1)."""
        place, size = (target - chunk.start)[:, None], len(chunk.weights[0])
        return place.clamp(0, size - 1), (place >= 0) & (place < size)

    def _add(self, chunk: VocabChunk, teachers: list[VocabChunk], rows: slice, seen: Tensor | None) -> None:
        """As `_add_by_kernel`, but with a normaliser that is apart; every tensor of the logits' size is used again."""
        logits = self.student.logits(chunk.weights, chunk.bias, rows, self.softcap)
        bent = 1 - (logits / self.softcap).square() if self.softcap else None
        if self.target is not None:
            index, here = self._targets(self.target[rows], chunk)
            if seen is None:
                self._pick(logits, chunk, rows)
                self.student.see(softmax_(logits), rows)
            else:
                logits.sub_(seen[0, :, None]).exp_()
            slope = logits.scatter_add_(1, index, -here.to(logits.dtype))
        else:
            slope = self._towards(self._aim(teachers, rows, seen), logits, None if seen is None else seen[0, :, None])
        self._pull(chunk, rows, (slope if bent is None else slope.mul_(bent)).to(chunk.weights[0].dtype))

    def _aim(self, chunks: list[VocabChunk], rows: slice, seen: Tensor | None) -> Tensor:
        """Σ share · softmax(teacher) of some rows."""
        aim = None
        for number, (i, share, teacher, own) in enumerate(self._taught(rows)):
            taught = teacher.logits(chunks[i].weights, chunks[i].bias, own, self.softcap)
            if seen is None:
                softmax_(taught)
            else:
                taught.sub_(seen[1 + number, :, None]).exp_()
            aim = taught.mul_(share) if aim is None else aim.add_(taught, alpha=share)
        assert aim is not None
        return aim

    def _towards(self, aim: Tensor, logits: Tensor, log_sums: Tensor | None) -> Tensor:
        """Adds the divergence from `aim` to the loss; its slope, in the logits' place."""
        spare = torch.empty_like(logits)
        if log_sums is None:
            spare.copy_(logits)
            log_sums = softmax_(spare, scaled=False)[:, None]
        log_p = logits.sub_(log_sums)
        gaps = torch.xlogy(aim, aim, out=spare).addcmul_(aim, log_p, value=-1)
        self._loss += gaps.sum(1).sum(dtype=torch.float64)
        return log_p.exp_().sub_(aim)

    def _pull(self, chunk: VocabChunk, rows: slice, slope: Tensor) -> None:
        """Adds what the slope of some rows' logits means for the inputs, and for the weight where that is wanted."""
        if chunk.gradient is not None:
            chunk.gradient.addmm_(slope.mT, self.student.inputs[0][rows])
        for gradient, share, w in zip(self.gradients, self.student.shares, chunk.weights, strict=True):
            gradient[rows].addmm_(slope, w, alpha=share)

    @property
    def loss(self) -> Tensor:
        """The sum over rows, float64; complete once every chunk was scanned (and, with teachers, added)."""
        return self._loss + self.student.normaliser.double().sum() if self._apart else self._loss

    @property
    def row_losses(self) -> Tensor:
        """(n,) float64: of each prediction; where there is a target and nothing is learned."""
        return self.student.normaliser.double() - self.picked

    @property
    def right(self) -> int:
        """How many guesses hit the target (only where there is one and nothing is learned)."""
        assert self.target is not None
        return int((self.guess == self.target).sum())
