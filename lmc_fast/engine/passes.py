"""What learning and evaluation share: items on their way through the segments of all members, one after the other.

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
from ..kernels.many import blend
from ..places import Place, shares_of
from ..symmetry.charts import Chart
from ..symmetry.elements import Element, Elements
from .attention import Positions
from .head import HeadInputs, VocabChunk
from .model import labels, model_inputs
from .slots import LineSlots, Slots
from .source import Source

WHOLE_HEAD = {True: 2.0, False: 1.0}  # tokens per width from which the head is interpolated as weights; if it learns


@dataclass(frozen=True)
class Item:
    """One micro-batch at one place: lambda of the line, or a share of each member.

    taught: how many of the inputs each member teaches, in order; None: all teach all, by their shares.
    """

    data: Data
    lam: Place
    taught: tuple[int, ...] | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        """How much each member counts."""
        return shares_of(self.lam)

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
    shared = len(items) if keep else len({item.shares for item in items})
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
        self.logits, self.learns = logits, learn
        self.source, self.spec, self.chart = source, source.spec, chart
        self.items = sorted(items, key=lambda item: item.shares[1:])
        with torch.set_grad_enabled(learn):
            self.turns_made = chart.rotations() if chart else []
        # transforms are rounded to the weights' dtype where they act; gradients are summed in the chart's
        self.turns = [leaf_of(made, source.sample.dtype) for made in self.turns_made]
        self.turn_gradients = [torch.zeros_like(made) for made in self.turns_made] if learn else []
        self._positions: dict[int, Positions] = {}
        if not self.turns:
            self.route = "weight"  # nothing but an interpolation of weights
        else:
            self.route = route or choose_route(source, self.items, keep).route

    def positions(self, x: Tensor) -> Positions:
        if x.shape[1] not in self._positions:
            self._positions[x.shape[1]] = Positions.of(self.spec, x.shape[1], x.dtype, x.device)
        return self._positions[x.shape[1]]

    def maps(self, segment: int) -> list[dict[str, Element]]:
        """Of every member but the first."""
        made = self.chart.blocks(segment) if self.chart else [{} for _ in self.source.ends[1:]]
        dtype = self.source.sample.dtype
        return [{space: g.map(lambda t: t.to(dtype)) for space, g in elements.items()} for elements in made]

    def line(
        self,
        members: Sequence[Slots],
        shares: Sequence[float],
        maps: Sequence[Elements] | None,
        once: bool = False,
        learn: bool = True,
    ) -> LineSlots:
        rotations = self.turns if learn else [turn.detach() for turn in self.turns]
        return LineSlots(self.spec, members, shares, rotations, maps, self.route, once)

    def groups(self) -> list[tuple[tuple[float, ...], list[int]]]:
        """(shares, the items there)."""
        indices = range(len(self.items))
        return [(p, list(group)) for p, group in groupby(indices, key=lambda m: self.items[m].shares)]

    def ends(self, item: Item) -> tuple[LineSlots, list[Slots], Tensor | None]:
        """What lies outside the blocks, with the rows of the embedding that an item needs: between them, each member's.

        And which of these rows each token takes.
        """
        inputs = model_inputs(item.data)
        members = [dict(slots) for slots in self.source.ends]
        rows = None
        if not self.spec.image:
            used, rows = inputs.unique(return_inverse=True)
            for w, table in zip(members, self.source.embed_rows(used), strict=True):
                w["embed"] = table
                if "positions" in w:
                    w["positions"] = w["positions"][: inputs.shape[1] + self.spec.position_offset]
        return self.line(members, item.shares, None), list(members), rows

    def whole_head(self, shares: Sequence[float]) -> bool:
        """Whether the head's rows are interpolated as weights, and not applied to a stream for each member.

        In multiply-adds for each of the head's weights, of N tokens: a further stream takes N (2 N with gradients),
        weights take d (N + 2 d). Behind a transform the head reads channels that no rotation moves.
        """
        if not self.turns or shares[0] == 1 or self.spec.head_transform:
            return True
        tokens = sum(item.count for item in self.items if item.shares == shares)
        return self.route == "weight" and tokens > WHOLE_HEAD[self.learns] * self.spec.width

    def head_inputs(self, rows: Tensor, shares: Sequence[float]) -> HeadInputs:
        """The interpolated head's, of what it reads (n, d); its weights are in `head_chunk`."""
        if self.whole_head(shares):
            return HeadInputs([rows], [1.0])
        vectors = rows.reshape(-1, len(self.turns[0]))  # each of those in a row
        return HeadInputs([rows, *((vectors @ turn).view(rows.shape) for turn in self.turns)], list(shares))

    @contextmanager
    def head_chunk(
        self, members: Sequence[Slots], shares: Sequence[float], start: int, pull: float = 0
    ) -> Iterator[VocabChunk]:
        """A run of the head's rows for the items at one place. pull: what gradients are multiplied with."""
        bias = blend([w["head_bias"] for w in members], shares) if "head_bias" in members[0] else None
        if not self.whole_head(shares):
            yield VocabChunk([w["head"] for w in members], bias, start)
            return
        line = self.line(members, shares, None, learn=bool(pull))
        weight = line["head"].detach()
        gradient = torch.zeros_like(weight) if line.leaves else None
        yield VocabChunk([weight], bias, start, gradient)
        if gradient is not None:
            line.collect([gradient.mul_(pull)])
            self.add_turn(line.contract(self.turns))

    def add_turn(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds gradients of `turns`, in their order."""
        if self.turn_gradients:
            for total, gradient in zip(self.turn_gradients, gradients, strict=True):
                if gradient is not None:
                    total += gradient


def pull_back(outputs: Sequence[Tensor], slopes: Sequence[Tensor | None], inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of Σ slope · output with respect to inputs; None where nothing depends on one."""
    live = [(y, s) for y, s in zip(outputs, slopes, strict=True) if s is not None and y.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad([y for y, _ in live], inputs, [s for _, s in live], allow_unused=True))


def leaf_of(made: Tensor, dtype: torch.dtype) -> Tensor:
    return made.detach().to(dtype).requires_grad_(made.requires_grad)
