"""How far a run is, told in every stage, and the question whether it is to go on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints import LazyBlocks, Model, Slots, Weights
from ..errors import Cancelled

Cancel = Callable[[], bool] | threading.Event
_TYPICAL_ROUNDS = 8  # of matching, as long as nothing is known
_SLOWEST, _FASTEST = 0.9, 0.3  # by what the number of changed assignments shrinks from round to round


@dataclass(frozen=True)
class Progress:
    """Handed to the `progress` callback, at the beginning of every stage and after each of its steps.

    Attributes:
        step: steps done: of learning those of the schedule, of other stages pieces of the work.
        steps: in all; while matching an estimate.
        loss: of the last step of learning, in nats; None in other stages.
        excess: of the last validation, in nats; None before it.
        tokens: read in this step.
        stage: "placing", "matching", "preparing", "learning", "measuring", "writing", "verifying", "diagnosing", of
            carry "comparing", or of heal "trying" and "healing".
        note: for people.
        eta: seconds that are left of the stage: before the first step of learning from the plan, or from what a pass
            through the models took, then from what steps took; None where nothing is known.

    >>> pair = lmc.open_pair("A", "B")
    >>> tokens = lmc.read_tokens("text.txt", pair.a, 16)
    >>> seen: list[lmc.Progress] = []
    >>> alignment = lmc.align(pair, tokens, steps=2, batch=2, progress=seen.append)
    >>> seen[-1].stage, seen[-1].step, seen[-1].steps
    ('learning', 2, 2)
    """

    step: int
    steps: int
    loss: float | None = None
    excess: float | None = None
    tokens: int = 0
    stage: str = "learning"
    note: str = ""
    eta: float | None = None


class Watch:
    """Tells `progress` how far a stage is. Raises Cancelled where `cancel`, called or a threading.Event, says so."""

    def __init__(self, progress: Callable[[Progress], None] | None = None, cancel: Cancel | None = None):
        self._progress = progress
        self._cancel = cancel.is_set if isinstance(cancel, threading.Event) else cancel
        self.stage = ""

    def begin(self, stage: str, steps: int, done: int = 0, step_seconds: float | None = None, **facts: Any) -> None:
        """step_seconds: what a step is expected to take. done: steps that an earlier run took."""
        self.stage, self._first, self._expected = stage, done, step_seconds
        self._began = time.monotonic()
        self.at(done, steps, **facts)

    def expect(self, step_seconds: float) -> None:
        """A better guess of what a step of this stage takes, before there is one."""
        self._expected = step_seconds

    def at(self, step: int, steps: int, **facts: Any) -> None:
        """facts: other fields of Progress."""
        if self._progress is not None:
            taken = step - self._first
            each = (time.monotonic() - self._began) / taken if taken else self._expected
            eta = None if each is None else each * (steps - step)
            self._progress(Progress(step, steps, stage=self.stage, eta=eta, **facts))
        if self._cancel is not None and self._cancel():
            raise Cancelled(f"cancelled while {self.stage}, at {step} of {steps}")


class Visits:
    """Counts blocks as they are visited, `total` in all, and tells a watch of each."""

    def __init__(self, watch: Watch, stage: str, total: int):
        self._watch, self._total, self._done = watch, total, 0
        watch.begin(stage, total)

    @classmethod
    def of_models(cls, watch: Watch, stage: str, *models: Model) -> Visits:
        """Of every block of all of them, once."""
        return cls(watch, stage, sum(model.spec.layers for model in models))

    def __call__(self) -> None:
        self._done += 1
        self._watch.at(min(self._done, self._total), self._total)

    def of(self, weights: Weights) -> Weights:
        """Lazy weights whose blocks are counted when they are made; others as they are."""

        def visited(_: int, block: Slots) -> Slots:
            self()
            return block

        blocks = weights.blocks
        return replace(weights, blocks=blocks.map(visited)) if isinstance(blocks, LazyBlocks) else weights


class MatchingWatch:
    """Turns what matching tells into progress: the statistics' blocks, then those of round after round."""

    def __init__(self, watch: Watch, layers: int, gathers: bool, rounds: int):
        self._watch, self._layers, self._most = watch, layers, rounds
        self._before = layers if gathers else 0
        self._changed: list[int] = []
        watch.begin("matching", self._steps)

    @property
    def _steps(self) -> int:
        return self._before + self._layers * expected_rounds(self._changed, self._most)

    def gathered(self, block: int) -> None:
        self._watch.at(block, self._steps, note="statistics of activations")

    def visited(self, done: int, block: int, changed: Sequence[tuple[int, int]]) -> None:
        """In round number `done`, before that block. changed: (changed assignments, all of them) of earlier rounds."""
        self._changed = [count for count, _ in changed]
        note = f"round {done}"
        if changed:
            note += f", {changed[-1][0]} of {changed[-1][1]} assignments changed in the one before"
        self._watch.at(self._before + (done - 1) * self._layers + block, self._steps, note=note)


def expected_rounds(changed: Sequence[int], most: int) -> int:
    """Rounds that matching may take in all, given how many assignments each changed so far: it ends with none.

    Their number shrinks by about a factor from round to round.
    """
    done = len(changed)
    if changed and not changed[-1]:
        return done
    if done < 2:
        return min(most, max(_TYPICAL_ROUNDS, done + 1))
    factor = min(_SLOWEST, max(_FASTEST, changed[-1] / max(1, changed[-2])))
    return min(most, done + 1 + math.ceil(math.log(changed[-1]) / -math.log(factor)))
