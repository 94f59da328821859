"""The main job: from a pair and calibration tokens to an alignment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..alignment import Alignment, require_alignment
from ..budget.devices import device_errors, here, require_device
from ..budget.meter import Meter, return_freed_memory
from ..budget.planner import Plan, Strategy
from ..checkpoints import Weights
from ..data import Given, as_data, split_validation
from ..engine.source import Resident, paired
from ..errors import Cancelled, LmcError
from ..examples import Data, inputs_of
from ..interrupts import uninterrupted
from ..learning import parallel
from ..learning.learner import History, Learner, NonFiniteLoss
from ..learning.schedule import METHODS as LEARNING
from ..learning.schedule import Schedule
from ..learning.steering import is_due, share_of_text
from ..matching.closed_form import Evidence
from ..members import CLOSED_SCHEMES, SCHEMES, STARTS
from ..pair import Models
from ..sizes import require_bytes
from ..streaming.ring import Streamed
from ..symmetry import canonicalize
from ..symmetry.checksum import understood
from ..symmetry.grown import record_of
from ..symmetry.legality import check_legal
from ..symmetry.storage import as_stored, digest_of, load_tensors, pack, save_tensors, unpack
from ..symmetry.transform import Transform
from .budgeted import chunking_of, disk_bytes, on_disk, plan_learning, route_of, tokens_to_gather
from .held_out import judging, memorised, useless_endpoints
from .matched import STATISTICS_TOKENS, match_members, scratch
from .placing import placed
from .progress import Cancel, Progress, Watch
from .resume import made_from, require_same_run
from .room import require_room
from .schemes import Below, by_levels
from .settings import blocks_chosen, require_scheme, require_settings

_log = logging.getLogger("lmc_fast")
SAVE_SECONDS = 20.0  # between two saves, or SAVE_SHARE times what one takes, if that is longer
SAVE_SHARE = 20


@device_errors()
def align(
    pair: Models,
    tokens: Given,
    *,
    method: str = "dual",
    scheme: str = SCHEMES[0],
    start: str = STARTS[0],
    schedule: Schedule | None = None,
    validation: Given | None = None,
    activations: float = 0.3,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
    state_file: str | Path | None = None,
    meter: Meter | None = None,
    base: Alignment | None = None,
    blocks: Iterable[int] | None = None,
    **options: Any,
) -> Alignment:
    """Finds g_A and g_B such that the line between g_A A and g_B B is flat; or one element for each of more models.

    Args:
        pair: the models.
        tokens: calibration data: token ids (n, T) of integers, also numpy's, or Examples; see read_data.
        method: "dual" (both move), "one-sided" (B moves), "activation" or "weight" (matching alone, by such evidence).
        scheme: of more than two: "joint", the default: all are learned together, on all that lies between them;
            "hierarchical": pairs, then the averages of pairs, and so on, with so many steps for each; "universe":
            closed-form matching of all; "mergemany": the same by weights alone.
        start: of joint learning: "universe", the default, or "hierarchical" with as many steps.
        schedule: how to learn; None: made of `options`.
        validation: (m, T), what the run is steered by: nothing worse on it than what matching found is returned. None:
            a part of `tokens` is held out.
        activations: how much activations count beside weights in the matching that learning starts from.
        device: where to compute.
        memory: bytes that this process (on a GPU: its memory there) may take; the models are then prepared on disk,
            beside the state file, and stream through. None: whole models are held.
        progress: called in every stage, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.
        state_file: written every 20 seconds or so and on interruption; if it exists, the run goes on from there.
        meter: told what each stage takes.
        base: an alignment of the same models to learn from, instead of what matching finds.
        blocks: numbers of those whose heads and units learning may change; None: all. The stream always turns.
        **options: fields of a Schedule (steps, batch, ...).

    Returns:
        The alignment; its `info` has method, schedule, history and notes.

    Raises:
        LmcError: an argument makes no sense, or a loss is not finite; the last good state is kept.
        TooSmall: `memory` is too little; `smallest` is enough.
        Cancelled: `cancel` says so; the state is kept, and the error's `alignment` is what was learned.

    >>> pair = lmc.open_pair("A", "B")
    >>> lmc.align(pair, lmc.read_tokens("text.txt", pair.a, 16), steps=2, batch=2).info["method"]
    'dual'
    """
    require_settings(method, activations)
    require_scheme(scheme, start)
    count = len(pair.members)
    method = CLOSED_SCHEMES.get(scheme, method)
    schedule = Schedule.of(method, schedule, options)
    if pair.spec.task == "features":
        if schedule.objective == "text":
            raise LmcError(f"{pair.spec.family} computes features and predicts no text; use the objective endpoints")
        schedule = replace(schedule, objective="endpoints")
    device = require_device(device)
    meter, watch = meter or Meter(device), Watch(progress, cancel)
    tokens = as_data(tokens, pair.a)
    validation = None if validation is None else as_data(validation, pair.a)
    given = made_from(pair, tokens, validation)
    known = validation is None  # whether the validation data is a part of the calibration data
    if validation is None and method in LEARNING:
        tokens, validation = split_validation(tokens)
    tokens = tokens.to(device)
    if method in LEARNING and schedule.batch > max(len(tokens), Schedule.batch):
        raise LmcError(
            f"a batch of {schedule.batch} is more than all {len(tokens)} calibration blocks; give a smaller --batch"
        )
    require_bytes(memory)
    if None in pair.homes and memory is not None:
        raise LmcError("memory= prepares a pair on disk, and these models are in memory: save them, or leave it out")
    chosen = None if blocks is None else blocks_chosen(blocks, pair.spec.layers)
    job = _Job(tokens, validation, known, method, schedule, activations, device, memory, meter, watch, chosen)
    state, run = Path(state_file) if state_file else None, dict[str, Any](inputs=given)
    run |= {} if chosen is None else {"blocks": list(chosen)}
    if base is not None:
        require_alignment(base)
        if len(base.members) != count:
            raise LmcError(f"the alignment to start from is one of {len(base.members)} models, not {count}")
        for element in base.members:
            check_legal(element, pair.spec)
        grown = base.info.get("grown")
        pair = placed(pair, tokens, device, grown) if grown else pair
        run |= {"base": digest_of(base.members)}
        return job.align(pair, state, run, base=[as_stored(g) for g in base.members], place=not grown)
    if count == 2:
        return job.align(pair, state, run)
    run |= {"scheme": scheme, "start": start}
    if not (method in LEARNING and "hierarchical" in (scheme, start)) or job.is_begun(state, run):
        return job.align(pair, state, run)
    if state and parallel.place()[0] == 0:
        save_tensors(state, {}, {"run": job.facts(run)})
    pair = placed(pair, tokens, device, meter=meter, watch=watch)

    def align_two(two: Models, below: Below | None, at: Path | None) -> Alignment:
        return job.align(two, at, {"inputs": made_from(two, tokens, validation)}, place=False, below=below)

    found = by_levels(pair, align_two, state)
    if scheme == "hierarchical":
        return Alignment(*found.members, found.matched, found.info | run | record_of(pair.members))
    return job.align(pair, state, run, base=found.members)


@dataclass(frozen=True)
class _Job:
    """How to align, whatever is aligned; see `align`. known: the validation data is a part of the calibration data."""

    tokens: Data
    validation: Data | None
    known: bool
    method: str
    schedule: Schedule
    activations: float
    device: torch.device
    memory: int | None
    meter: Meter
    watch: Watch
    blocks: Sequence[int] | None = None  # that learning may change

    @property
    def learns(self) -> bool:
        return self.method in LEARNING and self.schedule.steps > 0

    def facts(self, run: dict[str, Any]) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that began, beside what is aligned."""
        facts = {"method": self.method, "activations": float(self.activations)} | run
        if self.learns:
            facts |= {"schedule": asdict(self.schedule), "calibration_shape": list(self.tokens.shape)}
        return facts

    def is_begun(self, state: Path | None, run: dict[str, Any]) -> bool:
        """Whether all levels are done and what they found is learned from. Raises LmcError for another run's state."""
        if state is None or not state.exists():
            return False
        saved, before = load_tensors(state)
        with understood(state, "the state of this run"):
            require_same_run({key: before["run"][key] for key in self.facts(run)}, self.facts(run))
        return bool(saved)

    def align(
        self,
        pair: Models,
        state: Path | None,
        run: dict[str, Any],
        *,
        base: Sequence[Transform] | None = None,
        place: bool = True,
        below: Below | None = None,
    ) -> Alignment:
        """run: facts beside those of the job. base: elements to start from, instead of what matching finds. place:
        empty blocks of grown models are still to be placed. below: what brought two groups of models together, whose
        averages are aligned.
        """
        schedule, tokens, device, memory = self.schedule, self.tokens, self.device, self.memory
        meter, watch, learns, count = self.meter, self.watch, self.learns, len(pair.members)
        run = self.facts(run) | (below.facts if below else {})
        saved, before = load_tensors(state) if state and state.exists() else ({}, {})
        before = before if saved else {}  # else its levels are done now
        if before:
            with understood(state or Path("the state"), "the state of this run"):
                recorded = before["run"].get("grown")
                pair = placed(pair, tokens, device, recorded) if recorded and place else pair
                require_same_run(before["run"], run | record_of(pair.members))
        spec, length = pair.spec, pair.spec.length(inputs_of(tokens).shape)
        within, gathered = None, STATISTICS_TOKENS
        if memory is not None:
            return_freed_memory()
            if learns:
                strategy = before["run"].get("strategy") if before else None
                chosen = strategy and Strategy(*strategy)
                within = plan_learning(spec, schedule, length, device, memory, chosen, members=count)
                run["strategy"] = list(within.strategy)
                meter.facts["plan"] = within.to_json()
            if not before and base is None:
                at_hand = within.device if within else here(device)
                gathered = tokens_to_gather(spec, length, at_hand, memory, STATISTICS_TOKENS, count)
        if place and not before:
            pair = placed(pair, tokens, device, meter=meter, watch=watch)
        run |= record_of(pair.members)

        # without learning, or within a budget, one block at a time is enough
        whole = learns and within is None
        opened = ((m.load if whole else m.open_weights)(torch.float32, device) for m in pair.members)
        members = [canonicalize(weights) for weights in opened]
        at = state.parent if state else None
        with ExitStack() as stack:
            if not before and parallel.place()[0] == 0:
                if base is None:
                    base = self._match(members, below, at, within, gathered, not whole and None not in pair.homes)
                if not learns:
                    return Alignment(*base, matched=base, info=run)
                saved = _packed(base)
                if state:
                    save_tensors(state, saved, {"run": run})
            parallel.wait()
            if not saved and state:
                saved, _ = load_tensors(state)  # the first process wrote it
            with understood(state or Path("the state"), "the state of this run"):
                base = [unpack(saved, f"members.{k}", spec.layers) for k in range(count)]
                for part in base if before else ():
                    check_legal(part, spec)
            with meter.stage("preparing"):
                watch.begin("preparing", spec.layers)
                source: Resident | Streamed
                if within is None:
                    source = Resident(*paired(*(g.apply(w) for g, w in zip(base, members, strict=True))))
                else:
                    at = at or Path(stack.enter_context(TemporaryDirectory()))
                    source = stack.enter_context(on_disk(members, base, within, at, device, watch))
            del members
            route = before["run"].get("route") if before else None
            if route is None and within is not None:
                route = route_of(within, spec, device)
            chunking = chunking_of(within) if within else None
            groups = None if below is None else below.groups
            learner = Learner(source, tokens, schedule, chunking, route, self.blocks, groups)
            run["route"] = learner.route
            if "history" in before:
                with understood(state or Path("the state"), "the state of this run"):
                    learner.restore(saved, History(**before["history"]))
            with meter.stage("learning"):
                expected = within.step_seconds if within else None
                save = partial(_save, state, learner, base, run)
                try:
                    notes = _learn(learner, self.validation, self.known, watch, expected, save)
                except Cancelled as error:
                    error.alignment = self._result(learner, base, run, [])
                    raise
            if isinstance(source, Streamed):
                meter.facts["traffic"] = source.traffic.to_json()
        return self._result(learner, base, run, notes)

    def _result(self, learner: Learner, base: Sequence[Transform], run: dict[str, Any], notes: list[str]) -> Alignment:
        moved = [t.map(Tensor.detach) for t in learner.final_chart().elements()]
        moved = [*[Transform.identity(learner.source.spec)] * (len(base) - len(moved)), *moved]
        history, schedule = learner.history, self.schedule
        info = run | {"history": asdict(history), "exported_step": history.exported, "notes": notes}
        if history.exported:
            info["objective"] = ("endpoints", "text")[int(share_of_text(schedule, history.turns, history.exported - 1))]
        found = [g.compose(first) for g, first in zip(moved, base, strict=True)]
        return Alignment(*found, matched=base, info=info)

    def _match(
        self,
        members: Sequence[Weights],
        below: Below | None,
        at: Path | None,
        within: Plan | None,
        gathered: int,
        to_disk: bool,
    ) -> tuple[Transform, ...]:
        if below:
            return below.after(self._match(below.averages(members), None, at, within, gathered, to_disk))
        weighed = Evidence(1, self.activations)
        evidence = {"weight": Evidence(1, 0), "activation": Evidence(0, 1)}.get(self.method, weighed)
        with self.meter.stage("matching"), scratch(at, to_disk) as keep:
            if keep is not None:
                require_room(keep, disk_bytes(members[0].spec, evidence, within, len(members)))
            tokens, watch = self.tokens, self.watch
            return match_members(members, tokens, evidence, keep=keep, statistics_tokens=gathered, watch=watch)


