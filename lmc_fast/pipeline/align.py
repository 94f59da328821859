"""The main job: from a pair and calibration tokens to an alignment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..alignment import Alignment
from ..budget.devices import device_errors, here, require_device
from ..budget.meter import Meter, return_freed_memory
from ..budget.planner import Strategy
from ..checkpoints import LazyBlocks, Slots, Weights
from ..data import Given, as_data, split_validation
from ..engine.source import Resident, paired
from ..errors import Cancelled, LmcError
from ..examples import Data, inputs_of
from ..interrupts import uninterrupted
from ..learning import parallel
from ..learning.learner import History, Learner, NonFiniteLoss
from ..learning.schedule import CLOSED_FORMS, Schedule
from ..learning.schedule import METHODS as LEARNING
from ..learning.steering import is_due, share_of_text
from ..matching.activations import STATISTICS_NAMES, gather_statistics
from ..matching.balance import balanced
from ..matching.closed_form import MAX_ROUNDS, Evidence, match
from ..output import Workspace
from ..pair import Models
from ..streaming.ring import Streamed
from ..symmetry import canonicalize
from ..symmetry.checksum import understood
from ..symmetry.grown import record_of
from ..symmetry.legality import check_legal
from ..symmetry.storage import as_stored, load_tensors, pack, save_tensors, unpack
from ..symmetry.transform import Transform
from .budgeted import chunking_of, disk_bytes, on_disk, plan_learning, route_of, tokens_to_gather
from .held_out import evenly, memorised, useless_endpoints
from .placing import placed
from .progress import Cancel, MatchingWatch, Progress, Watch
from .resume import made_from, require_same_run
from .room import require_room
from .run_directory import STATISTICS

_log = logging.getLogger("lmc_fast")
METHODS = (*LEARNING, *CLOSED_FORMS)
STATISTICS_TOKENS = 32_768  # enough for cross-covariances; more changes the matching little
MOST_ACTIVATIONS = 1e6  # times the evidence of the weights
SAVE_SECONDS = 20.0  # between two saves, or SAVE_SHARE times what one takes, if that is longer
SAVE_SHARE = 20


@device_errors()
def align(
    pair: Models,
    tokens: Given,
    *,
    method: str = "dual",
    schedule: Schedule | None = None,
    validation: Given | None = None,
    activations: float = 0.3,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
    state_file: str | Path | None = None,
    meter: Meter | None = None,
    **options: Any,
) -> Alignment:
    """Finds g_A and g_B such that the line between g_A A and g_B B is flat.

    tokens: calibration data, see data.read_data: text (n, T) of integers, also numpy's, or examples.
    method: one of METHODS; the last two use no gradients. schedule, or its fields as `options` (steps, batch, ...): how
    to learn; `sides` follows from the method.
    validation (m, T): what the run is steered by, see learning.steering: no state is returned that is worse on it than
    what matching found. By default a part of `tokens` is held out for it.
    activations: how much activation evidence counts beside the weights in the matching that learning starts from.
    memory: bytes that this process (on a GPU: its memory there) may take; the pair is then prepared on disk, beside the
    state file, and streams through. None: whole models are held.
    progress: called in every stage, see Progress. cancel: called, or a threading.Event looked at, at the same moments;
    where it says True, the work ends.
    state_file: written about every SAVE_SECONDS and on interruption; if it exists, the run goes on from there, to the
    same result as if it had not stopped. meter: told what each stage takes.

    Raises LmcError for a bad method, schedule, option or state file, a budget that is too small and for a loss that
    becomes NaN or infinite, and Cancelled, an LmcError, where `cancel` says so (the state is kept).
    """
    require_settings(method, activations)
    if pair.spec.task == "features" and method not in ("weight", "activation"):
        raise LmcError(f"{pair.spec.family} computes features and has no loss to learn from; use --method weight")
    schedule = Schedule.of(method, schedule, options)
    device = require_device(device)
    meter = meter or Meter(device)
    tokens = as_data(tokens, pair.a)
    validation = None if validation is None else as_data(validation, pair.a)
    given = made_from(pair, tokens, validation)
    known = validation is None  # whether the validation data is a part of the calibration data
    if validation is None and method in LEARNING:
        tokens, validation = split_validation(tokens)
    tokens = tokens.to(device)
    learns, watch = method in LEARNING, Watch(progress, cancel)
    if learns and schedule.batch > max(len(tokens), Schedule.batch):
        raise LmcError(
            f"a batch of {schedule.batch} is more than all {len(tokens)} calibration blocks; give a smaller --batch"
        )
    run: dict[str, Any] = {
        "method": method,
        "activations": float(activations),
        "inputs": given,
    }
    if learns:
        run |= {"schedule": asdict(schedule), "calibration_shape": list(tokens.shape)}
    state = Path(state_file) if state_file else None
    saved, before = load_tensors(state) if state and state.exists() else ({}, {})
    if before:
        with understood(state or Path("the state"), "the state of this run"):
            recorded = before["run"].get("grown")
            pair = placed(pair, tokens, device, recorded) if recorded else pair
            require_same_run(before["run"], run | record_of(pair.members))
    in_memory = None in pair.homes
    if in_memory and memory is not None:
        raise LmcError("memory= prepares a pair on disk, and these models are in memory: save them, or leave it out")
    within, gathered, length = None, STATISTICS_TOKENS, pair.spec.length(inputs_of(tokens).shape)
    if memory is not None:
        return_freed_memory()
        if learns:
            strategy = before["run"].get("strategy") if before else None
            within = plan_learning(pair.spec, schedule, length, device, memory, strategy and Strategy(*strategy))
            run["strategy"] = list(within.strategy)
            meter.facts["plan"] = within.to_json()
        if not before:
            at_hand = within.device if within else here(device)
            gathered = tokens_to_gather(pair.spec, length, at_hand, memory, STATISTICS_TOKENS)
    if not before:
        pair = placed(pair, tokens, device, meter=meter, watch=watch)
    run |= record_of(pair.members)

    # without learning, or within a budget, one block at a time is enough
    whole = learns and within is None
    opened = ((m.load if whole else m.open_weights)(torch.float32, device) for m in pair.members)
    a, b = (canonicalize(weights) for weights in opened)
    place = state.parent if state else None
    with ExitStack() as stack:
        if not before and parallel.place()[0] == 0:
            evidence = {"weight": Evidence(1, 0), "activation": Evidence(0, 1)}.get(method, Evidence(1, activations))
            to_disk = not whole and not in_memory
            with meter.stage("matching"), _scratch(place, to_disk) as keep:
                if keep is not None:
                    require_room(keep, disk_bytes(pair.spec, evidence, within))
                base = match_endpoints(a, b, tokens, evidence, keep=keep, statistics_tokens=gathered, watch=watch)
            if not learns:
                return Alignment(*base, matched=base, info=run)
            saved = _packed(base)
            if state:
                save_tensors(state, saved, {"run": run})
        parallel.wait()
        if not saved and state:
            saved, _ = load_tensors(state)  # the first process wrote it
        with understood(state or Path("the state"), "the state of this run"):
            base = unpack(saved, "members.0", pair.spec.layers), unpack(saved, "members.1", pair.spec.layers)
            for part in base if before else ():
                check_legal(part, pair.spec)
        with meter.stage("preparing"):
            watch.begin("preparing", pair.spec.layers)
            source: Resident | Streamed
            if within is None:
                source = Resident(*paired(base[0].apply(a), base[1].apply(b)))
            else:
                place = place or Path(stack.enter_context(TemporaryDirectory()))
                source = stack.enter_context(on_disk((a, b), base, within, place, device, watch))
        del a, b
        route = before["run"].get("route") if before else None
        if route is None and within is not None:
            route = route_of(within, pair.spec, device)
        learner = Learner(source, tokens, schedule, chunking_of(within) if within else None, route)
        run["route"] = learner.route
        if "history" in before:
            with understood(state or Path("the state"), "the state of this run"):
                learner.restore(saved, History(**before["history"]))
        with meter.stage("learning"):
            expected = within.step_seconds if within else None
            notes = _learn(learner, validation, known, watch, expected, partial(_save, state, learner, base, run))
        if isinstance(source, Streamed):
            meter.facts["traffic"] = source.traffic.to_json()
    moved = learner.final_chart().elements()
    moved = [t.map(Tensor.detach) for t in ([Transform.identity(pair.spec), *moved] if len(moved) == 1 else moved)]
    history = learner.history
    info = run | {"history": asdict(history), "exported_step": history.exported, "notes": notes}
    if history.exported:
        info["objective"] = ("endpoints", "text")[int(share_of_text(schedule, history.turns, history.exported - 1))]
    return Alignment(moved[0].compose(base[0]), moved[1].compose(base[1]), base, info)


def require_settings(method: str, activations: float) -> None:
    """Raises LmcError for a method or a weight of activations that means nothing."""
    if method not in METHODS:
        raise LmcError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not (isinstance(activations, Real) and 0 <= activations <= MOST_ACTIVATIONS):
        raise LmcError(
            f"activations must be a number from 0 (only weights count) to {MOST_ACTIVATIONS:g}, not {activations!r}"
        )


@contextmanager
def _scratch(place: Path | None, needed: bool) -> Iterator[Path | None]:
    """A directory for statistics of activations, where they are not held in memory."""
    if not needed:
        yield None
    elif place is None:
        with TemporaryDirectory() as directory:
            yield Path(directory)
    else:
        with Workspace(place / STATISTICS, STATISTICS_NAMES) as work:
            yield work.result


def match_endpoints(
    a: Weights,
    b: Weights,
    tokens: Data,
    evidence: Evidence,
    *,
    keep: Path | None = None,
    statistics_tokens: int = STATISTICS_TOKENS,
    rounds: int = MAX_ROUNDS,
    watch: Watch | None = None,
) -> tuple[Transform, Transform]:
    """(g_A, g_B) that balance both canonical endpoints and match B to A; one block of lazy endpoints at a time.

    keep: a directory for statistics of activations, by default in memory; statistics_tokens: how many tokens these are
    taken from at most; rounds: see match. watch: told how far it is.
    """
    told = MatchingWatch(watch or Watch(), a.spec.layers, bool(evidence.activations), rounds)
    (even_a, a), (even_b, b) = (_balanced(w, ends) for w, ends in ((a, "A"), (b, "B")))
    statistics = None
    if evidence.activations:
        length = a.spec.length(inputs_of(tokens).shape)
        count = max(1, min(len(tokens), statistics_tokens // length))
        statistics = gather_statistics(a, b, tokens[:: len(tokens) // count][:count], keep=keep, visited=told.gathered)
    with _overflow("A and B"):
        found = match(a, b, evidence, statistics, rounds, told.visited).compose(even_b)
    return as_stored(even_a), as_stored(found)


def _balanced(w: Weights, ends: str) -> tuple[Transform, Weights]:
    """As matching.balance.balanced, with the endpoint's name in errors."""
    even, moved = balanced(w)

    def block(i: int) -> Slots:
        with _overflow(ends):
            return moved.blocks[i]

    return even, replace(moved, blocks=LazyBlocks(w.spec.layers, block))


