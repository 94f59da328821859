"""One pass over a pair of endpoints, unit by unit: losses on the line between them, and their gradients.

Every unit (a block, a run of the head's rows) serves all micro-batches while it is loaded. Boundary activations are
kept, blocks are recomputed in backward (or their graphs kept, see `learn`), gradients are taken within one visit, so
that no graph holds a weight that is not there any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import groupby

import torch
from torch import Tensor

from ..examples import Data
from ..symmetry.charts import Chart
from ..symmetry.transform import BlockTransform, turn_rows
from .attention import Positions
from .block import block
from .boundaries import Boundaries
from .dispatch import Choice, choose
from .head import HeadLoss, Part, Reading
from .loss import CHUNK_ELEMENTS
from .model import answers, asked, embed, read_out, read_part, require_task
from .slots import LineSlots, Slots
from .source import Source

WHOLE_HEAD = {True: 2.0, False: 1.0}  # tokens per width from which the head is interpolated as weights; if it learns
STREAM_ELEMENTS = 1 << 24  # of residual streams, held at a time by an evaluation: 64 MiB in float32


@dataclass(frozen=True)
class Item:
    """One micro-batch at one place of the line."""

    data: Data
    position: float

    @property
    def count(self) -> int:
        """How many predictions it asks for."""
        return len(answers(self.data))


@dataclass(frozen=True)
class Score:
    """Of one item: mean loss in nats per prediction, share of predictions that are right, number of predictions."""

    loss: float
    accuracy: float
    count: int


def choose_path(source: Source, items: Sequence[Item], keep: bool) -> Choice:
    """How a step on these items interpolates linear layers, and why."""
    spec, sample = source.spec, source.sample
    rows = (read_part(item.data) for item in items)
    counts = [len(x) * (spec.position_rows if spec.image else x.shape[1]) for x in rows]
    # a graph that is kept leads to one item's weights; a visit that recomputes makes W once for each lambda
    shared = len(items) if keep else len({item.position for item in items})
    return choose(sum(counts) // shared, spec.width, sample.dtype, sample.device, keep)


def visits(source: Source, learn: bool) -> list[int]:
    """The units of a pass, in order."""
    blocks = list(range(source.spec.layers))
    head = [source.spec.layers + k for k in range(source.head_parts)]
    if learn and len(head) > 1:
        head += head[::-1]  # several runs: normalisers first, gradients then, from the run that is still there
    return blocks + head + (blocks[::-1] if learn else [])


class _Pass:
    """What both kinds of passes share: items on their way through the units."""

    def __init__(
        self,
        source: Source,
        items: Sequence[Item],
        chart: Chart | None,
        path: str | None,
        logits: int,
        *,
        learn: bool,
        keep: bool,
    ):
        require_task(source.spec)
        self.logits, self.learns = logits, learn
        self.source, self.spec, self.chart = source, source.spec, chart
        self.items = sorted(items, key=lambda item: item.position)
        with torch.set_grad_enabled(learn):
            self.rotation_made = chart.rotation() if chart else None
        self.rotation = _leaf(self.rotation_made)
        self.turn_gradient = None if self.rotation is None or not learn else torch.zeros_like(self.rotation)
        self._positions: dict[int, Positions] = {}
        if self.rotation is None:
            self.path = "weight"  # nothing but an interpolation of weights
        else:
            self.path = path or choose_path(source, self.items, keep).path

    def positions(self, x: Tensor) -> Positions:
        if x.shape[1] not in self._positions:
            self._positions[x.shape[1]] = Positions.of(self.spec, x.shape[1], x.dtype, x.device)
        return self._positions[x.shape[1]]

    def maps(self, unit: int) -> BlockTransform:
        return self.chart.block(unit) if self.chart else BlockTransform()

    def line(
        self, a: Slots, b: Slots, position: float, maps: BlockTransform | None, once: bool = False, learn: bool = True
    ) -> LineSlots:
        rotation = self.rotation if learn or self.rotation is None else self.rotation.detach()
        return LineSlots(self.spec, a, b, position, rotation, maps, self.path, once)

    def groups(self) -> list[tuple[float, list[int]]]:
        """(lambda, its items)."""
        indices = range(len(self.items))
        return [(p, list(group)) for p, group in groupby(indices, key=lambda m: self.items[m].position)]

    def ends(self, item: Item) -> tuple[LineSlots, Slots, Slots, Tensor | None]:
        """What lies outside the blocks, with the rows of the embedding that an item needs: on the line, A's, B's.

        And which of these rows each token takes.
        """
        inputs = read_part(item.data)
        a, b = (dict(slots) for slots in self.source.ends)
        rows = None
        if not self.spec.image:
            used, rows = inputs.unique(return_inverse=True)
            a["embed"], b["embed"] = self.source.embed_rows(used)
            if "positions" in a:
                some = slice(0, inputs.shape[1] + self.spec.position_offset)
                a["positions"], b["positions"] = a["positions"][some], b["positions"][some]
        return self.line(a, b, item.position, None), a, b, rows

    def whole_head(self, position: float) -> bool:
        """Whether the head's rows are interpolated as weights, and not applied to two streams.

        In multiply-adds for each of the head's weights, of N tokens: a second stream takes N (2 N with gradients),
        weights take d (N + 2 d).
        """
        if self.rotation is None or position == 0:
            return True
        tokens = sum(item.count for item in self.items if item.position == position)
        return self.path == "weight" and tokens > WHOLE_HEAD[self.learns] * self.spec.width

    def reading(self, rows: Tensor, position: float) -> Reading:
        """The interpolated head's, of what it reads (n, d); its weights are in `head_part`."""
        if self.whole_head(position):
            return Reading([rows], [1.0])
        assert self.rotation is not None
        return Reading([rows, turn_rows(rows, self.rotation.mT)], [1 - position, position])

    @contextmanager
    def head_part(self, a: Slots, b: Slots, position: float, start: int, pull: float = 0) -> Iterator[Part]:
        """A run of the head's rows for the items at one place of the line. pull: what gradients are multiplied with."""
        bias = torch.lerp(a["head_bias"], b["head_bias"], position) if "head_bias" in a else None
        if not self.whole_head(position):
            yield Part([a["head"], b["head"]], bias, start)
            return
        line = self.line(a, b, position, None, learn=bool(pull))
        weight = line["head"].detach()
        gradient = torch.zeros_like(weight) if line.leaves else None
        yield Part([weight], bias, start, gradient)
        if gradient is not None:
            line.collect([gradient.mul_(pull)])
            self.add_turn(line.contract(self.turns))

    @property
    def turns(self) -> list[Tensor]:
        return [] if self.rotation is None else [self.rotation]

    def add_turn(self, gradients: Sequence[Tensor | None]) -> None:
        for gradient in gradients:
            if gradient is not None:
                assert self.turn_gradient is not None
                self.turn_gradient += gradient


