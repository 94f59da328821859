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
from ..places import Place, corner, shares_of
from ..symmetry.charts import Chart
from .block import block
from .features import distances
from .head import CHUNK_ELEMENTS, HeadLoss
from .model import embed, head_rows, label_counts, labels, model_inputs
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
    def _last_rows(self, visited: Callable[[int], None]) -> list[Tensor]:
        """What the head reads, of every item."""
        source, spec = self.source, self.spec
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
        for m, item in enumerate(self.items):
            streams[m] = head_rows(spec, self.line(source.ends, item.shares, None), streams[m], item.data)
        return streams

    @torch.no_grad()
    def run(self, visited: Callable[[int], None]) -> list[Score]:
        source, spec, losses = self.source, self.spec, []
        for item, rows in zip(self.items, self._last_rows(visited), strict=True):
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

    @torch.no_grad()
    def features(self, visited: Callable[[int], None]) -> list[Tensor]:
        """Of every item, all of them (n, k)."""
        source, rows = self.source, self._last_rows(visited)
        students = [self.head_inputs(x, item.shares) for x, item in zip(rows, self.items, strict=True)]
        found: list[list[Tensor]] = [[] for _ in rows]
        for k in range(source.head_parts):
            visited(self.spec.layers + k)
            with source.visit(self.spec.layers + k) as members:
                for shares, group in self.groups():
                    with self.head_chunk(members, shares, 0) as chunk:
                        for m in group:
                            found[m].append(students[m].products(chunk.weights, chunk.bias, slice(None)))
        return [torch.cat(parts, dim=1) for parts in found]

    def _embedded(self, item: Item) -> Tensor:
        """An item's stream in front of the first block; its rows of the embedding are dropped."""
        line, _, rows = self.ends(item)
        return embed(self.spec, line, model_inputs(item.data), rows)


def _feature_scores(
    source: Source, items: Sequence[Item], route: tuple[Chart | None, str | None], visited: Callable[[int], None]
) -> list[Score]:
    """Distances from the mixture of the members' own features, which are computed in the same pass."""
    count, parts = len(source.ends), list({id(item.data): item.data for item in items}.values())
    corners = [Item(part, corner(k, count)) for part in parts for k in range(count)]
    job = _Evaluation(source, [*items, *corners], *route, CHUNK_ELEMENTS, learn=False, keep=False)
    found = {(id(item.data), item.shares): y for item, y in zip(job.items, job.features(visited), strict=True)}
    scores = []
    for item in sorted(items, key=lambda item: item.shares[1:]):
        members = [found[id(item.data), shares_of(corner(k, count))] for k in range(count)]
        each = distances(found[id(item.data), item.shares], members, item.shares)
        asks = label_counts(item.data)
        owner = torch.arange(len(asks), device=asks.device).repeat_interleave(asks)
        sums = each.new_zeros(len(asks)).index_add_(0, owner, each)
        inputs = torch.stack([sums, asks.double()], 1).cpu()
        scores.append(Score(each.mean().item(), 0.0, len(each), inputs))
    return scores


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

    Of models that predict nothing the loss is the squared distance from the mixture of the members' features, relative
    to their squares. logits: how many are held at a time. visited: told the number of each segment before its visit.
    """
    if source.spec.task == "features":
        return _feature_scores(source, items, (chart, route), visited or _ignore)
    return _Evaluation(source, items, chart, route, logits, learn=False, keep=False).run(visited or _ignore)


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
