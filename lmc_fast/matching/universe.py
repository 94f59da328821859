"""Matching of more than two models at once, without gradients: each is matched to the sum of the others as they stand.

What is climbed is the sum over all pairs of <g_i θ_i, g_j θ_j> and, where activations count, of how well they agree.
Each update is the best fit of one space of one model while all else stands, so that the sum never falls. As every model
has one element, nothing can be inconsistent between pairs (for permutations: C²M³, arXiv 2405.17897).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import HEAD_UNITS, PARENT, STREAM, axes_of, size_of
from ..checkpoints.lazy import Slots, Table
from ..checkpoints.weights import Weights
from ..symmetry.elements import Dense, Element, Elements, Scale, Wreath, dense, orthogonal
from ..symmetry.groups import rotates
from ..symmetry.transform import Transform, apply
from .activations import Statistics
from .closed_form import MAX_ROUNDS, Changes, Evidence
from .evidence import ORDERED, add_evidence, at_work, ends_evidence, work_dtype
from .heads import match_heads
from .procrustes import residual_rotation
from .units import match_experts, match_head_units, match_units, unit_scores

_SPACES = {  # of what activations were looked at, outermost first
    "q": ("heads", "queries", "qk"),
    "k": ("heads", "qk"),
    "v": ("heads", "vo"),
    "mixed": ("heads", "queries", "vo"),
    "hidden": ("units",),
}
_TOGETHER: tuple[tuple[str, ...], ...] = (("heads", "queries", "vo", "qk"), ("experts", "expert_units"), ("units",))
_TURNS = 5  # of all rotations, each to the sum of the others, at most
_SETTLED = 1e-4  # what they gain in a turn, as a share of all
Pairs = Mapping[tuple[int, int], Statistics]  # of models i < j: rows of i, columns of j
_log = logging.getLogger("lmc_fast")


def match_all(
    members: Sequence[Weights],
    evidence: Evidence,
    statistics: Pairs | None = None,
    rounds: int = MAX_ROUNDS,
    visited: Callable[[int, int, Changes], None] | None = None,
    gained: Callable[[float], None] | None = None,
) -> list[Transform]:
    """One transform (float64) for each of canonical, balanced models; together they bring all closest to one another.

    Rounds go on until no assignment changes, at most `rounds`; each loads every block of all models once, one at a
    time. statistics: of every two, needed if the activations count. visited: told, before each block, the number of
    the round, that of the block, and the changes of earlier rounds. gained: told after each round what is climbed.
    """
    return _Universe(members, evidence, statistics).climb(rounds, visited, gained)


class _Universe:
    def __init__(self, members: Sequence[Weights], evidence: Evidence, statistics: Pairs | None):
        self.members, self.spec, self.evidence = members, members[0].spec, evidence
        self.statistics = statistics if evidence.activations else None
        self.found = [Transform({}, [{} for _ in range(self.spec.layers)]) for _ in members]
        self.known = {0}  # whose blocks were visited, and may be matched to
        self.scales: list[dict[str, float]] = [{} for _ in range(self.spec.layers)]
        self.stream_scale: float | None = None

    def climb(
        self,
        rounds: int,
        visited: Callable[[int, int, Changes], None] | None,
        gained: Callable[[float], None] | None,
    ) -> list[Transform]:
        changes: list[tuple[int, int]] = []
        outside = _Streams.of_ends(self.members)
        self._turn(outside, first=True)
        for done in range(1, rounds + 1):
            before = self._assignments()
            streams = outside.copy()
            inner = 0.0  # what agrees without the stream
            for i in range(self.spec.layers):
                if visited:
                    visited(done, i, changes)
                inner += self._block(i, streams)
            self.known = set(range(len(self.members)))
            if self.spec.head_transform:
                self._head_units(streams)
            total = self._turn(streams)
            after = self._assignments()
            changed = sum(name not in before or not torch.equal(before[name], p) for name, p in after.items())
            changes.append((changed, len(after)))
            if gained:
                gained(total + inner)
            if not changed and done > 1:
                break
        _log.info("matched in %d rounds, in the last of which %d of %d assignments changed", len(changes), *changes[-1])
        return self.found

    # ---------------------------------------------------------------------------------------------------------- blocks

    def _block(self, i: int, streams: _Streams) -> float:
        """Matches block i of each model in turn; adds what all say of the streams, returns what else agrees."""
        self._match_block(i)
        return self.evidence.weights * streams.add(self._inside(i)) + self._agreeing(i)

    def _match_block(self, i: int) -> None:
        """Beside the models as they stand, no more is held than one of them as it was: blocks are read again."""
        count = len(self.members)
        moved = [self._moved(k, i) if k in self.known else None for k in range(count)]
        for k in range(count):
            others = [j for j, m in enumerate(moved) if j != k and m is not None]
            if not others:
                continue
            turned = self._own(k, i, {STREAM: self.found[k].model[STREAM]})
            aim = _sum([m for j, m in enumerate(moved) if j in others and m is not None])
            moved[k] = None  # what it becomes takes its place
            self._match(k, i, aim, turned, self._scaled(i, self._seen(k, i, others), aim, turned))
            moved[k] = apply(self.spec, _cast(work_dtype(self.spec), self.found[k].blocks[i]), turned)

    def _own(self, k: int, i: int, elements: Elements) -> Slots:
        """Block i of a model, moved by these alone."""
        return apply(self.spec, _cast(work_dtype(self.spec), elements), at_work(self.spec, self.members[k].blocks[i]))

    def _moved(self, k: int, i: int) -> Slots:
        return self._own(k, i, self.found[k].model | self.found[k].blocks[i])

    def _inside(self, i: int) -> list[Slots]:
        """Block i of all models as they stand, but for their streams."""
        return [self._own(k, i, self.found[k].blocks[i]) for k in range(len(self.members))]

    def _match(self, k: int, i: int, aim: Slots, turned: Slots, seen: Mapping[str, Table]) -> None:
        """The best elements of one model's block, unless those that it has are better."""
        spec, shares = self.spec, (self.evidence.weights, None)
        old = dict(self.found[k].blocks[i])
        found = match_heads(spec, aim, turned, seen, shares)
        if spec.ffn.experts.count:
            found |= match_experts(spec, aim, turned)
        if spec.ffn.width:
            found["units"] = match_units(*unit_scores(spec, aim, turned, seen.get("hidden"), shares))
        for spaces in _TOGETHER:
            mine, before = ({s: e[s] for s in spaces if s in e} for e in (found, old))
            if before and self._fit(aim, turned, seen, before) > self._fit(aim, turned, seen, mine):
                continue  # an assignment that is not exact found worse than what there was
            self.found[k].blocks[i] |= mine

    def _fit(self, aim: Slots, turned: Slots, seen: Mapping[str, Table], elements: Elements) -> float:
        """How well a block's parts that these elements move agree with `aim`."""
        dtype = work_dtype(self.spec)
        moved = apply(self.spec, _cast(dtype, elements), turned)
        changed = [name for name in moved if moved[name] is not turned[name]]
        total = self.evidence.weights * sum(
            float((aim[name] * moved[name]).sum(dtype=torch.float64)) for name in changed
        )
        for name, table in seen.items():
            if any(space in elements for space in _SPACES[name]):
                c = table.rows(0, table.shape[0])
                total += float(_rows_moved(self.spec, name, elements, c.mT).diagonal().sum())
        return total

    # ------------------------------------------------------------------------------------------------------ activations

    def _seen(self, k: int, i: int, others: Sequence[int]) -> dict[str, Table]:
        """Evidence of model k's block from activations: rows of the sum of the others as they stand."""
        if self.statistics is None:
            return {}
        total: dict[str, Tensor] = {}
        for number, j in enumerate(others):
            for name, c in self._between(j, k, i).items():
                part = _rows_moved(self.spec, name, self.found[j].blocks[i], c)
                if number < 2:  # the first may be the statistics themselves
                    total[name] = total[name] + part if number else part
                else:
                    total[name] += part
        return {name: Table.of(c) for name, c in total.items()}

    def _between(self, j: int, k: int, i: int) -> dict[str, Tensor]:
        """Statistics of block i: rows of model j, columns of model k."""
        assert self.statistics is not None
        tables = self.statistics[min(j, k), max(j, k)].blocks[i]
        read = {name: table.rows(0, table.shape[0]) for name, table in tables.items()}
        return {name: c if j < k else c.mT for name, c in read.items()}

    def _scaled(self, i: int, seen: dict[str, Table], aim: Slots, turned: Slots) -> dict[str, Table]:
        """Brought to the size of what weights say, by factors that stay as they were the first time."""
        scaled: dict[str, Table] = {}
        for name, table in seen.items():
            if name not in self.scales[i]:
                squares = sizes = 0.0
                for start, part in table.chunks():
                    said = torch.zeros(part.shape, dtype=torch.float64, device=part.device)
                    run = slice(start, start + len(part))
                    add_evidence(said, self.spec, _SPACES[name], aim, turned, run=run)
                    squares, sizes = squares + float(said.norm()) ** 2, sizes + float(part.double().norm()) ** 2
                self.scales[i][name] = self.evidence.activations * (squares / max(sizes, 1e-60)) ** 0.5
            scaled[name] = replace(table, function=partial(torch.mul, other=self.scales[i][name]))
        return scaled

    def _agreeing(self, i: int) -> float:
        """What activations of block i agree, over all pairs."""
        if self.statistics is None:
            return 0.0
        total = 0.0
        for j, k in combinations(range(len(self.members)), 2):
            for name, c in self._between(j, k, i).items():
                left = _rows_moved(self.spec, name, self.found[j].blocks[i], c)
                both = _rows_moved(self.spec, name, self.found[k].blocks[i], left.mT)
                total += self.scales[i].get(name, 0.0) * float(both.diagonal().sum())
        return total

    # ---------------------------------------------------------------------------------------------------------- streams

    def _turn(self, streams: _Streams, first: bool = False) -> float:
        """Brings every model's stream to the sum of the others', until they stay; returns what then agrees."""
        total = -float("inf")
        for _ in range(1 if first else _TURNS):
            for k in range(len(self.members)):
                others = range(k) if first else [j for j in range(len(self.members)) if j != k]
                if not len(others):
                    self.found[k].model[STREAM] = self._stay()
                    continue
                mapped, ordered = self._aim(streams, k, others)
                best = residual_rotation(self.spec, mapped, ordered)
                self.found[k].model[STREAM] = Dense.orthogonal(best) if rotates(self.spec) else orthogonal(best)
            before, total = total, self._agreement(streams)
            if total - before <= _SETTLED * abs(total):
                break
        return total

    def _stay(self) -> Element:
        eye = torch.eye(self.spec.width, dtype=torch.float64, device=self._device)
        return Dense.orthogonal(eye) if rotates(self.spec) else orthogonal(eye)

    @property
    def _device(self) -> torch.device:
        head = self.members[0].table("head")
        assert head is not None
        return head.rows(0, 0).device

    def _aim(self, streams: _Streams, k: int, others: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """What model k's stream should fit: of the sum of the others as they stand."""
        mapped = torch.zeros_like(streams.mapped[0, 1])
        ordered = torch.zeros_like(mapped) if streams.ordered else None
        for j in others:
            r, (c, o) = _matrix(self.found[j].model[STREAM]), self._pair(streams, j, k)
            mapped += r @ c
            if ordered is not None and o is not None:
                ordered += r.abs() @ o
        return mapped, ordered

    def _pair(self, streams: _Streams, j: int, k: int) -> tuple[Tensor, Tensor | None]:
        """What weights and activations say of two streams: rows of model j, columns of model k."""
        low, high = min(j, k), max(j, k)
        c = self.evidence.weights * streams.mapped[low, high]
        if self.statistics is not None:
            seen = self.statistics[low, high].stream.to(c)
            if self.stream_scale is None:
                ratio = float(streams.mapped[low, high].norm() / seen.norm().clamp(min=1e-30))
                self.stream_scale = self.evidence.activations * ratio
            c = c + self.stream_scale * seen
        o = self.evidence.weights * streams.ordered[low, high] if streams.ordered else None
        return (c, o) if j < k else (c.mT, o if o is None else o.mT)

    def _agreement(self, streams: _Streams) -> float:
        total = 0.0
        for j, k in combinations(range(len(self.members)), 2):
            (c, o), r, s = self._pair(streams, j, k), *(_matrix(self.found[m].model[STREAM]) for m in (j, k))
            total += float(((r @ c) * s).sum())
            if o is not None:
                total += float(((r.abs() @ o) * s.abs()).sum())
        return total

    def _head_units(self, streams: _Streams) -> None:
        """Units of the head transforms, matched to the first model's, and what the transforms say of the streams."""
        spec, heads = self.spec, [w.table("head") for w in self.members]
        ends = [{name: t.double() for name, t in w.small_ends.items()} for w in self.members]
        aim = apply(spec, {STREAM: self.found[0].model[STREAM]}, ends[0])
        for k in range(1, len(self.members)):
            turned = apply(spec, {STREAM: self.found[k].model[STREAM]}, ends[k])
            first, mine = heads[0], heads[k]
            assert first is not None and mine is not None
            self.found[k].model[HEAD_UNITS] = match_head_units(spec, aim, turned, (first, mine))
        name = "head_transform"
        parts = [
            apply(spec, {HEAD_UNITS: g.model[HEAD_UNITS]} if HEAD_UNITS in g.model else {}, {name: w[name]})
            for g, w in zip(self.found, ends, strict=True)
        ]
        streams.add(parts)

    def _assignments(self) -> dict[str, Tensor]:
        """All that is discrete: permutations, and signs of the streams."""
        out: dict[str, Tensor] = {}
        for k, g in enumerate(self.found):
            for i, elements in enumerate((g.model, *g.blocks)):
                for space, element in elements.items():
                    if isinstance(element, Wreath):
                        out[f"{k} {space} {i}"] = element.places
            stream = g.model.get(STREAM)
            if isinstance(stream, Wreath) and isinstance(stream.inner, Scale):
                out[f"{k} signs"] = stream.inner.scale
        return out


class _Streams:
    """What the slots of every two models say of their streams, before either is turned; (d, d) float64 each.

    ordered: of gains that lie in the stream; nothing where it rotates, since then there are none.
    """

    def __init__(self, spec: Spec, mapped: dict[tuple[int, int], Tensor], ordered: dict[tuple[int, int], Tensor]):
        self.spec, self.mapped, self.ordered = spec, mapped, ordered

    @staticmethod
    def of_ends(members: Sequence[Weights]) -> _Streams:
        streams = _Streams(members[0].spec, {}, {})
        for j, k in combinations(range(len(members)), 2):
            found = ends_evidence(members[j], members[k])
            streams.mapped[j, k] = found.mapped
            if not rotates(streams.spec):
                streams.ordered[j, k] = found.ordered
        return streams

    def copy(self) -> _Streams:
        mapped, ordered = ({pair: c.clone() for pair, c in each.items()} for each in (self.mapped, self.ordered))
        return _Streams(self.spec, mapped, ordered)

    def add(self, members: Sequence[Slots]) -> float:
        """From slots of all models, whose other spaces are in place. Returns what slots agree that have no stream."""
        apart = [name for name in members[0] if axes_of(self.spec, name) and not _has_stream(self.spec, name)]
        inner = 0.0
        for j, k in self.mapped:
            x, y = members[j], members[k]
            add_evidence(self.mapped[j, k], self.spec, (STREAM,), x, y)
            if self.ordered:
                add_evidence(self.ordered[j, k], self.spec, (STREAM,), x, y, moves=ORDERED)
            inner += sum(float((x[name] * y[name]).sum(dtype=torch.float64)) for name in apart)
        return inner


def _sum(blocks: Sequence[Slots]) -> Slots:
    """Slot by slot."""
    total = {name: t.clone() for name, t in blocks[0].items()}
    for block in blocks[1:]:
        for name, t in block.items():
            total[name] += t
    return total


def _has_stream(spec: Spec, slot: str) -> bool:
    return any(index.space == STREAM for axis in axes_of(spec, slot) for index in axis)


def _rows_moved(spec: Spec, name: str, elements: Elements, c: Tensor) -> Tensor:
    """What the elements make of the rows of a statistic (n, m), which are what was looked at in a model."""
    spaces = _SPACES[name]
    x, mine = c.reshape(*(size_of(spec, space) for space in spaces), c.shape[1]), _cast(c.dtype, elements)
    for dim, space in enumerate(spaces):
        if space in mine:
            x = mine[space].act(x, dim, spaces.index(PARENT[space]) if space in PARENT else None)
    return x.reshape(c.shape)


def _matrix(g: Element) -> Tensor:
    return dense(g).matrix


def _cast(dtype: torch.dtype, elements: Elements) -> dict[str, Element]:
    return {space: g.map(lambda t: t.to(dtype) if t.is_floating_point() else t) for space, g in elements.items()}
