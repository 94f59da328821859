"""How an interrupted run goes on, and whether what goes on is that run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import Cancelled, LmcError
from ..examples import Data, digest
from ..interrupts import Interrupted, number_of
from ..members import member_names
from ..pair import Models


def made_from(pair: Models, tokens: Data, validation: Data | None) -> dict[str, Any]:
    """What a run was made from, told by digests."""
    return {
        "members": [model.checkpoint.identity.digests() for model in pair.members],
        "sources": [None if home is None else str(home.absolute()) for home in pair.homes],
        "data": digest(tokens),
        "validation": None if validation is None else digest(validation),
    }


def _require_same_inputs(saved: dict[str, Any], now: dict[str, Any]) -> None:
    count = len(saved["members"])
    if count != len(now["members"]):
        raise LmcError(f"cannot resume: the run began with {count} models, not {len(now['members'])}; give the same")
    names = [name.upper() for name in member_names(count)]
    if saved["members"] != now["members"] and sorted(map(str, saved["members"])) == sorted(map(str, now["members"])):
        which = "A and B" if count == 2 else "the models"
        raise LmcError(f"cannot resume: {which} have changed places; give them in the order of before")
    for name, before, after in zip(names, saved["members"], now["members"], strict=True):
        for file in sorted(before.keys() | after.keys()):
            if before.get(file) != after.get(file):
                raise LmcError(
                    f"cannot resume: {file} of {name} is not what the run began with; give the same checkpoint"
                )
    for name, option in (("data", "--data"), ("validation", "--val")):
        if saved[name] != now[name]:
            raise LmcError(
                f"cannot resume: what {option} and --length give is not what the run began with; give the same data"
            )


def require_same_run(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A resumed run must be the run that was interrupted; only learning rates may change."""
    if "members" not in saved.get("inputs", {}):
        raise LmcError("cannot resume: the state is of another version of lmc-fast; remove it and start anew")
    # the last two are taken from the saved run
    free = ("matrix_lr", "scale_lr", "inputs", "calibration_shape", "route", "strategy")
    before, after = ({**run, **run.get("schedule", {}), "schedule": None} for run in (saved, now))
    for key in (*before, *(key for key in ("base", "blocks") if key in after and key not in before)):
        value = before.get(key)
        if key not in free and after.get(key) != value:
            raise LmcError(f"cannot resume: {key} was {value}, now it is {after.get(key)}; repeat the same options")
    _require_same_inputs(saved["inputs"], now["inputs"])


@contextmanager
def telling_what_is_kept(directory: Path, state: Path) -> Iterator[None]:
    """An interruption, or what was cancelled, says how to go on where there is something to go on with."""
    try:
        yield
    except (KeyboardInterrupt, Cancelled) as error:
        if not state.exists():
            raise
        kept = f"the state is in {directory}: go on with"
        if isinstance(error, Cancelled):
            told = Cancelled(f"{error}; {kept} resume=True")
            told.alignment = error.alignment
            raise told from None
        raise Interrupted(number_of(error), f"{kept} --resume") from None
