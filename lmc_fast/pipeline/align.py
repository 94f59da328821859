"""The main job: from a pair and calibration tokens to an alignment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment import Alignment
from ..checkpoints import Weights
from ..engine.source import Resident, paired
from ..engine.step import line_losses
from ..errors import LmcError
from ..examples import Data
from ..matching.activations import gather_statistics
from ..matching.balance import balance
from ..matching.closed_form import Evidence, match
from ..matching.learned import History, Learner, NonFiniteLoss, Schedule
from ..pair import Pair
from ..symmetry import canonicalize
from ..symmetry.storage import load_tensors, pack, save_tensors, unpack
from ..symmetry.transform import Transform

METHODS = ("dual", "one-sided", "activation", "weight")
STATISTICS_TOKENS = 32_768  # enough for cross-covariances; more changes the matching little
VALIDATION_BLOCKS = 64
VALIDATIONS = 10
SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class Progress:
    """Handed to the `progress` callback: after each step, and once (`step` 0) when matching is done."""

    step: int
    steps: int
    loss: float | None
    excess: float | None  # of the last validation, in nats
    tokens: int  # read in this step


def align(
    pair: Pair,
    tokens: Data,
    *,
    method: str = "dual",
    schedule: Schedule | None = None,
    validation: Data | None = None,
    activations: float = 0.3,
    device: torch.device | str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    state_file: str | Path | None = None,
    **options: Any,
) -> Alignment:
    """Finds g_A and g_B such that the line between g_A A and g_B B is flat.

    tokens: calibration data, see data.read_data: text (n, T) int64, or examples. method: one of METHODS; the last two
    use no gradients.
    `options` are fields of Schedule (steps, batch, ...). validation (m, T): picks the best of VALIDATIONS states.
    activations: how much activation evidence counts beside the weights in the matching that learning starts from.
    state_file: written every SAVE_SECONDS and on interruption; if it exists, the run goes on from there, to the same
    result as if it had not stopped.

    Raises LmcError for a bad method or state file and for a loss that becomes NaN or infinite (the state is kept).
    """
    if method not in METHODS:
        raise LmcError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if pair.spec.task == "features" and method not in ("weight", "activation"):
        raise LmcError(f"{pair.spec.family} computes features and has no loss to learn from; use --method weight")
    schedule = schedule or Schedule(sides=1 if method == "one-sided" else 2, **options)
    tokens = tokens.to(device)
    a, b = (canonicalize(model.load(torch.float32, device)) for model in (pair.a, pair.b))
    state = Path(state_file) if state_file else None
    if state and state.exists():
        saved, metadata = load_tensors(state)
        base = unpack(saved, "base.a", pair.spec.layers), unpack(saved, "base.b", pair.spec.layers)
    else:
        saved, metadata = {}, {}
        evidence = {"weight": Evidence(1, 0), "activation": Evidence(0, 1)}.get(method, Evidence(1, activations))
        base = _match(a, b, tokens, evidence)
    if method in ("weight", "activation"):
        return Alignment(*base, matched=base, info={"method": method})

    path = metadata["run"]["path"] if metadata else None
    learner = Learner(Resident(*paired(base[0].apply(a), base[1].apply(b))), tokens, schedule, path=path)
    run = {"method": method, "schedule": asdict(schedule), "calibration_blocks": list(tokens.shape)}
    run["path"] = learner.path
    if metadata:
        _require_same_run(metadata["run"], run)
        learner.restore(saved, History(**metadata["history"]))
    keep = {**pack(base[0], "base.a"), **pack(base[1], "base.b")}
    _learn(learner, validation, progress, lambda: _save(state, learner, keep, run))
    moved = learner.final_chart().elements()
    moved = [t.map(Tensor.detach) for t in ([Transform.identity(pair.spec), *moved] if len(moved) == 1 else moved)]
    info = run | {"history": asdict(learner.history)}
    return Alignment(moved[0].compose(base[0]), moved[1].compose(base[1]), base, info)


def _match(a: Weights, b: Weights, tokens: Data, evidence: Evidence) -> tuple[Transform, Transform]:
    """Balance both endpoints, then match B to A."""
    even_a, even_b = balance(a), balance(b)
    a, b = even_a.apply(a), even_b.apply(b)
    statistics = None
    if evidence.activations:
        length = a.spec.position_rows if a.spec.image else tokens.shape[1]
        count = max(1, min(len(tokens), STATISTICS_TOKENS // length))
        statistics = gather_statistics(a, b, tokens[:: len(tokens) // count][:count])
    found = match(a, b, evidence, statistics).compose(even_b)
    return even_a.map(_plain), found.map(_plain)


def _plain(t: Tensor) -> Tensor:
    """Laid out as it will be when read back from a state file: a transposed view multiplies to other last bits."""
    return t.contiguous()


def _learn(
    learner: Learner, validation: Data | None, progress: Callable[[Progress], None] | None, save: Callable[[], None]
) -> None:
    """Runs the learner to its end, validating and saving on the way."""
    steps = learner.schedule.steps
    ends = [0.0, 0.0]
    if validation is not None:
        picked = validation[:: max(1, len(validation) // VALIDATION_BLOCKS)][:VALIDATION_BLOCKS]
        validation = picked.to(learner.tokens.device)
        ends = line_losses(learner.source, validation, (0.0, 1.0))
    excess: float | None = None
    per_step = learner.schedule.batch * learner.tokens.shape[1]
    every = max(1, steps // VALIDATIONS)
    saved_at = time.monotonic()
    try:
        while True:
            done = learner.done
            due = done % every == 0 or done == steps
            if validation is not None and due and done not in learner.history.excess:
                excess = learner.validate(validation, ends)
            if progress:
                loss = learner.history.loss[-1] if done else None
                progress(Progress(done, steps, loss, excess, per_step if done else 0))
            if done >= steps:
                break
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
            learner.step()
    except NonFiniteLoss as error:
        save()
        raise LmcError(f"{error}; the state before it is kept: try a smaller --matrix-lr and --scale-lr") from error
    except KeyboardInterrupt:
        save()
        raise
    save()


def _save(state: Path | None, learner: Learner, keep: dict[str, Tensor], run: dict[str, Any]) -> None:
    if state:
        save_tensors(state, learner.state() | keep, {"run": run, "history": asdict(learner.history)})


def _require_same_run(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A resumed run must be the run that was interrupted; only learning rates may change."""
    free = ("matrix_lr", "scale_lr")
    flat = lambda run: {**run["schedule"], **{k: v for k, v in run.items() if k != "schedule"}}  # noqa: E731
    for key, value in flat(saved).items():
        if key not in free and flat(now).get(key) != value:
            raise LmcError(f"cannot resume: {key} was {value}, now it is {flat(now).get(key)}; repeat the same options")
