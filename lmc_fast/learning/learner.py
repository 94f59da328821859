"""Learned matching: descend the loss along the straight line, in coordinates of the symmetry group.

Only the relative transform g_A⁻¹ g_B enters the forward pass, on B's side, because every g preserves the function for
every weight setting: f((1-λ) g_A θ_A + λ g_B θ_B) = f((1-λ) θ_A + λ g_A⁻¹ g_B θ_B).

Two objectives: the divergence from the endpoints' own predictions, (1-λ) p_A + λ p_B, which has less noise and does not
ask for what the endpoints merely memorised (docs/facts.md), and the cross entropy with the text, which is better where
an average already beats both endpoints. `steering` chooses by held-out text. Each sequence has one endpoint for a
teacher, as many as its share says, which costs half of what both do and has the same mean gradient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from ..engine.evaluate import line_scores
from ..engine.head import CHUNK_ELEMENTS, accurate
from ..engine.passes import Item, choose_route
from ..engine.source import Source
from ..errors import LmcError
from ..examples import Data
from ..interrupts import uninterrupted
from ..places import Place, between, centroid, corner, shares_of, spread
from ..symmetry.charts import Chart
from . import parallel
from .muon import muon_step
from .schedule import Schedule
from .steering import Turn, best_of, decide, share_of_text
from .step import learn

_log = logging.getLogger("lmc_fast")
_MATRICES = ("rotation", "vo", "qk")  # moved by Muon; what else a chart has, by Adam
_MOMENTS = ("exp_avg", "exp_avg_sq")


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient became NaN or infinite; nothing was updated with it."""


@dataclass
class History:
    """What happened: one loss per step, validation excesses (mean over VALIDATION_POINTS) at some steps, and what was
    decided then."""

    loss: list[float] = field(default_factory=list)
    excess: dict[int, float] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        """JSON has no integer keys and no classes."""
        self.excess = {int(step): value for step, value in self.excess.items()}
        self.turns = [turn if isinstance(turn, Turn) else Turn(**turn) for turn in self.turns]

    @property
    def exported(self) -> int:
        """The step whose state is the result."""
        return best_of(self.excess) if self.excess else len(self.loss)

    @property
    def since(self) -> int:
        """The step at which the run last went back to an earlier state."""
        return max((turn.step for turn in self.turns if turn.returns), default=0)

    @property
    def factor(self) -> float:
        """Of the schedule's rates."""
        return self.turns[-1].factor if self.turns else 1.0


def _like(t: Tensor, found: Tensor) -> Tensor:
    """`found`, which copying would broadcast or cast without a word. Raises ValueError unless it is as `t`."""
    if (found.shape, found.dtype) != (t.shape, t.dtype):
        raise ValueError(f"{found.dtype} of shape {tuple(found.shape)}, not {t.dtype} of shape {tuple(t.shape)}")
    return found


@contextmanager
def _overflow(step: int) -> Iterator[None]:
    """What solvers and losses say of coordinates that grew beyond all numbers."""
    try:
        yield
    except (LmcError, ValueError, ArithmeticError, torch.linalg.LinAlgError) as error:
        raise NonFiniteLoss(f"after step {step}, {error}") from error


VALIDATION_POINTS = (0.25, 0.5, 0.75)


def validation_places(members: int, groups: Sequence[int] | None = None) -> list[Place]:
    """Where validation measures, ascending: three points of a line; of more members the centroid and every middle.

    groups: whose averages are brought together: three points of the line between these.
    """
    if groups and len(set(groups)) < members:
        return sorted((spread(lam, groups) for lam in VALIDATION_POINTS), key=_ascending)
    if members == 2:
        return list(VALIDATION_POINTS)
    middles: list[Place] = [between(i, j, 0.5, members) for i, j in combinations(range(members), 2)]
    return sorted([centroid(members), *middles], key=_ascending)


def _ascending(place: Place) -> tuple[float, ...]:
    return shares_of(place)[1:]


@dataclass(frozen=True)
class Chunking:
    """How much of a step is held at a time: what a memory budget decides."""

    micro_batch: int  # of a step's sequences, through a block of the models
    keep: bool = True  # every block's graph until backward, instead of computing it again
    logits: int = CHUNK_ELEMENTS
    offload: bool = False  # boundary activations to main memory
    rows: int | None = None  # of validation data whose streams are held; see line_scores


