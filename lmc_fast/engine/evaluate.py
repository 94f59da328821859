"""Losses between models (on the line of a pair), in one pass over the segments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import LmcError
from ..examples import Data
from ..members import member_names
from ..places import Place, shares_of
from ..symmetry.charts import Chart
from .block import block
from .head import CHUNK_ELEMENTS, HeadLoss
from .model import embed, head_input, label_counts, labels, model_inputs, target_rows
from .passes import Item, Pass, visit_order
from .source import Source

STREAM_ELEMENTS = 1 << 24  # of residual streams, held at a time by an evaluation: 64 MiB in float32


@dataclass(frozen=True)
class Score:
    """Of one item: mean loss in nats per prediction, share of predictions that are right, number of predictions.

    inputs (n, 2) float64: the sum of losses and the number of predictions of each input.
    """

    loss: float
    accuracy: float
    count: int
    inputs: Tensor = field(compare=False)


class _Evaluation(Pass):
    @torch.no_grad()
    def run(self, visited: Callable[[int], None] | None) -> list[Score]:
        source, spec = self.source, self.spec
        visited = visited or _ignore
        source.begin(visit_order(spec.layers, source.head_parts, learn=False))
        streams = [self._embedded(item) for item in self.items]
        for i in range(spec.layers):
            visited(i)
            with source.visit(i) as members:
                maps = self.maps(i)
                for shares, group in self.groups():
                    line = self.line(members, shares, maps)
                    for m in group:
                        streams[m] = block(spec, line, streams[m], self.positions(streams[m]), i)
        losses = []
        for m, item in enumerate(self.items):
            line = self.line(source.ends, item.shares, None)
            rows = target_rows(head_input(spec, line, streams[m], model_inputs(item.data)), item.data)
            streams[m] = rows
            student = self.head_inputs(rows, item.shares)
            losses.append(HeadLoss(student, labels(item.data), softcap=spec.head_softcap, elements=self.logits))
        start = 0
        for k in range(source.head_parts):
            visited(spec.layers + k)
            with source.visit(spec.layers + k) as members:
                for shares, group in self.groups():
                    with self.head_chunk(members, shares, start) as chunk:
                        for m in group:
                            losses[m].scan(chunk, [])
                start += len(members[0]["head"])
        return [_score(item, h) for item, h in zip(self.items, losses, strict=True)]

    def _embedded(self, item: Item) -> Tensor:
        """An item's stream in front of the first block; its rows of the embedding are dropped."""
        line, _, rows = self.ends(item)
        return embed(self.spec, line, model_inputs(item.data), rows)


def _score(item: Item, h: HeadLoss) -> Score:
    each, n = label_counts(item.data), item.count
    owner = torch.arange(len(each), device=each.device).repeat_interleave(each)
    sums = h.row_losses.new_zeros(len(each)).index_add_(0, owner, h.row_losses)
    return Score(h.loss.item() / n, h.right / n, n, torch.stack([sums, each.double()], 1).cpu())


def evaluate(
    source: Source,
    items: Sequence[Item],
    chart: Chart | None = None,
    route: str | None = None,
    logits: int = CHUNK_ELEMENTS,
    visited: Callable[[int], None] | None = None,
) -> list[Score]:
    """Scores of `items`, in order of lambda, in one pass over the segments. chart: applied to b; None: the plain line.

    logits: how many are held at a time. visited: told the number of each segment before it is visited.
    """
    return _Evaluation(source, items, chart, route, logits, learn=False, keep=False).run(visited)


def _ignore(_: int) -> None:
    pass


def line_scores(
    source: Source,
    data: Data,
    points: Sequence[Place],
    chart: Chart | None = None,
    batch: int = 32,
    *,
    rows: int | None = None,
    logits: int = CHUNK_ELEMENTS,
    visited: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """One score per place, ascending by the shares of all members but the first, on data taken `batch` rows at a time.

    All places share a pass over the segments, on `rows` rows of data; by default as many as make STREAM_ELEMENTS.
    visited: told how many segments are done, and how many there are in all passes.
    """
    spec = source.spec
    length = spec.length(model_inputs(data).shape)
    rows = max(batch, rows or STREAM_ELEMENTS // (len(points) * length * spec.width))
    points = sorted(points, key=lambda place: shares_of(place)[1:])
    seen: list[list[Score]] = [[] for _ in points]
    segments, together = spec.layers + source.head_parts, data.split(rows)
    for number, some in enumerate(together):
        parts = [part for part in some.split(batch) if len(labels(part))]
        items = [Item(part, t) for t in points for part in parts]
        told = visited and _counted(visited, number * segments, len(together) * segments)
        scores = evaluate(source, items, chart, logits=logits, visited=told)
        for k in range(len(points)):
            seen[k] += scores[k * len(parts) : (k + 1) * len(parts)]
    found = [_together(scores) for scores in seen]
    require_finite(points, [score.loss for score in found])
    return found


def require_finite(points: Sequence[Place], losses: Sequence[float]) -> None:
    """Raises LmcError, naming the place, for a loss that is NaN or infinite: no barrier can be told from it."""
    for point, loss in zip(points, losses, strict=True):
        if not math.isfinite(loss):
            raise LmcError(f"the loss at {_named(point)} is {loss}: numbers overflow; look for huge weights")


def _named(place: Place) -> str:
    if isinstance(place, tuple):
        names = member_names(len(place))
        if 1 in place:
            return f"model {names[place.index(1)]} itself"
        return "shares " + ", ".join(f"{name} {share:.2g}" for name, share in zip(names, place, strict=True) if share)
    return f"lambda {place:g}" + {0.0: " (endpoint A itself)", 1.0: " (endpoint B itself)"}.get(place, "")


def _counted(visited: Callable[[int, int], None], before: int, segments: int) -> Callable[[int], None]:
    return lambda segment: visited(before + segment, segments)


def _together(scores: list[Score]) -> Score:
    n = sum(s.count for s in scores)
    loss, accuracy = (sum(getattr(s, what) * s.count for s in scores) / n for what in ("loss", "accuracy"))
    return Score(loss, accuracy, n, torch.cat([s.inputs for s in scores]))
