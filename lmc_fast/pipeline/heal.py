"""Distillation of a merged model from its endpoints, beside what the same steps make of an endpoint itself."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..budget.devices import device_errors, require_device
from ..checkpoints import Model, Weights, checkpoint_names
from ..checkpoints import export as export_weights
from ..checkpoints.tensor_file import require_writable
from ..data import Given, as_data, split_validation
from ..engine.model import require_task
from ..errors import Cancelled, LmcError
from ..examples import Data, digest, inputs_of
from ..files import to_json
from ..interrupts import uninterrupted
from ..learning.healing import RATE, Healer, healing_bytes, loss_of, with_tensors
from ..learning.schedule import Schedule
from ..learning.steering import best_of
from ..members import listed
from ..output import Workspace, partial_of, require_apart, user_path, workspace_names, write_whole
from ..pair import Models, models_of
from ..sizes import show_bytes
from ..symmetry.checksum import understood
from ..symmetry.storage import load_tensors, save_tensors
from .export import require_unchanged
from .held_out import evenly
from .progress import Cancel, Progress, Watch
from .resume import telling_what_is_kept
from .room import endpoint_bytes, largest_file, require_room

AVERAGE = "average"  # the name of the merged model among the starts
TRIALS = 10  # a trial takes the steps divided by this
VALIDATIONS = 10
SAVE_SECONDS, SAVE_SHARE = 30.0, 20
_STATE, _REPORT = "state.safetensors", "report.json"
_TOKENS = 512  # through the models at a time
_log = logging.getLogger("lmc_fast")


def heal(
    merged: str | Path,
    endpoints: Sequence[str | Path],
    data: Given | Mapping[str, Given],
    out: str | Path,
    *,
    steps: int = 200,
    batch: int = 16,
    start: str = "auto",
    rate: float = RATE,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Trains all weights of one model towards what the endpoints predict, and writes the best validated state, the one
    before the first step included. Everything is held in float32: the model five times, and each endpoint.

    Args:
        merged: the merged model: a checkpoint directory or a hub id.
        endpoints: 2 to 26 models that were merged, aligned.
        data: as for `align`: what all endpoints predict together (the mean of their probabilities); or {"a": ..., "b":
            ...}: what each predicts of its own. A part is held out.
        out: the directory to create.
        steps: of gradient descent, at least 1.
        batch: inputs in a step.
        start: what is trained: "average" is `merged`, "a", "b", ... the endpoints; "auto" tries all of them for a tenth
            of the steps each and takes the one with the least held-out loss: an endpoint is often as good, and
            sometimes better.
        rate: of AdamW for models of width 128 and narrower ones, less beyond; above 0, at most 1, by default 0.001.
        seed: of the order of the data.
        dtype: of the weights that are written; None: the start's own.
        device: where to compute.
        resume: go on with the unfinished run that out.partial holds, to the same bits.
        progress: called in every stage, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.

    Returns:
        The report: held-out losses in nats of the start, of each validation and of the controls, and what was written.

    Raises:
        LmcError: an argument makes no sense, models do not match, `out` exists and is not empty, or a loss is not
            finite.
        Cancelled: `cancel` says so; the state is kept in out.partial.

    >>> tokens = lmc.read_tokens("text.txt", lmc.Model("A"), 16)
    >>> report = lmc.heal("DIR/merged", ["DIR/a", "DIR/b"], tokens, "HEALED", steps=2, batch=2, start="average")
    >>> report["start"]
    'average'
    """
    if isinstance(endpoints, str) or not isinstance(endpoints, Sequence):
        raise LmcError(f"endpoints are given in a list, not as {endpoints!r}")
    require_writable(dtype)
    names = [AVERAGE, *(chr(ord("a") + k) for k in range(len(endpoints)))]
    if len(endpoints) < 2 or len(endpoints) > 26:
        raise LmcError(f"a mixture has 2 to 26 endpoints, not {len(endpoints)}; give those that were merged")
    if start not in (*names, "auto"):
        raise LmcError(f"start {start!r} is unknown; choose one of {', '.join(names)} or auto")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise LmcError(f"rate must be a number above 0 and at most 1, not {rate!r}")
    schedule = Schedule(steps=steps, batch=batch, seed=seed)
    if not steps:
        raise LmcError("healing takes steps; give at least one")
    device, target = require_device(device), user_path(out)
    require_apart((target, partial_of(target)), (merged, *endpoints))
    models = models_of([Model(place) for place in (merged, *endpoints)], repeated=True)
    require_task(models.spec)
    given = data if isinstance(data, Mapping) else {"": data}
    wrong = [name for name in given if name and name not in names[1:]]
    if wrong or not given:
        raise LmcError(f"data of {wrong[0] if wrong else 'nothing'!r}; the endpoints are {', '.join(names[1:])}")
    unsaid = [name for name in names[1:] if name not in given and "" not in given]
    if unsaid:
        raise LmcError(
            f"there is no data for {listed(unsaid)}: every endpoint teaches on data of its own, or all on one"
        )
    sources = {name: as_data(x, models.a) for name, x in given.items()}
    job = _Job(models, names, sources, schedule, rate, device, Watch(progress, cancel))
    run = {"steps": steps, "batch": batch, "seed": seed, "rate": rate, "start": start, "inputs": job.digests}
    held = healing_bytes(endpoint_bytes(models.a, torch.float32) // 4, len(endpoints))
    _log.info("healing holds about %s of weights, beside the work itself", show_bytes(held))
    work = _Directory(target, models, run, resume)
    work.require_room(models, dtype)
    with device_errors(), work, telling_what_is_kept(work.path, work.state_file):
        saved, before = work.saved()
        controls = job.controls()
        trials: dict[str, float] = dict(before.get("trials", {}))
        chosen = start
        if start == "auto":
            for name in (name for name in names if name not in trials):
                trials[name] = job.trial(name)
                work.save({}, {"trials": trials})
            chosen = min(trials, key=lambda name: trials[name])
            _log.info("held-out loss after the trials: %s", ", ".join(f"{n} {x:.4f}" for n, x in trials.items()))
        history, weights = job.learn(chosen, saved, before, partial(work.save_learned, trials))
        best = best_of(history)
        report: dict[str, Any] = {**run, "started_from": chosen, "trials": trials, "written_step": best}
        report |= {"losses": history, "loss_after": history[best], "controls": controls}
        model = models.members[names.index(chosen)]
        export_weights(weights, model, work.result, dtype)
        read = job.loss_of(Model(work.result).load(torch.float32, device))
        _require_same(read, history[best], dtype or model.dtype)
        write_whole(work.result / _REPORT, to_json(report, indent=2) + "\n")
        require_unchanged(models)
        with uninterrupted():
            work.publish()
    return report


def _require_same(read: float, expected: float, dtype: torch.dtype) -> None:
    """The file says what was learned. Raises LmcError."""
    if abs(read - expected) > (1e-3 if dtype.itemsize >= 4 else 0.1):
        raise LmcError(
            f"the healed model, read back, has a held-out loss of {read:.4f} and not {expected:.4f}; nothing is "
            "published; write it in float32 (--dtype float32)"
        )


class _Job:
    """Models in memory, data, and the steps on them."""

    def __init__(
        self,
        models: Models,
        names: list[str],
        sources: dict[str, Data],
        schedule: Schedule,
        rate: float,
        device: torch.device,
        watch: Watch,
    ):
        self._models, self._names, self._schedule, self._rate = models, names, schedule, rate
        self._device, self._watch = device, watch
        self.digests = {
            "models": [model.checkpoint.identity.digests() for model in models.members],
            "data": {name: digest(data) for name, data in sources.items()},
        }
        self._data, self.held_out = [], []
        for name, data in sources.items():
            part, held = split_validation(data.to(device))
            who = (names.index(name) - 1,) if name else tuple(range(len(names) - 1))
            self._data.append((part, who))
            self.held_out.append(evenly(part if held is None else held))
        count = sum(len(part) for part, _ in self._data)
        if schedule.batch > max(count, Schedule.batch):
            raise LmcError(f"a batch of {schedule.batch} is more than all {count} inputs; give a smaller --batch")
        length = max(1, inputs_of(self._data[0][0])[0].numel())
        self._micro = max(1, min(4, _TOKENS // length))
        self._teachers = [model.load(torch.float32, device) for model in models.members[1:]]

    def controls(self) -> dict[str, float]:
        """Held-out losses of the merged model and of the endpoints, as they are."""
        weights = [self._start(AVERAGE), *self._teachers]
        return {name: self.loss_of(w) for name, w in zip(self._names, weights, strict=True)}

    def loss_of(self, weights: Weights) -> float:
        """On what is held out. Raises LmcError where it is no number."""
        loss = loss_of(weights, self.held_out)
        if not math.isfinite(loss):
            raise LmcError(
                f"the held-out loss is {loss}: numbers overflow; look for huge weights, or try a smaller rate"
            )
        return loss

    def trial(self, name: str) -> float:
        """Held-out loss after some steps from a start."""
        schedule = replace(self._schedule, steps=max(1, self._schedule.steps // TRIALS))
        healer = self._healer(name, schedule)
        self._watch.begin("trying", schedule.steps, note=f"from {name}")
        for step in range(schedule.steps):
            self._watch.at(step, schedule.steps, note=f"from {name}")
            _step(healer)
        return self.loss_of(healer.student)

    def learn(
        self,
        name: str,
        saved: dict[str, Tensor],
        before: dict[str, Any],
        save: Callable[[dict[str, Tensor], dict[int, float], int], None],
    ) -> tuple[dict[int, float], Weights]:
        """(held-out loss at some steps, the best weights)."""
        schedule, healer = self._schedule, self._healer(name, self._schedule)
        steps, every = schedule.steps, max(1, schedule.steps // VALIDATIONS)
        losses: dict[int, float] = {}
        best = {n: t.detach().clone() for n, t in healer.leaves.items()}
        if "losses" in before:
            with understood(Path(_STATE), "the state of this run"):
                losses = {int(step): value for step, value in before["losses"].items()}
                healer.restore(saved, before["step"])
                best = {n: saved[f"best.{n}"].to(self._device) for n in healer.leaves}

        def keep() -> None:
            save(healer.state() | {f"best.{n}": t for n, t in best.items()}, losses, healer.done)

        save_at = time.monotonic() + SAVE_SECONDS
        loss = None
        try:
            self._watch.begin("healing", steps, healer.done)
            while True:
                done = healer.done
                if (done % every == 0 or done == steps) and done not in losses:
                    losses[done] = self.loss_of(healer.student)
                    if best_of(losses) == done:
                        best = {n: t.detach().clone() for n, t in healer.leaves.items()}
                self._watch.at(done, steps, loss=loss)
                if done == steps:
                    break
                if time.monotonic() > save_at:
                    began = time.monotonic()
                    keep()
                    save_at = time.monotonic() + max(SAVE_SECONDS, SAVE_SHARE * (time.monotonic() - began))
                loss = _step(healer)
        except (KeyboardInterrupt, Cancelled):
            with uninterrupted():
                keep()
            raise
        return losses, with_tensors(healer.student, best)

    def _start(self, name: str) -> Weights:
        if name == AVERAGE:
            return self._models.a.load(torch.float32, self._device)
        return self._teachers[self._names.index(name) - 1]

    def _healer(self, name: str, schedule: Schedule) -> Healer:
        return Healer(self._start(name), self._teachers, self._data, schedule, self._rate, self._micro)


def _step(healer: Healer) -> float:
    try:
        with uninterrupted():
            return healer.step()
    except ArithmeticError as error:
        raise LmcError(str(error)) from error


class _Directory(Workspace):
    """OUT.partial with the state of an unfinished run."""

    def __init__(self, target: Path, models: Models, run: dict[str, Any], resume: bool):
        names: dict[str, Any] = {_REPORT: None, **workspace_names(_REPORT, None)}
        for home in models.homes:
            names |= checkpoint_names(home)
        more: dict[str, Any] = {_STATE: None, **workspace_names(_STATE, None)}
        super().__init__(target, names, more, (_STATE,), resume)
        self.require_free()
        self._run, self.state_file = run, self.path / _STATE
        if resume and not self.path.exists():
            raise LmcError(f"nothing to resume: there is no {self.path}; start without --resume")

    def require_room(self, models: Models, dtype: torch.dtype | None) -> None:
        """Raises LmcError where the disk has less room than the output, or two states, may take."""
        state = 4 * max(endpoint_bytes(model, torch.float32) for model in models.members)  # weights, moments and best
        written = max(endpoint_bytes(model, dtype) for model in models.members)
        kept = self.state_file.stat().st_size if self.state_file.exists() else 0
        require_room(self.path, state + max(state, written) - kept, max(map(largest_file, models.members)))

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Raises LmcError where the state is that of another run."""
        if not self.state_file.exists():
            return {}, {}
        tensors, before = load_tensors(self.state_file)
        for key, value in self._run.items():
            if key != "rate" and before.get("run", {}).get(key) != value:
                raise LmcError(f"cannot resume: {key} is not what the run began with; repeat models, data and options")
        return tensors, before

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        save_tensors(self.state_file, tensors, {"run": self._run, **facts})

    def save_learned(
        self, trials: dict[str, float], tensors: dict[str, Tensor], losses: dict[int, float], step: int
    ) -> None:
        self.save(tensors, {"trials": trials, "losses": losses, "step": step})