class Learner:
    """Descends in the chart's coordinates; one call of `step` is one λ, one batch, one update.

    source: canonical endpoints, b already matched; frozen. tokens (n, T) int64, or examples. chunking: how much is held
    at a time. route: see engine.step.learn; chosen once, so that a resumed run computes the same bits. blocks: whose
    own elements are learned, by default all. groups: the number of each model's group, where averages of groups are
    brought together; by default each is alone. Under torchrun every process takes its share of each batch, and
    gradients are averaged over all predictions. Everything random follows from schedule.seed and the step's number, so
    that a restored learner goes on as if it had never stopped.
    """

    def __init__(
        self,
        source: Source,
        tokens: Data,
        schedule: Schedule,
        chunking: Chunking | None = None,
        route: str | None = None,
        blocks: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ):
        self.source, self.tokens, self.schedule = source, tokens, schedule
        self.groups = tuple(range(len(source.ends)) if groups is None else groups)
        self.chunking = chunking or Chunking(schedule.batch)
        if route is None:
            choice = choose_route(source, self._items(0), self.chunking.keep)
            route = choice.route
            _log.info("interpolated layers by route %s: %s", *choice)
        self.route = route
        sample = source.sample
        self.chart = self._chart(accurate(sample.dtype), sample.device)
        self.history = History()
        frozen = [] if blocks is None else [i for i in range(source.spec.layers) if i not in blocks]
        self._frozen = torch.tensor(frozen, dtype=torch.int64, device=sample.device)
        self.best: dict[str, Tensor] | None = None
        self._whole = True  # no update is half done
        self.before_update: Callable[[], None] | None = None  # called when a step's gradients are known to be finite
        leaves = self.chart.tensors
        self._momentum = {name: torch.zeros_like(leaves[name]) for name in _MATRICES if name in leaves}
        rest = [t for name, t in leaves.items() if name not in _MATRICES]
        self._adam = torch.optim.Adam(rest, betas=(0.9, 0.99), foreach=True) if rest else None

    @property
    def members(self) -> int:
        """How many models there are."""
        return len(self.source.ends)

    def _chart(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Chart:
        sides = self.schedule.elements(self.members)
        return Chart(self.source.spec, sides, dtype, device, members=self.members)

    def places(self, step: int) -> list[Place]:
        """Where a step learns."""
        count = self.schedule.at_once(self.members)
        numbers = range(step * count, (step + 1) * count)
        if len(set(self.groups)) < self.members:
            return [spread(self.schedule.lam(number), self.groups) for number in numbers]
        return [self.schedule.place(number, self.members) for number in numbers]

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.history.loss)

    def step(self) -> float:
        """Takes one step and returns its loss in nats per token.

        Raises NonFiniteLoss and changes nothing, unless the update itself fails: then the learner is not `sound`.
        """
        i = self.done
        with _overflow(i):
            loss, gradients = self.gradients()
        if not all(t.isfinite().all() for t in (loss, *gradients.values())):
            at = ", ".join(f"shares {p}" if isinstance(p, tuple) else f"lambda {p:.2f}" for p in self.places(i))
            raise NonFiniteLoss(f"the loss became {loss.item()} at step {i + 1} ({at})")
        if self.before_update:
            self.before_update()
        with uninterrupted():
            self._whole = False
            with _overflow(i):
                self._update(gradients, self._rate(i))
            self.history.loss.append(loss.item())
            self._whole = True
        return self.history.loss[-1]

    @property
    def sound(self) -> bool:
        """Whether it can go on from here: no update was broken off, and none left NaN or infinity."""
        return self._whole and all(bool(t.isfinite().all()) for t in self.state().values())

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the coming step, and its gradients by the chart's tensors."""
        items = self._items(self.done)
        chunking = self.chunking
        loss, found = learn(
            self.source,
            items,
            self.chart,
            divergence=not self.text,
            keep=chunking.keep,
            route=self.route,
            logits=chunking.logits,
            offload=chunking.offload,
        )
        count = sum(item.count for item in items)
        return parallel.mean(loss, found, count)

    @property
    def text(self) -> float:
        """The text's share of the objective now."""
        return share_of_text(self.schedule, self.history.turns, self.done)

    def _rate(self, step: int) -> float:
        rate = self.schedule.rate(step, self.schedule.batch * self.tokens.shape[1], self.history.since)
        return rate * self.schedule.haste * self.history.factor

    def _items(self, step: int) -> list[Item]:
        """This process's share of a step, in micro-batches."""
        size = self.chunking.micro_batch
        rows = parallel.share(self.schedule.rows(step, len(self.tokens)))
        batch = self.tokens[rows.to(self.tokens.device)]
        places, count = self.places(step), self.schedule.batch
        cuts = [count * k // len(places) for k in range(len(places) + 1)]
        taught = [
            self.schedule.teachers_of(step * len(places) + k, shares_of(place), cuts[k + 1] - cuts[k])
            for k, place in enumerate(places)
        ]
        at = torch.arange(len(places)).repeat_interleave(torch.tensor(cuts).diff())
        parts = zip(batch.split(size), *(parallel.share(x).split(size) for x in (at, torch.cat(taught))), strict=True)
        items = []
        for part, where, teachers in parts:
            for k in where.unique().tolist():
                own = (where == k).nonzero().flatten()
                counts = teachers[own].bincount(minlength=self.members).tolist()
                items.append(Item(part[own.to(part.device)], places[k], tuple(counts)))
        return items

    def _update(self, gradients: dict[str, Tensor], rate: float) -> None:
        if len(self._frozen):
            gradients = {n: g if n == "rotation" else g.index_fill(1, self._frozen, 0) for n, g in gradients.items()}
        for name, momentum in self._momentum.items():
            gradient = gradients[name]
            if name == "rotation":  # only the skew part of the leaf acts
                gradient = (gradient - gradient.mT) / 2
            matrix_rate = rate * self.schedule.matrix_rate(self.source.spec.width)
            muon_step(self.chart.tensors[name], gradient, momentum, matrix_rate)
        if self._adam:
            for name, gradient in gradients.items():
                self.chart.tensors[name].grad = None if name in _MATRICES else gradient
            self._adam.param_groups[0]["lr"] = rate * self.schedule.scale_lr
            self._adam.step()
        self.chart.clamp_()

    def losses(self, tokens: Data, points: Sequence[Place], chart: Chart | None = None) -> list[float]:
        """At ascending places of the line, on other tokens."""
        batch, rows, logits = self.chunking.micro_batch, self.chunking.rows, self.chunking.logits
        scores = line_scores(self.source, tokens, points, chart, batch, rows=rows, logits=logits)
        return [score.loss for score in scores]

    def corner_losses(self, tokens: Data) -> list[float]:
        """Of every member itself, in their order."""
        corners = [corner(k, self.members) for k in range(self.members)]
        ascending = sorted(corners, key=_ascending)
        found = dict(zip(ascending, self.losses(tokens, ascending), strict=True))
        return [found[place] for place in corners]

    def validate(self, tokens: Data, ends: Sequence[float]) -> float:
        """Mean excess over the same averages of the members' losses `ends`.

        Remembers the best chart, and decides how to go on; see steering.
        """
        places = validation_places(self.members, self.groups)
        with _overflow(self.done):
            losses = self.losses(tokens, places, self.chart)
        line = [sum(s * end for s, end in zip(shares_of(p), ends, strict=True)) for p in places]
        excess = parallel.first(sum(x - y for x, y in zip(losses, line, strict=True)) / len(line))
        with uninterrupted():
            if excess < min(self.history.excess.values(), default=math.inf):
                self.best = {name: t.detach().clone() for name, t in self.chart.tensors.items()}
            self.history.excess[self.done] = excess
            turn = decide(self.schedule, self.history.excess, self.history.turns)
            if turn:
                self._take(turn)
        return excess

    def _take(self, turn: Turn) -> None:
        """Goes on as was decided; from an earlier state with the optimiser as at the start."""
        if turn.returns:
            for name, t in self.chart.tensors.items():
                if turn.origin and self.best:  # the best state so far
                    t.data.copy_(self.best[name])
                else:
                    t.data.zero_()
            for momentum in self._momentum.values():
                momentum.zero_()
            if self._adam:
                self._adam.state.clear()
        self.history.turns.append(turn)
        _log.info("step %d: %s; on from step %d at %.2g of the rate", turn.step, turn.why, turn.origin, turn.factor)

    def final_chart(self) -> Chart:
        """The best validated coordinates where there was validation, else the last ones; in float64."""
        tensors = self.best or self.chart.tensors
        chart = self._chart(torch.float64)
        for name, t in chart.tensors.items():
            t.data.copy_(tensors[name].detach())
        return chart

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs besides the history."""
        out = {f"chart.{name}": t.detach() for name, t in self.chart.tensors.items()}
        out |= {f"best.{name}": t for name, t in (self.best or {}).items()}
        out |= {f"momentum.{name}": t for name, t in self._momentum.items()}
        if self._adam:
            for name, t in self.chart.tensors.items():
                if t in self._adam.state:
                    out |= {f"adam.{key}.{name}": self._adam.state[t][key] for key in _MOMENTS}
        return out

    def restore(self, state: dict[str, Tensor], history: History) -> None:
        """Puts a `state()` back."""
        self.history = history
        for name, t in self.chart.tensors.items():
            t.data.copy_(_like(t, state[f"chart.{name}"]))
            if name in self._momentum:
                self._momentum[name].copy_(_like(t, state[f"momentum.{name}"]))
            if self._adam and f"adam.exp_avg.{name}" in state:
                moments = {key: _like(t, state[f"adam.{key}.{name}"]).to(t.device, copy=True) for key in _MOMENTS}
                self._adam.state[t] = {"step": torch.tensor(float(self.done - history.since)), **moments}
        best = {
            name: _like(t, state[f"best.{name}"]).to(t.device)
            for name, t in self.chart.tensors.items()
            if f"best.{name}" in state
        }
        self.best = best or None
