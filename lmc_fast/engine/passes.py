"""What learning and evaluation share: items on their way through the segments of a pair, one segment after the other.

Every segment (a block, a run of the head's rows) serves all micro-batches while it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..examples import Data
from ..kernels.dispatch import Choice, choose
from ..symmetry.charts import Chart
from ..symmetry.elements import Element, Elements
from .attention import Positions
from .head import HeadInputs, VocabChunk
from .model import labels, model_inputs, require_task
from .slots import LineSlots, Slots
from .source import Source

WHOLE_HEAD = {True: 2.0, False: 1.0}  # tokens per width from which the head is interpolated as weights; if it learns


@dataclass(frozen=True)
class Item:
    """One micro-batch at one place of the line."""

    data: Data
    lam: float

    @property
    def count(self) -> int:
        """How many predictions it asks for."""
        return len(labels(self.data))


def choose_route(source: Source, items: Sequence[Item], keep: bool) -> Choice:
    """How a step on these items interpolates linear layers, and why."""
    spec, sample = source.spec, source.sample
    rows = (model_inputs(item.data) for item in items)
    counts = [len(x) * spec.length(x.shape) for x in rows]
    # a graph that is kept leads to one item's weights; a visit that recomputes makes W once for each lambda
    shared = len(items) if keep else len({item.lam for item in items})
    return choose(sum(counts) // shared, spec.width, sample.dtype, sample.device, keep)


def visit_order(layers: int, head_parts: int, learn: bool) -> list[int]:
    """The segments of a pass, in order: blocks, runs of the head and, where something is learned, back again."""
    blocks, head = list(range(layers)), list(range(layers, layers + head_parts))
    if learn and head_parts > 1:
        head += head[::-1]  # normalisers first, gradients then, from the run that is still there
    return blocks + head + (blocks[::-1] if learn else [])


class Pass:
    """What both kinds of passes share: items on their way through the segments."""

    def __init__(
        self,
        source: Source,
        items: Sequence[Item],
        chart: Chart | None,
        route: str | None,
        logits: int,
        *,
        learn: bool,
        keep: bool,
    ):
        require_task(source.spec)
        self.logits, self.learns = logits, learn
        self.source, self.spec, self.chart = source, source.spec, chart
        self.items = sorted(items, key=lambda item: item.lam)
        with torch.set_grad_enabled(learn):
            self.rotation_made = chart.rotation() if chart else None
        # transforms are rounded to the weights' dtype where they act; gradients are summed in the chart's
        self.rotation = leaf_of(self.rotation_made, source.sample.dtype)
        self.turn_gradient = None if self.rotation_made is None or not learn else torch.zeros_like(self.rotation_made)
        self._positions: dict[int, Positions] = {}
        if self.rotation is None:
            self.route = "weight"  # nothing but an interpolation of weights
        else:
            self.route = route or choose_route(source, self.items, keep).route

    def positions(self, x: Tensor) -> Positions:
        if x.shape[1] not in self._positions:
            self._positions[x.shape[1]] = Positions.of(self.spec, x.shape[1], x.dtype, x.device)
        return self._positions[x.shape[1]]

    def maps(self, segment: int) -> dict[str, Element]:
        made = self.chart.block(segment) if self.chart else {}
        return {space: g.map(lambda t: t.to(self.source.sample.dtype)) for space, g in made.items()}

    def line(
        self, a: Slots, b: Slots, lam: float, maps: Elements | None, once: bool = False, learn: bool = True
    ) -> LineSlots:
        rotation = self.rotation if learn or self.rotation is None else self.rotation.detach()
        return LineSlots(self.spec, a, b, lam, rotation, maps, self.route, once)

    def groups(self) -> list[tuple[float, list[int]]]:
        """(lambda, its items)."""
        indices = range(len(self.items))
        return [(p, list(group)) for p, group in groupby(indices, key=lambda m: self.items[m].lam)]

    def ends(self, item: Item) -> tuple[LineSlots, Slots, Slots, Tensor | None]:
        """What lies outside the blocks, with the rows of the embedding that an item needs: on the line, A's, B's.

        And which of these rows each token takes.
        """
        inputs = model_inputs(item.data)
        a, b = (dict(slots) for slots in self.source.ends)
        rows = None
        if not self.spec.image:
            used, rows = inputs.unique(return_inverse=True)
            a["embed"], b["embed"] = self.source.embed_rows(used)
            if "positions" in a:
                some = slice(0, inputs.shape[1] + self.spec.position_offset)
                a["positions"], b["positions"] = a["positions"][some], b["positions"][some]
        return self.line(a, b, item.lam, None), a, b, rows

    def whole_head(self, lam: float) -> bool:
        """Whether the head's rows are interpolated as weights, and not applied to two streams.

        In multiply-adds for each of the head's weights, of N tokens: a second stream takes N (2 N with gradients),
        weights take d (N + 2 d).
        """
        if self.rotation is None or lam == 0:
            return True
        tokens = sum(item.count for item in self.items if item.lam == lam)
        return self.route == "weight" and tokens > WHOLE_HEAD[self.learns] * self.spec.width

    def head_inputs(self, rows: Tensor, lam: float) -> HeadInputs:
        """The interpolated head's, of what it reads (n, d); its weights are in `head_chunk`."""
        if self.whole_head(lam):
            return HeadInputs([rows], [1.0])
        assert self.rotation is not None
        turned = (rows.reshape(-1, len(self.rotation)) @ self.rotation).view(rows.shape)  # each of the vectors in a row
        return HeadInputs([rows, turned], [1 - lam, lam])

    @contextmanager
    def head_chunk(self, a: Slots, b: Slots, lam: float, start: int, pull: float = 0) -> Iterator[VocabChunk]:
        """A run of the head's rows for the items at one place of the line. pull: what gradients are multiplied with."""
        bias = torch.lerp(a["head_bias"], b["head_bias"], lam) if "head_bias" in a else None
        if not self.whole_head(lam):
            yield VocabChunk([a["head"], b["head"]], bias, start)
            return
        line = self.line(a, b, lam, None, learn=bool(pull))
        weight = line["head"].detach()
        gradient = torch.zeros_like(weight) if line.leaves else None
        yield VocabChunk([weight], bias, start, gradient)
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


def pull_back(outputs: Sequence[Tensor], slopes: Sequence[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of Σ slope · output with respect to inputs; None where nothing depends on one."""
    live = [(y, s) for y, s in zip(outputs, slopes, strict=True) if s is not None and y.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad([y for y, _ in live], inputs, [s for _, s in live], allow_unused=True))


def leaf_of(made: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if made is None else made.detach().to(dtype).requires_grad_(made.requires_grad)
