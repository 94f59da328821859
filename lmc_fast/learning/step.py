"""A step of learning: the loss between the members (on the line of a pair) and its gradients, segment by segment.

Boundary activations are kept, blocks are recomputed in backward (or their graphs kept, see `learn`), gradients are
taken within one visit, so that no graph holds a weight that is not there any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..engine.block import block
from ..engine.features import FeatureLoss
from ..engine.head import CHUNK_ELEMENTS, HeadInputs, HeadLoss, VocabChunk
from ..engine.model import embed, head_rows, labels, model_inputs
from ..engine.passes import Item, Pass, pull_back, visit_order
from ..engine.slots import LineSlots, Slots
from ..engine.source import Source
from ..symmetry.charts import Chart
from .activation_checkpoints import ActivationCheckpoints
from .maps import MovingMaps


class Learning(Pass):
    def __init__(
        self,
        source: Source,
        items: Sequence[Item],
        chart: Chart,
        route: str | None,
        logits: int,
        *,
        divergence: bool,
        keep: bool,
        offload: bool,
    ):
        super().__init__(source, items, chart, route, logits, learn=True, keep=keep)
        self.divergence, self.keep = divergence, keep
        self.gradients = {name: torch.zeros_like(t) for name, t in chart.tensors.items()}
        self.teachers: list[list[Tensor]] = []  # streams of every member, per item
        self.boundaries = ActivationCheckpoints(offload)
        self.kept: dict[int, KeptBlock] = {}

    @torch.no_grad()
    def run(self) -> Tensor:
        source, spec = self.source, self.spec
        source.begin(visit_order(spec.layers, source.head_parts, learn=True))
        ends = [self.ends(item) for item in self.items]
        for item, (_, outside, rows) in zip(self.items, ends, strict=True):
            if self.divergence:
                self.teachers.append(
                    [
                        embed(spec, w, model_inputs(item.data[own]), rows if rows is None else rows[own])
                        for w, own in zip(outside, lessons(item), strict=True)
                    ]
                )
        streams = [
            embed(spec, line, model_inputs(item.data), rows)
            for item, (line, _, rows) in zip(self.items, ends, strict=True)
        ]
        for i in range(spec.layers):
            with source.visit(i) as members:
                self._teach(i, members)
                streams = self._forward(i, members, streams)
        loss, slopes = self._head(ends, streams)
        for i in reversed(range(spec.layers)):
            with source.visit(i) as members:
                slopes = self._backward(i, members, slopes)
        for item, slope, (line, _, rows) in zip(self.items, slopes, ends, strict=True):
            self._outside(
                line, lambda w, item=item, rows=rows: [embed(spec, w, model_inputs(item.data), rows)], [slope]
            )
            self.add_turn(line.contract(self.turns))
        if self.turns_made and self.chart is not None:
            leaf = self.chart.tensors["rotation"]
            self.gradients["rotation"] = torch.autograd.grad(self.turns_made, leaf, self.turn_gradients)[0]
        return loss

    def moving(self, i: int) -> MovingMaps:
        assert self.chart is not None
        return MovingMaps(self.chart, i, self.source.sample.dtype, self.gradients)

    def _teach(self, i: int, members: Sequence[Slots]) -> None:
        for streams in self.teachers:
            for k, w in enumerate(members):
                if len(streams[k]):
                    streams[k] = block(self.spec, w, streams[k], self.positions(streams[k]), i)

    def _forward(self, i: int, members: Sequence[Slots], streams: list[Tensor]) -> list[Tensor]:
        if self.keep:
            kept = self.kept[i] = KeptBlock(self, i)
            return [kept.forward(members, item.shares, x) for item, x in zip(self.items, streams, strict=True)]
        maps = self.maps(i)
        self.boundaries.next_block()
        for shares, group in self.groups():
            line = self.line(members, shares, maps, learn=False)
            for m in group:
                x = streams[m]
                streams[m] = block(self.spec, line, x, self.positions(x), i)
                self.boundaries.put(x)
        return streams

    def _head(self, ends: list[tuple[LineSlots, list[Slots], Tensor | None]], streams: list[Tensor]):
        """(mean loss, its gradients with respect to the streams behind the last block)."""
        spec = self.spec
        losses = []
        total = sum(item.count for item in self.items)
        for m, (item, (line, members, _)) in enumerate(zip(self.items, ends, strict=True)):
            rows = head_rows(spec, line, streams[m], item.data)
            teachers, starts = None, None
            if self.divergence:
                own = [item.data[some] for some in lessons(item)]
                taught = [
                    head_rows(spec, w, x, data) for w, x, data in zip(members, self.teachers[m], own, strict=True)
                ]
                shares = item.shares if item.taught is None else [1.0] * len(taught)
                teachers = [(s, HeadInputs([t], [1.0])) for s, t in zip(shares, taught, strict=True)]
                if item.taught is not None:
                    starts = [0, *accumulate(len(t) for t in taught)][:-1]
            target = None if self.divergence else labels(item.data)
            student = self.head_inputs(rows, item.shares)
            kind = FeatureLoss if spec.task == "features" else HeadLoss
            loss = partial(kind, softcap=spec.head_softcap, learn=True, elements=self.logits)
            losses.append(loss(student, target, teachers, starts=starts))
        self.teachers = []
        self._over_head(losses, total)
        slopes = []
        for m, (item, (line, _, _), h) in enumerate(zip(self.items, ends, losses, strict=True)):
            gradients = [g / total for g in h.gradients]

            def rows_of(w: LineSlots, x: Tensor, item: Item = item) -> list[Tensor]:
                rows = head_rows(spec, w, x, item.data)
                return self.head_inputs(rows, item.shares).inputs

            slopes.append(self._outside(line, rows_of, gradients, streams[m]))
        return torch.stack([h.loss for h in losses]).sum() / total, slopes

    def _over_head(self, losses: list[HeadLoss], total: int) -> None:
        """All losses through the head's runs: once, or, where there are several, forth and back."""
        parts = [(k, "scan") for k in range(self.source.head_parts)]
        parts += [(k, "add") for k in reversed(range(self.source.head_parts))]
        if self.source.head_parts == 1:
            parts = [(0, "whole")]
        starts = [0]
        for k, apply in parts:
            with self.source.visit(self.spec.layers + k) as members:
                start = starts[k]
                teachers = (
                    [VocabChunk([w["head"]], w.get("head_bias"), start) for w in members] if self.divergence else []
                )
                for shares, group in self.groups():
                    pull = 0 if apply == "scan" else 1 / total
                    with self.head_chunk(members, shares, start, pull) as chunk:
                        for m in group:
                            getattr(losses[m], apply)(chunk, teachers)
                starts.append(start + len(members[0]["head"]))

    def _outside(self, line: LineSlots, function, slopes: list[Tensor], x: Tensor | None = None) -> Tensor | None:
        """Backward through something outside the blocks. Returns the gradient of x, where there is one."""
        with torch.enable_grad():
            leaf = None if x is None else x.detach().requires_grad_()
            made = function(line) if leaf is None else function(line, leaf)
        found = pull_back(made, slopes, ([] if leaf is None else [leaf]) + self.turns + line.leaves)
        dx = None if leaf is None else found.pop(0)
        self.add_turn([found.pop(0) for _ in self.turns])
        line.collect(found)
        return dx

    def _backward(self, i: int, members: Sequence[Slots], slopes: list[Tensor | None]) -> list[Tensor | None]:
        if self.keep:
            return self.kept.pop(i).backward(slopes)
        moving = self.moving(i)
        out: list[Tensor | None] = list(slopes)
        for shares, group in self.groups():
            line = self.line(members, shares, moving.leaves)
            for m in group:
                with torch.enable_grad():
                    x = self.boundaries.take().detach().requires_grad_()
                    y = block(self.spec, line, x, self.positions(x), i)
                n = len(moving.tensors)
                inputs = [x, *self.turns, *moving.tensors, *line.leaves]
                out[m], *rest = pull_back([y], [slopes[m]], inputs)
                self.add_turn([rest.pop(0) for _ in self.turns])
                moving.add(rest[:n])
                line.collect(rest[n:])
            found = line.contract([*self.turns, *moving.tensors])
            self.add_turn([found.pop(0) for _ in self.turns])
            moving.add(found)
        moving.finish()
        return out


