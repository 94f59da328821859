"""More steps after a finished run."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from ..alignment import Alignment, require_alignment
from ..data import Given
from ..errors import LmcError
from ..learning.learner import History
from ..learning.schedule import METHODS, Schedule
from ..pair import Models
from .align import align


def extend(pair: Models, tokens: Given, alignment: Alignment, steps: int, **how: Any) -> Alignment:
    """Goes on with what a finished run learned, for so many further steps.

    The elements go on from where they are; the first validation is of them, so that the result is no worse on it. The
    schedule is a new one, with the rates, objective and all else of the run that ended: warm-up and fall of the
    learning rate come again, since that run's rate had fallen to almost nothing, and momenta start at zero. So this is
    not the same as a longer run. Data comes in another order (the next seed).

    Args:
        pair: the models that were aligned, in order.
        tokens: calibration data, as for `align`.
        alignment: what that run found.
        steps: how many more.
        **how: further arguments of `align`; method, schedule and base are those of the run.

    Returns:
        The alignment, with the history of both; `matched` stays what the first run began with.

    Raises:
        LmcError: as `align` does; nothing was learned before.
        Cancelled: `cancel` says so.

    >>> pair = lmc.open_pair("A", "B")
    >>> tokens = lmc.read_tokens("text.txt", pair.a, 16)
    >>> first = lmc.align(pair, tokens, steps=2, batch=2)
    >>> len(lmc.extend(pair, tokens, first, 3).info["history"]["loss"])
    5
    """
    require_alignment(alignment)
    before = alignment.info
    if "history" not in before or before.get("method") not in METHODS:
        raise LmcError("nothing was learned in this alignment that could be extended; give it to align as `base`")
    for name in ("method", "schedule", "base"):
        if name in how:
            raise LmcError(f"{name} is that of the run that is extended; to choose another, give align a `base`")
    last = Schedule(**before["schedule"])
    schedule = replace(last, steps=steps, objective=before.get("objective", last.objective), seed=last.seed + 1)
    how = {"activations": before["activations"]} | how
    found = align(pair, tokens, method=before["method"], schedule=schedule, base=alignment, **how)
    if "history" not in found.info:
        return alignment
    first, second = History(**before["history"]), History(**found.info["history"])
    done = len(first.loss)
    turns = [replace(turn, step=turn.step + done, origin=turn.origin + done) for turn in second.turns]
    excess = first.excess | {step + done: value for step, value in second.excess.items()}
    history = History(first.loss + second.loss, excess, first.turns + turns)
    more = found.info["exported_step"]
    info = found.info | {
        "history": asdict(history),
        "exported_step": done + more if more else before.get("exported_step", done),
        "extended": [*before.get("extended", []), {"after": done, "steps": steps, "seed": schedule.seed}],
        "notes": list(dict.fromkeys([*before.get("notes", []), *found.info.get("notes", [])])),
    }
    return Alignment(*found.members, matched=alignment.matched, info=info)