def _learn(
    learner: Learner,
    validation: Data | None,
    known: bool,
    watch: Watch,
    step_seconds: float | None,
    save: Callable[[], None],
) -> list[str]:
    """Runs the learner to its end, validating and saving on the way; returns what there is to say of the endpoints.

    validation: None: the calibration data is too little to hold any out, and judges itself. known: it is a part of the
    calibration data. step_seconds: as the plan expects.
    """
    steps = learner.schedule.steps
    notes: list[str] = []
    excess: float | None = None
    per_step = learner.schedule.batch * learner.tokens.shape[1]
    save_at = time.monotonic() + SAVE_SECONDS

    def save_if_due() -> None:
        nonlocal save_at
        if time.monotonic() > save_at:
            began = time.monotonic()
            save()
            save_at = time.monotonic() + max(SAVE_SECONDS, SAVE_SHARE * (time.monotonic() - began))

    learner.before_update = save_if_due  # of a state whose next step is known to be possible
    try:
        watch.begin("learning", steps, learner.done, step_seconds)
        held_out = learner.tokens if validation is None else validation.to(learner.tokens.device)
        judge = judging(held_out, steps * learner.schedule.batch)
        began = time.monotonic()
        ends = learner.corner_losses(judge)
        if step_seconds is None:  # a step's passes forward, and one backward of twice as much
            pass_seconds = (time.monotonic() - began) / (len(ends) * len(judge))
            watch.expect(pass_seconds * learner.schedule.batch * (learner.schedule.teachers + 3))
        notes += useless_endpoints(learner.source.spec, ends)
        for note in notes:
            _log.warning(note)
        more = [] if known else memorised(learner, ends)
        if validation is None:
            more = ["there is too little data to hold any out: the best state is picked on the calibration data"]
        for note in more:
            _log.info("note: %s", note)
        notes += more
        while True:
            done = learner.done
            if is_due(learner.schedule, done) and done not in learner.history.excess:
                excess = learner.validate(judge, ends)
            loss = learner.history.loss[-1] if done else None
            watch.at(done, steps, loss=loss, excess=excess, tokens=per_step if done else 0)
            if done >= steps:
                break
            learner.step()
        if not learner.sound:
            raise NonFiniteLoss(f"the update of step {steps} became infinite or NaN")
    except NonFiniteLoss as error:
        raise LmcError(f"{error}; the last good state is kept: try a smaller --matrix-lr and --scale-lr") from error
    except (KeyboardInterrupt, Cancelled):
        with uninterrupted():
            save()
        raise
    save()
    return notes


def _save(state: Path | None, learner: Learner, base: Sequence[Transform], run: dict[str, Any]) -> None:
    if state and parallel.place()[0] == 0 and learner.sound:
        save_tensors(state, learner.state() | _packed(base), {"run": run, "history": asdict(learner.history)})


def _packed(base: Sequence[Transform]) -> dict[str, Tensor]:
    """What matching found for each member."""
    return {name: t for k, part in enumerate(base) for name, t in pack(part, f"members.{k}").items()}
