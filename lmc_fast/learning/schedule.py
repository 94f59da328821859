"""How long, how fast and where on the line to learn."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..errors import LmcError
from ..places import Place, between, inside

if TYPE_CHECKING:
    from torch import Tensor

OBJECTIVES = ("auto", "endpoints", "text")
METHODS = {"dual": 2, "one-sided": 1}  # that learn, and how many endpoints they move
CLOSED_FORMS = ("activation", "weight")  # methods without gradients
WIDTH = 128  # of the models that matrix_lr is meant for; it falls as 1 / width
WARMUP_TOKENS = 2048
LONG = 250  # steps from which the rates are meant as they are; in fewer each step goes farther
HASTE = 4.0  # times as far, at most
AT_ONCE = 2  # places of each step between many models: steps at one place are noisier, at four take 2.6 times a pair's
EDGES = 12  # between many models, one place of so many is on an edge
_GOLDEN = (math.sqrt(5) - 1) / 2
_PLASTIC = 0.7548776662466927  # apart from the golden ratio, which lambda follows
_SEEDS = 1 << 32
_MOST_STEPS = 10_000_000
_FASTEST = 100.0  # radians, or e-folds, in one step: more is a slip of the pen, and overflows


@dataclass(frozen=True)
class Schedule:
    """How to learn. benchmarks/learning.py measures the defaults against their neighbours.

    Attributes:
        steps: in all; 0: matching alone.
        batch: sequences (or images) per step.
        sides: 2: both endpoints move, 1: B alone; None: as the method says.
        low: lambda is drawn from [low, high].
        high: see low.
        objective: "endpoints", "text", or "auto": what a trial of both finds better, see learning.steering.
        matrix_lr: of rotations and head maps: radians per step up to a width of 128, less beyond. Runs of fewer than
            250 steps take this and scale_lr times `haste`.
        scale_lr: of scales and RoPE angles (Adam).
        warmup: steps of 2048 tokens each until the rate is full; with fewer tokens a step, more steps.
        final: the last learning rate, as a share of the first.
        seed: of the order of the data and of lambda.

    Raises:
        LmcError: a field makes no sense.

    >>> lmc.Schedule(steps=300).batch
    16
    >>> lmc.Schedule(low=0.7, high=0.6)
    Traceback (most recent call last):
    lmc_fast.errors.LmcError: lambda is drawn from low to high, with 0 <= low <= high <= 1; 0.7 to 0.6 is no such range
    """

    steps: int = 1200
    batch: int = 16
    sides: int | None = None
    low: float = 0.35
    high: float = 0.65
    objective: str = "auto"
    matrix_lr: float = 0.035
    scale_lr: float = 1e-2
    warmup: int = 10
    final: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("warmup", 0), ("seed", 0)):
            self._set_integer(name, least)
        for name in ("low", "high", "matrix_lr", "scale_lr", "final"):
            self._set_number(name)
        if self.steps > _MOST_STEPS:
            raise LmcError(f"steps must be at most {_MOST_STEPS:,}, not {self.steps}; nobody has so long")
        if self.seed >= _SEEDS:
            raise LmcError(f"seed must be less than {_SEEDS}, not {self.seed}")
        if self.sides is not None:
            self._set_integer("sides", 1)
            if self.sides > 2:
                raise LmcError(f"sides must be 1 (only B moves) or 2 (both endpoints move), not {self.sides}")
        if not 0 <= self.low <= self.high <= 1:
            raise LmcError(
                f"lambda is drawn from low to high, with 0 <= low <= high <= 1; {self.low:g} to {self.high:g} is no "
                "such range"
            )
        if self.objective not in OBJECTIVES:
            raise LmcError(f"objective {self.objective!r} is unknown; choose {' or '.join(OBJECTIVES)}")
        for name in ("matrix_lr", "scale_lr"):
            if not 0 <= getattr(self, name) <= _FASTEST:
                raise LmcError(f"{name} must lie between 0 and {_FASTEST:g}, but is {getattr(self, name):g}")
        if not 0 <= self.final <= 1:
            raise LmcError(f"final is a share of the first learning rate, from 0 to 1, not {self.final:g}")

    def _set_integer(self, name: str, least: int) -> None:
        """NumPy's integers are taken, and kept as what JSON can say."""
        value = getattr(self, name)
        try:
            number = operator.index(value)
        except TypeError:
            number = least - 1
        if number < least or isinstance(value, bool):
            raise LmcError(f"{name} must be a whole number of at least {least}, not {value!r}")
        object.__setattr__(self, name, number)

    def _set_number(self, name: str) -> None:
        value = getattr(self, name)
        try:
            number = math.nan if isinstance(value, str | bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise LmcError(f"{name} must be a finite number, not {value!r}")
        object.__setattr__(self, name, number)

    @staticmethod
    def of(method: str, schedule: Schedule | None, options: Mapping[str, Any]) -> Schedule:
        """The schedule of a run, whose sides are those of the method.

        Args:
            method: "dual" or "one-sided"; of others sides stay as given.
            schedule: taken as it is; None: made of `options`.
            options: fields of a schedule, by name.

        Returns:
            The schedule.

        Raises:
            LmcError: an option is no field, options are given beside a schedule, or sides contradict the method.
        """
        known = [f.name for f in fields(Schedule)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"a schedule has {', '.join(known)}"
                raise LmcError(f"option {name} is unknown; {hint}")
        if schedule is not None and options:
            raise LmcError(f"{', '.join(options)} and a schedule are both given; put everything into the schedule")
        if not isinstance(schedule, Schedule | None):
            raise LmcError(f"schedule must be a Schedule, not {schedule!r}")
        found = Schedule(**options) if schedule is None else schedule
        sides = METHODS.get(method, found.sides)
        if found.sides not in (None, sides):
            raise LmcError(
                f"method {method} moves {_endpoints(sides)}, but the schedule has sides={found.sides}; leave sides out"
            )
        return replace(found, sides=sides)

    @property
    def moving(self) -> int:
        """How many endpoints move."""
        return self.sides or METHODS["dual"]

    @property
    def teachers(self) -> int:
        """How many models predict each sequence beside the line's, at most."""
        return 0 if self.objective == "text" else 1

    def teachers_of(self, turn: int, shares: Sequence[float], count: int | None = None) -> Tensor:
        """Which member predicts each sequence: each as many as its share says.

        The divergence from a mixture is, up to a constant, the mixture of the divergences from its parts. What is left
        of a share after whole sequences falls to chance, evenly over the turns. Sequences are in no order, see `rows`.

        Args:
            turn: number of the step, or of the place where a step visits several.
            shares: of each member at that place; they sum to 1.
            count: how many sequences; None: the batch.

        Returns:
            (count,) int64, ascending.
        """
        import torch

        count = count or self.batch
        chance = (turn + self.seed) * _PLASTIC % 1
        places = (torch.arange(count, dtype=torch.float64) + chance) / count
        edges = torch.tensor(list(shares), dtype=torch.float64).cumsum(0)[:-1]
        return torch.bucketize(places, edges, right=True)

    def at_once(self, members: int) -> int:
        """How many places a step visits, each with an equal part of its sequences.

        Args:
            members: how many models.

        Returns:
            A number of places.
        """
        return 1 if members == 2 else min(AT_ONCE, self.batch)

    def warmup_steps(self, tokens: int = WARMUP_TOKENS) -> int:
        """Steps until the rate is full, at most a tenth of all.

        Args:
            tokens: read in a step.

        Returns:
            A number of steps.
        """
        return min(math.ceil(self.warmup * WARMUP_TOKENS / tokens), max(1, self.steps // 10))

    @property
    def haste(self) -> float:
        """By what a run multiplies its rates: short ones, of Muon's steps of one size, would not come far otherwise."""
        return min(HASTE, math.sqrt(max(1.0, LONG / max(1, self.steps))))

    def rate(self, step: int, tokens: int = WARMUP_TOKENS, since: int = 0) -> float:
        """The learning rate's course: cosine, after linear warm-up at the start and at `since`.

        Args:
            step: its number.
            tokens: read in a step.
            since: the step at which the run last went back to an earlier state.

        Returns:
            A share of the full rate.
        """
        warmup = self.warmup_steps(tokens)
        warm = min(1.0, (step - since + 1) / warmup) if warmup else 1.0
        progress = max(0, step - warmup) / max(1, self.steps - warmup)
        return warm * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)

    def matrix_rate(self, width: int) -> float:
        """How fast matrices turn.

        Args:
            width: of the models.

        Returns:
            Radians per step.
        """
        return self.matrix_lr * min(1.0, WIDTH / width)

    def lam(self, step: int) -> float:
        """Lambda of a step: a golden-ratio sequence, which covers [low, high] evenly at every length.

        Args:
            step: its number.

        Returns:
            Lambda.
        """
        return self.low + (self.high - self.low) * ((0.5 + (step + self.seed) * _GOLDEN) % 1)

    def place(self, number: int, members: int) -> Place:
        """A place to learn at; of more than two members around the centroid, and every EDGES-th time on an edge.

        Around the centroid alone, edges would stay high; the more edges, the higher the centroid (docs/facts.md).

        Args:
            number: of the places visited before.
            members: how many models.

        Returns:
            Lambda of a pair; of more members their shares.
        """
        if members == 2:
            return self.lam(number)
        turn, rest = divmod(number, EDGES)
        if rest == EDGES - 1:
            edges = list(combinations(range(members), 2))
            return between(*edges[(turn + self.seed) % len(edges)], self.lam(turn), members)
        shares = inside(number - turn + self.seed, members)
        return tuple(1 / members + (self.high - self.low) * (share - 1 / members) for share in shares)

    def elements(self, members: int) -> int:
        """How many elements are learned: one for each member, or for each but the first.

        Args:
            members: how many models.

        Returns:
            A number of elements.
        """
        return members if self.moving == METHODS["dual"] else members - 1

    def rows(self, step: int, count: int) -> Tensor:
        """Which sequences a step reads: every epoch a new permutation, determined by seed and step.

        Args:
            step: its number.
            count: of sequences there are.

        Returns:
            (batch,) int64.
        """
        import torch  # here: the command shows its options without it

        wanted = range(step * self.batch, (step + 1) * self.batch)
        orders = {}
        for epoch in range(wanted[0] // count, wanted[-1] // count + 1):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(count, generator=generator)
        return torch.stack([orders[i // count][i % count] for i in wanted])


def _endpoints(sides: int | None) -> str:
    return "B alone" if sides == 1 else "both endpoints"
