"""What validation decides on the way: by which objective to learn, how fast, and when to go back.

The state that learning starts from is validated like any other and may be what is exported, so that by held-out text no
run ends worse than it began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .schedule import Schedule

VALIDATIONS = 10  # of a run, at equal distances, beside those of the trials
TRIAL = 12  # steps of each objective, at most, and at most a tenth of all
LOWERED = 0.5  # the rate, where validation rose
UNTRIED = 0.25  # the rate, where both objectives made it worse
TOLERANCE = 0.02  # of what was gained so far: less is not taken for a rise


@dataclass(frozen=True)
class Turn:
    """A decision after the validation at `step`: go on from the state of step `origin` (`step` itself: no going back).

    text: the objective's share of the text, 0 or 1; factor: of the schedule's rates.
    """

    step: int
    origin: int
    text: float
    factor: float
    why: str

    @property
    def returns(self) -> bool:
        return self.origin != self.step


def trial_steps(schedule: Schedule) -> int:
    """How long each objective is tried; 0: there is nothing to choose, or no room for it."""
    return min(TRIAL, schedule.steps // 10) if schedule.objective == "auto" else 0


def is_due(schedule: Schedule, step: int) -> bool:
    """Whether the state after so many steps is validated."""
    trial, every = trial_steps(schedule), max(1, schedule.steps // VALIDATIONS)
    if 0 < step < 2 * trial:
        return step == trial
    return step % every == 0 or step in (2 * trial, schedule.steps)


def best_of(excess: Mapping[int, float]) -> int:
    """The step of the least excess; of equals the first."""
    return min(excess, key=lambda step: (excess[step], step))


def share_of_text(schedule: Schedule, turns: Sequence[Turn], step: int) -> float:
    """The text's share of the objective of the step after `step` others."""
    made = [turn.text for turn in turns if turn.step <= step]
    return made[-1] if made else float(schedule.objective == "text" or trial_steps(schedule) > 0)


def decide(schedule: Schedule, excess: Mapping[int, float], turns: Sequence[Turn]) -> Turn | None:
    """What follows from the last validation. excess: at every validated step, the last one last; turns: of before."""
    step = max(excess)
    best, trial = best_of(excess), trial_steps(schedule)
    text, factor = share_of_text(schedule, turns, step), turns[-1].factor if turns else 1.0
    if step == 0 or step == schedule.steps:
        return None
    if trial and step == trial:
        # second, since it wins more often, and the winner of the second trial goes on without a stop
        return Turn(step, 0, 0.0, factor, "the endpoints' predictions as the objective are tried from the same state")
    if trial and step == 2 * trial:
        wins = float(excess[trial] < excess[step])  # of the text
        name = ("the endpoints' predictions", "the text")[int(wins)]
        if best == 0:
            return Turn(step, 0, wins, factor * UNTRIED, f"both objectives were worse than none; {name} less so")
        return Turn(step, best, wins, factor, f"{name} as the objective won the trial")
    gained = excess[0] - excess[best] if 0 in excess else 0.0
    if excess[step] > excess[best] + TOLERANCE * gained:
        return Turn(step, best, text, factor * LOWERED, "validation rose")
    return None