def _pull(outputs: Sequence[Tensor], slopes: Sequence[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of Σ slope · output with respect to inputs; None where nothing depends on one."""
    live = [(y, s) for y, s in zip(outputs, slopes, strict=True) if s is not None and y.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad([y for y, _ in live], inputs, [s for _, s in live], allow_unused=True))


def _leaf(made: Tensor | None) -> Tensor | None:
    return None if made is None else made.detach().requires_grad_(made.requires_grad)


class _Evaluation(_Pass):
    @torch.no_grad()
    def run(self) -> list[Score]:
        source, spec = self.source, self.spec
        source.begin(visits(source, learn=False))
        ends = [self.ends(item) for item in self.items]
        streams = [
            embed(spec, line, read_part(item.data), rows)
            for item, (line, _, _, rows) in zip(self.items, ends, strict=True)
        ]
        for i in range(spec.layers):
            with source.visit(i) as (a, b):
                maps = self.maps(i)
                for position, group in self.groups():
                    line = self.line(a, b, position, maps)
                    for m in group:
                        streams[m] = block(spec, line, streams[m], self.positions(streams[m]), i)
        losses = []
        for item, x, (line, _, _, _) in zip(self.items, streams, ends, strict=True):
            rows = asked(read_out(spec, line, x, read_part(item.data)), item.data)
            reading = self.reading(rows, item.position)
            losses.append(HeadLoss(reading, answers(item.data), softcap=spec.head_softcap, chunk=self.logits))
        start = 0
        for k in range(source.head_parts):
            with source.visit(spec.layers + k) as (a, b):
                for position, group in self.groups():
                    with self.head_part(a, b, position, start) as part:
                        for m in group:
                            losses[m].scan(part, [])
                start += len(a["head"])
        counts = [item.count for item in self.items]
        return [Score(h.loss.item() / n, h.right / n, n) for h, n in zip(losses, counts, strict=True)]


def evaluate(
    source: Source,
    items: Sequence[Item],
    chart: Chart | None = None,
    path: str | None = None,
    logits: int = CHUNK_ELEMENTS,
) -> list[Score]:
    """Scores of `items`, in order of lambda, in one pass over the units. chart: applied to b; None: the plain line.

    logits: how many are held at a time.
    """
    return _Evaluation(source, items, chart, path, logits, learn=False, keep=False).run()


def line_scores(
    source: Source,
    data: Data,
    points: Sequence[float],
    chart: Chart | None = None,
    batch: int = 32,
    *,
    rows: int | None = None,
    logits: int = CHUNK_ELEMENTS,
) -> list[Score]:
    """One score per place of the line, ascending, on data taken `batch` rows at a time.

    All places share a pass over the units, on `rows` rows of data; by default as many as make STREAM_ELEMENTS.
    """
    spec = source.spec
    length = spec.position_rows if spec.image else read_part(data).shape[1]
    rows = max(batch, rows or STREAM_ELEMENTS // (len(points) * length * spec.width))
    seen: list[list[Score]] = [[] for _ in points]
    for some in data.split(rows):
        parts = [part for part in some.split(batch) if len(answers(part))]
        scores = evaluate(source, [Item(part, t) for t in sorted(points) for part in parts], chart, logits=logits)
        for k in range(len(points)):
            seen[k] += scores[k * len(parts) : (k + 1) * len(parts)]
    return [_together(scores) for scores in seen]


def _together(scores: list[Score]) -> Score:
    n = sum(s.count for s in scores)
    return Score(sum(s.loss * s.count for s in scores) / n, sum(s.accuracy * s.count for s in scores) / n, n)


class _Learning(_Pass):
    def __init__(
        self,
        source: Source,
        items: Sequence[Item],
        chart: Chart,
        path: str | None,
        logits: int,
        *,
        divergence: bool,
        keep: bool,
        offload: bool,
    ):
        super().__init__(source, items, chart, path, logits, learn=True, keep=keep)
        self.divergence, self.keep = divergence, keep
        self.gradients = {name: torch.zeros_like(t) for name, t in chart.tensors.items()}
        self.teachers: list[list[Tensor]] = []  # streams of A and B, per item
        self.boundaries = Boundaries(offload)
        self.kept: dict[int, _KeptBlock] = {}

    @torch.no_grad()
    def run(self) -> Tensor:
        source, spec = self.source, self.spec
        source.begin(visits(source, learn=True))
        ends = [self.ends(item) for item in self.items]
        for item, (_, a, b, rows) in zip(self.items, ends, strict=True):
            if self.divergence:
                self.teachers.append([embed(spec, w, read_part(item.data), rows) for w in (a, b)])
        streams = [
            embed(spec, line, read_part(item.data), rows)
            for item, (line, _, _, rows) in zip(self.items, ends, strict=True)
        ]
        for i in range(spec.layers):
            with source.visit(i) as (a, b):
                self._teach(i, a, b)
                streams = self._forward(i, a, b, streams)
        loss, slopes = self._head(ends, streams)
        for i in reversed(range(spec.layers)):
            with source.visit(i) as (a, b):
                slopes = self._backward(i, a, b, slopes)
        for item, slope, (line, _, _, rows) in zip(self.items, slopes, ends, strict=True):
            self._outside(line, lambda w, item=item, rows=rows: [embed(spec, w, read_part(item.data), rows)], [slope])
            self.add_turn(line.contract(self.turns))
        if self.rotation_made is not None and self.chart is not None:
            leaf = self.chart.tensors["rotation"]
            self.gradients["rotation"] = torch.autograd.grad(self.rotation_made, leaf, self.turn_gradient)[0]
        return loss

    def _teach(self, i: int, a: Slots, b: Slots) -> None:
        for pair in self.teachers:
            for k, w in enumerate((a, b)):
                pair[k] = block(self.spec, w, pair[k], self.positions(pair[k]), i)

    def _forward(self, i: int, a: Slots, b: Slots, streams: list[Tensor]) -> list[Tensor]:
        if self.keep:
            kept = self.kept[i] = _KeptBlock(self, i)
            return [kept.forward(a, b, item.position, x) for item, x in zip(self.items, streams, strict=True)]
        maps = self.maps(i)
        self.boundaries.next_block()
        for position, group in self.groups():
            line = self.line(a, b, position, maps, learn=False)
            for m in group:
                x = streams[m]
                streams[m] = block(self.spec, line, x, self.positions(x), i)
                self.boundaries.put(x)
        return streams

    def _head(self, ends: list[tuple[LineSlots, Slots, Slots, Tensor | None]], streams: list[Tensor]):
        """(mean loss, its gradients with respect to the streams behind the last block)."""
        spec = self.spec
        losses = []
        total = sum(item.count for item in self.items)
        for m, (item, (line, a, b, _)) in enumerate(zip(self.items, ends, strict=True)):
            rows = asked(read_out(spec, line, streams[m], read_part(item.data)), item.data)
            teachers = None
            if self.divergence:
                taught = [
                    asked(read_out(spec, w, x, read_part(item.data)), item.data)
                    for w, x in zip((a, b), self.teachers[m], strict=True)
                ]
                shares = 1 - item.position, item.position
                teachers = [(s, Reading([t], [1.0])) for s, t in zip(shares, taught, strict=True)]
            target = None if self.divergence else answers(item.data)
            reading = self.reading(rows, item.position)
            losses.append(HeadLoss(reading, target, teachers, softcap=spec.head_softcap, learn=True, chunk=self.logits))
        self.teachers = []
        self._over_head(losses, total)
        slopes = []
        for m, (item, (line, _, _, _), h) in enumerate(zip(self.items, ends, losses, strict=True)):
            gradients = [g / total for g in h.gradients]

            def rows_of(w: LineSlots, x: Tensor, item: Item = item) -> list[Tensor]:
                rows = asked(read_out(spec, w, x, read_part(item.data)), item.data)
                return self.reading(rows, item.position).inputs

            slopes.append(self._outside(line, rows_of, gradients, streams[m]))
        return torch.stack([h.loss for h in losses]).sum() / total, slopes

    def _over_head(self, losses: list[HeadLoss], total: int) -> None:
        """All losses through the head's runs: once, or, where there are several, forth and back."""
        parts = [(k, HeadLoss.scan) for k in range(self.source.head_parts)]
        parts += [(k, HeadLoss.add) for k in reversed(range(self.source.head_parts))]
        if self.source.head_parts == 1:
            parts = [(0, HeadLoss.whole)]
        starts = [0]
        for k, apply in parts:
            with self.source.visit(self.spec.layers + k) as (a, b):
                start = starts[k]
                teachers = [Part([w["head"]], w.get("head_bias"), start) for w in (a, b)] if self.divergence else []
                for position, group in self.groups():
                    pull = 0 if apply is HeadLoss.scan else 1 / total
                    with self.head_part(a, b, position, start, pull) as part:
                        for m in group:
                            apply(losses[m], part, teachers)
                starts.append(start + len(a["head"]))

    def _outside(self, line: LineSlots, function, slopes: list[Tensor], x: Tensor | None = None) -> Tensor | None:
        """Backward through something outside the blocks. Returns the gradient of x, where there is one."""
        with torch.enable_grad():
            leaf = None if x is None else x.detach().requires_grad_()
            made = function(line) if leaf is None else function(line, leaf)
        found = _pull(made, slopes, ([] if leaf is None else [leaf]) + self.turns + line.leaves)
        dx = None if leaf is None else found.pop(0)
        self.add_turn([found.pop(0) for _ in self.turns])
        line.collect(found)
        return dx

    def _backward(self, i: int, a: Slots, b: Slots, slopes: list[Tensor | None]) -> list[Tensor | None]:
        if self.keep:
            return self.kept.pop(i).backward(slopes)
        moving = _MovingMaps(self, i)
        out: list[Tensor | None] = list(slopes)
        for position, group in self.groups():
            line = self.line(a, b, position, moving.leaves)
            for m in group:
                with torch.enable_grad():
                    x = self.boundaries.take().detach().requires_grad_()
                    y = block(self.spec, line, x, self.positions(x), i)
                n = len(moving.tensors)
                inputs = [x, *self.turns, *moving.tensors, *line.leaves]
                out[m], *rest = _pull([y], [slopes[m]], inputs)
                self.add_turn([rest.pop(0) for _ in self.turns])
                moving.add(rest[:n])
                line.collect(rest[n:])
            found = line.contract([*self.turns, *moving.tensors])
            self.add_turn([found.pop(0) for _ in self.turns])
            moving.add(found)
        moving.finish()
        return out


class _MovingMaps:
    """A block's part of the relative transform: leaves for the block's graph, and their way back to the chart."""

    def __init__(self, owner: _Learning, i: int):
        assert owner.chart is not None
        self.owner, self.chart, self.i = owner, owner.chart, i
        self.coordinates = {name: x.detach().requires_grad_() for name, x in self.chart.coordinates(i).items()}
        with torch.enable_grad():
            made = self.chart.block(i, self.coordinates)
        self.made: list[Tensor] = []
        self.tensors: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for f in fields(BlockTransform):
            tensor = getattr(made, f.name)
            if tensor is not None and tensor.requires_grad:
                self.made.append(tensor)
                self.tensors.append(tensor.detach().requires_grad_())
                parts[f.name] = self.tensors[-1]
            elif tensor is not None:
                parts[f.name] = tensor
        self.leaves = BlockTransform(**parts)
        self.sums: list[Tensor | None] = [None] * len(self.tensors)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for j, gradient in enumerate(gradients):
            if gradient is not None:
                old = self.sums[j]
                self.sums[j] = gradient if old is None else old + gradient

    def finish(self) -> None:
        """On to the chart's coordinates of this block."""
        found = _pull(self.made, self.sums, list(self.coordinates.values()))
        for name, gradient in zip(self.coordinates, found, strict=True):
            if gradient is not None:
                self.owner.gradients[name][:, self.i] += gradient


class _KeptBlock:
    """A block whose graphs are kept from forward to backward, where memory allows: nothing is computed twice."""

    def __init__(self, owner: _Learning, i: int):
        self.owner, self.i, self.moving = owner, i, _MovingMaps(owner, i)
        self.graphs: list[tuple[Tensor, Tensor]] = []

    def forward(self, a: Slots, b: Slots, position: float, x: Tensor) -> Tensor:
        owner = self.owner
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            line = owner.line(a, b, position, self.moving.leaves, once=True)
            y = block(owner.spec, line, x, owner.positions(x), self.i)
        self.graphs.append((x, y))
        return y.detach()

    def backward(self, slopes: list[Tensor | None]) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        turns = self.owner.turns
        for slope in slopes:
            x, y = self.graphs.pop(0)
            dx, *rest = _pull([y], [slope], [x, *turns, *self.moving.tensors])
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
    path: str | None = None,
    logits: int = CHUNK_ELEMENTS,
    offload: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over all predictions of `items` (0-d, float64), and its gradients by the chart's tensors.

    divergence: from (1-λ) p_A + λ p_B, the endpoints' own predictions; else cross-entropy with the text. keep: hold
    every block's graph until backward instead of computing it again; the source must then be `Resident`.
    path: one of kernels.interp_linear.PATHS; None: engine.dispatch chooses. logits: how many are held at a time.
    offload: see Boundaries.
    """
    job = _Learning(source, items, chart, path, logits, divergence=divergence, keep=keep, offload=offload)
    return job.run(), job.gradients
