"""Whether a run that goes on is the run that was interrupted."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from ..examples import Data, digest
from ..pair import Pair


def made_from(pair: Pair, tokens: Data, validation: Data | None) -> dict[str, Any]:
    """What a run was made from, told by digests."""
    return {
        "a": pair.a.checkpoint.identity.digests(),
        "b": pair.b.checkpoint.identity.digests(),
        "data": digest(tokens),
        "validation": None if validation is None else digest(validation),
    }


def _require_same_inputs(saved: dict[str, Any], now: dict[str, Any]) -> None:
    if (saved["a"], saved["b"]) == (now["b"], now["a"]) != (now["a"], now["b"]):
        raise LmcError("cannot resume: A and B have changed places; give them in the order of before")
    for name in "ab":
        for file in sorted(saved[name].keys() | now[name].keys()):
            if saved[name].get(file) != now[name].get(file):
                raise LmcError(
                    f"cannot resume: {file} of {name.upper()} is not what the run began with; give the same checkpoint"
                )
    for name, option in (("data", "--data"), ("validation", "--val")):
        if saved[name] != now[name]:
            raise LmcError(
                f"cannot resume: what {option} and --block give is not what the run began with; give the same data"
            )


def require_same_run(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A resumed run must be the run that was interrupted; only learning rates may change."""
    if "inputs" not in saved:
        raise LmcError("cannot resume: the state is of another version of lmc-fast; remove it and start anew")
    # the last two are taken from the saved run
    free = ("matrix_lr", "scale_lr", "inputs", "calibration_blocks", "path", "way")
    before, after = ({**run, **run.get("schedule", {}), "schedule": None} for run in (saved, now))
    for key, value in before.items():
        if key not in free and after.get(key) != value:
            raise LmcError(f"cannot resume: {key} was {value}, now it is {after.get(key)}; repeat the same options")
    _require_same_inputs(saved["inputs"], now["inputs"])