@contextmanager
def _overflow(ends: str) -> Iterator[None]:
    """What solvers say of NaN and infinity, as one sentence."""
    try:
        yield
    except (torch.linalg.LinAlgError, ValueError) as error:
        if isinstance(error, ValueError) and "finite" not in str(error):
            raise
        raise LmcError(f"{ends} cannot be matched: products of weights overflow; look for huge weights") from error


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
        judge = evenly(learner.tokens if validation is None else validation.to(learner.tokens.device))
        first, last = learner.losses(judge, (0.0, 1.0))
        notes += useless_endpoints(learner.source.spec, (first, last))
        for note in notes:
            _log.warning(note)
        more = [] if known else memorised(learner, (first, last))
        if validation is None:
            more = ["there is too little data to hold any out: the best state is picked on the calibration data"]
        for note in more:
            _log.info("note: %s", note)
        notes += more
        while True:
            done = learner.done
            if is_due(learner.schedule, done) and done not in learner.history.excess:
                excess = learner.validate(judge, (first, last))
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


def _save(state: Path | None, learner: Learner, base: tuple[Transform, Transform], run: dict[str, Any]) -> None:
    if state and parallel.place()[0] == 0 and learner.sound:
        save_tensors(state, learner.state() | _packed(base), {"run": run, "history": asdict(learner.history)})


def _packed(base: tuple[Transform, Transform]) -> dict[str, Tensor]:
    """What matching found for each member."""
    return pack(base[0], "members.0") | pack(base[1], "members.1")
