"""Where a run keeps its state until it is finished: OUT.partial, of which `result` becomes OUT by one rename."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..checkpoints import checkpoint_names
from ..errors import LmcError
from ..matching.activations import STATISTICS_NAMES
from ..members import MOST_MEMBERS
from ..output import (
    Names,
    Workspace,
    partial_of,
    remove_own,
    require_apart,
    user_path,
    was_published,
    workspace_names,
)
from ..pair import Models
from ..streaming.store import STORE_NAMES

STORE = "store"  # the models prepared for learning within a budget
STATISTICS = "statistics"  # of activations, block by block
_STATE = "state.safetensors"
_ALIGNMENT = "alignment.safetensors"
_REPORT = ("report.json", "report.html", "curve.png", "learning.png")


def export_names(models: Models) -> dict[str, Names | None]:
    """What an export writes."""
    written = {name: checkpoint_names(path) for name, path in zip(models.names, models.homes, strict=True)}
    return written | _files(_ALIGNMENT)


def _files(*names: str) -> dict[str, Names | None]:
    """Files, each with the workspace in which it is made."""
    found: dict[str, Names | None] = dict.fromkeys(names)
    for name in names:
        found |= workspace_names(name, None)
    return found


def state_file_of(target: str | Path) -> Path:
    """Where the run that makes `target` keeps its state."""
    return partial_of(user_path(target)) / _STATE


class RunDirectory(Workspace):
    """Context manager around OUT.partial. One process at a time; state survives a kill; OUT appears only when complete.

    inputs: files and directories that the run reads. Raises LmcError if OUT is not free, an input lies in the way,
    another run holds OUT.partial, it is not ours, or an unfinished run is there and `resume` is false.
    """

    def __init__(self, target: str | Path, resume: bool = False, inputs: Iterable[str | Path | None] = ()):
        target = user_path(target)
        self.state_file = state_file_of(target)
        self.finished = resume and was_published(target)  # all but the removal of leftovers was done
        require_apart((target, partial_of(target)), inputs)
        levels = [f"state-{k}.safetensors" for k in range(MOST_MEMBERS)]  # of alignments of averages
        more = _files(_STATE, *levels) | {STORE: STORE_NAMES} | workspace_names(STORE, STORE_NAMES)
        more |= workspace_names(STATISTICS, STATISTICS_NAMES)
        super().__init__(target, _files(*_REPORT), more, () if self.finished else (_STATE, STORE, *levels), resume)
        if self.finished:
            return
        self.require_free()
        if resume and not self.path.exists():
            raise LmcError(f"nothing to resume: there is no {self.path}; start without --resume")

    def kept_bytes(self) -> int:
        """What an unfinished run has on the disk already."""
        kept = (self.state_file, *(self.path / STORE).glob("*"))
        return sum(file.stat().st_size for file in kept if file.is_file())

    def drop_store(self) -> None:
        """What was prepared is not needed any more: room for what comes next."""
        remove_own(self.path / STORE, STORE_NAMES)