def lessons(item: Item) -> list[slice]:
    """Which inputs each member teaches."""
    if item.taught is None:
        return [slice(0, len(item.data))] * len(item.shares)
    edges = [0, *accumulate(item.taught)]
    return [slice(a, b) for a, b in pairwise(edges)]


class KeptBlock:
    """A block whose graphs are kept from forward to backward, where memory allows: nothing is computed twice."""

    def __init__(self, owner: Learning, i: int):
        self.owner, self.i, self.moving = owner, i, owner.moving(i)
        self.graphs: list[tuple[Tensor, Tensor]] = []

    def forward(self, members: Sequence[Slots], shares: Sequence[float], x: Tensor) -> Tensor:
        owner = self.owner
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            line = owner.line(members, shares, self.moving.leaves, once=True)
            y = block(owner.spec, line, x, owner.positions(x), self.i)
        self.graphs.append((x, y))
        return y.detach()

    def backward(self, slopes: list[Tensor | None]) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        turns = self.owner.turns
        for slope in slopes:
            x, y = self.graphs.pop(0)
            dx, *rest = pull_back([y], [slope], [x, *turns, *self.moving.tensors])
            out.append(dx)
            self.owner.add_turn([rest.pop(0) for _ in turns])
            self.moving.add(rest)
        self.moving.finish()
        return out


def learn(
    source: Source,
    items: Sequence[Item],
    chart: Chart,
    *,
    divergence: bool = True,
    keep: bool = False,
    route: str | None = None,
    logits: int = CHUNK_ELEMENTS,
    offload: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over all predictions of `items` (0-d, float64), and its gradients by the chart's tensors.

    divergence: from (1-λ) p_A + λ p_B (Σ share · p), the members' own predictions; else cross-entropy with the text.
    Of models that predict nothing: the squared distance from the members' features.
    keep: hold every block's graph until backward instead of computing it again; the source must then be `Resident`.
    route: one of kernels.routes.ROUTES; None: kernels.dispatch chooses. logits: how many are held at a time.
    offload: see ActivationCheckpoints.
    """
    job = Learning(source, items, chart, route, logits, divergence=divergence, keep=keep, offload=offload)
    return job.run(), job.gradients
