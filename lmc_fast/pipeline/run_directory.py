"""Where a run keeps its state until it is finished: OUT.partial, which becomes OUT by one rename."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from types import TracebackType

from ..checkpoints import check_target, disk_errors, publish
from ..errors import LmcError

STORE = "store"  # the pair prepared for learning within a budget
_LOCK = "lock"
_STATE = "state.safetensors"
_KEPT = (_LOCK, _STATE, STORE)


class RunDirectory:
    """Context manager around OUT.partial. One process at a time; state survives a kill; OUT appears only when complete.

    Raises LmcError if OUT is not free, another run holds it, or an unfinished run is there and `resume` is false.
    """

    def __init__(self, target: str | Path, resume: bool = False):
        self.target = Path(target)
        self.path = self.target.with_name(self.target.name + ".partial")
        self.state_file = self.path / _STATE
        check_target(self.target)
        if resume and not self.path.exists():
            raise LmcError(f"nothing to resume: there is no {self.path}; start without --resume")
        if self.state_file.exists() and not resume:
            raise LmcError(f"{self.path} holds an unfinished run; continue it with --resume, or remove it")

    def __enter__(self) -> RunDirectory:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / _LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise LmcError(f"another run is writing {self.target}; wait for it or choose another --out") from None
        self._clean()
        return self

    def drop_store(self) -> None:
        """The prepared pair is not needed any more: room for what comes next."""
        shutil.rmtree(self.path / STORE, ignore_errors=True)

    def publish(self) -> None:
        """Everything is written: take the target's name, drop the state."""
        self.drop_store()
        with disk_errors(self.target):
            publish(self.path, self.target)
            for name in (_STATE, _LOCK):
                (self.target / name).unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.exists():
            self._clean()
            if not self.state_file.exists():
                shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _clean(self) -> None:
        """Removes half-written output, keeps the state."""
        for entry in self.path.iterdir():
            if entry.name not in _KEPT:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
