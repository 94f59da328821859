"""The whole way: from a pair and calibration data to a published directory with proof, curves and report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..alignment import Alignment
from ..budget.demand import Demand, Job
from ..budget.devices import device_errors
from ..budget.meter import Meter
from ..budget.stages import POINTS
from ..checkpoints import notes_on
from ..checkpoints.tensor_file import require_writable
from ..data import Given, as_data, split_validation
from ..engine.evaluate import Score
from ..evaluation import Curve, Simplex
from ..evaluation.curve import DEFINITION, plot_curves
from ..evaluation.plots import plot_learning
from ..evaluation.simplex import SIMPLEX_DEFINITION
from ..examples import Data, inputs_of
from ..files import read_object, to_json
from ..interrupts import uninterrupted
from ..learning import parallel
from ..learning.learner import History
from ..learning.schedule import METHODS, Schedule
from ..members import CLOSED_SCHEMES, SCHEMES, STARTS
from ..output import write_whole
from ..pair import Models
from ..version import __version__
from .align import align
from .evaluate import measure_line, require_points
from .export import export_into, prove, require_unchanged
from .page import page
from .placing import placed
from .progress import Cancel, Progress, Watch
from .resume import telling_what_is_kept
from .room import alignment_bytes, endpoint_bytes, largest_file, require_room, state_bytes
from .run_directory import RunDirectory, export_names, state_file_of

FEW = 3  # points of a curve that shows what alignment starts from
MEASURED = 16_384  # tokens that curves are measured on at most, drawn evenly
_log = logging.getLogger("lmc_fast")


@device_errors()
def run(
    pair: Models,
    tokens: Given,
    out: str | Path,
    *,
    method: str = "dual",
    scheme: str = SCHEMES[0],
    start: str = STARTS[0],
    schedule: Schedule | None = None,
    validation: Given | None = None,
    test: Given | None = None,
    activations: float = 0.3,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
    meter: Meter | None = None,
    points: int | None = None,
    curves: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Aligns models as `lmc-fast align` does: `out` appears complete and proven, or not at all.

    `out` gets a/, b/, ... (stock checkpoints), alignment.safetensors, curve.png, learning.png, report.json and
    report.html, a page for people. Under torchrun the processes share the work.

    Args:
        pair: the models.
        tokens: calibration data, as in `align`.
        out: the directory to create.
        method: as in `align`.
        scheme: as in `align`.
        start: as in `align`.
        schedule: as in `align`.
        validation: data that picks the best state of learning; None: a part of `tokens`, drawn evenly, is held out for
            it.
        test: data that curves are measured on; None: the validation data.
        activations: as in `align`.
        device: as in `align`.
        memory: as in `align`.
        dtype: of the weights that are written; None: each endpoint's own.
        resume: go on with the unfinished run that out.partial holds.
        progress: called in every stage, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.
        meter: told what each stage takes.
        points: of each curve; None: 11 of what was learned, 3 of the others.
        curves: whether curves are measured.
        **options: fields of a Schedule.

    Returns:
        The report: method and schedule, the naive, matched and learned curves, how far each written endpoint is from
        its original (`proof`) and what each stage took (`costs`). Empty in all processes but the first.

    Raises:
        LmcError: as `align` and `export` do; what was learned until then stays in out.partial.
        TooSmall: `memory` is too little; `smallest` is enough.
        Cancelled: `cancel` says so; what was learned until then stays in out.partial.

    >>> pair = lmc.open_pair("A", "B")
    >>> tokens = lmc.read_tokens("text.txt", pair.a, 16)
    >>> report = lmc.run(pair, tokens, "RUN", steps=2, batch=2)
    >>> [curve["name"] for curve in report["curves"]], report["proof"]["a"]["kl"] < 1e-9
    (['naive', 'matched', 'learned'], True)
    """
    require_writable(dtype)
    tokens = as_data(tokens, pair.a)
    validation, test = (None if x is None else as_data(x, pair.a) for x in (validation, test))
    if validation is None:
        tokens, validation = split_validation(tokens)
    test = validation if test is None else test
    if points is not None:
        require_points(points)
    meter, watch = meter or Meter(device), Watch(progress, cancel)
    for note in dict.fromkeys(f"{model.source}: {note}" for model in pair.members for note in notes_on(model)):
        _log.info(note)
    find = partial(
        align,
        pair,
        tokens,
        method=method,
        scheme=scheme,
        start=start,
        schedule=schedule,
        validation=validation,
        activations=activations,
        device=device,
        memory=memory,
        progress=progress,
        cancel=cancel,
        meter=meter,
        **options,
    )
    with parallel.together(device):
        if parallel.place()[0]:  # the first process does what is done once
            parallel.wait()
            find(state_file=state_file_of(out))
            return {}
        directory = RunDirectory(out, resume, pair.homes)
        directory.expect(export_names(pair))
        if not directory.finished:
            by_gradients = method in METHODS and scheme not in CLOSED_SCHEMES
            learns = Schedule.of(method, schedule, options) if by_gradients else None
            _require_room(pair, directory, learns, torch.device(device), memory, dtype)
        with directory, telling_what_is_kept(directory.path, directory.state_file):
            if directory.finished:
                _log.info("%s was complete already; what was left of the run is removed", directory.target)
                return read_object(directory.target / "report.json", 1 << 30)
            parallel.wait()
            alignment = find(state_file=directory.state_file)
            require_unchanged(pair)
            directory.drop_store()
            pair = placed(pair, tokens, device, alignment.info.get("grown"))
            named = zip(pair.names, pair.members, strict=True)
            members = [{"name": name, "source": model.source} for name, model in named]
            report: dict[str, Any] = {"members": members, "version": __version__, **alignment.info}
            if test is not None and curves:
                with meter.stage("measuring"):
                    found = measure(pair, test, alignment, device, memory, watch, points)
                report |= {"curves": [curve.to_json() for curve in found]}
                report["definition"] = _plotted(found, directory.result / "curve.png")
            if "history" in alignment.info:
                plot_learning(History(**alignment.info["history"]), directory.result / "learning.png")
            _log.info("writing the aligned endpoints")
            with meter.stage("writing"):
                export_into(pair, alignment, directory.result, dtype, watch)
            alignment.save(directory.result / "alignment.safetensors")
            with meter.stage("verifying"):
                proof = prove(pair, [directory.result / name for name in pair.names], test, device, memory, watch)
            report |= {"proof": {name: found.to_json() for name, found in proof.items()}, "costs": meter.to_json()}
            write_whole(directory.result / "report.json", to_json(report, indent=2) + "\n")
            write_whole(directory.result / "report.html", page(report, directory.result))
            require_unchanged(pair)
            with uninterrupted():
                directory.publish()
    return report


def _plotted(curves: list[Curve | Simplex], file: Path) -> str:
    """Draws all curves of a pair, of more models what came out; says what a barrier is."""
    last = curves[-1]
    if isinstance(last, Simplex):
        last.plot(file)
        return SIMPLEX_DEFINITION
    plot_curves([curve for curve in curves if isinstance(curve, Curve)], file)
    return DEFINITION


def _require_room(
    pair: Models,
    directory: RunDirectory,
    learns: Schedule | None,
    device: torch.device,
    memory: int | None,
    dtype: torch.dtype | None,
) -> None:
    """Raises LmcError where the disk has less room than the run, or what is left of it, may take."""
    spec, writes = pair.spec, sum(endpoint_bytes(model, dtype) for model in pair.members)
    count = len(pair.members)
    writes += alignment_bytes(spec, count)
    if learns:
        state = state_bytes(spec, learns.elements(count), count)
        job = Job(1, 1, learns.elements(count), members=count)
        store = 0 if memory is None else Demand(spec, job, 4 if device.type == "cpu" else 2).store_bytes
        writes = max(2 * state + store, state + writes)
    largest = max(largest_file(model, dtype) for model in pair.members)
    require_room(directory.path, writes - directory.kept_bytes(), largest)


def measure(
    pair: Models,
    tokens: Data,
    alignment: Alignment,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    watch: Watch | None = None,
    points: int | None = None,
) -> list[Curve | Simplex]:
    """Curves of the pair as it is, as matching left it and, where something was learned, as learning left it.

    All on the same part of `tokens`: about MEASURED of them. points: of each curve, by default POINTS of what was
    learned, FEW of the others. Aligned endpoints compute what the endpoints do: their losses are measured once.
    """
    stages: list[tuple[str, Alignment | None]] = [
        ("naive", None),
        ("matched", Alignment(*alignment.matched, alignment.matched)),
    ]
    if "history" in alignment.info:
        stages.append(("learned", alignment))
    length = pair.spec.length(inputs_of(tokens).shape)
    tokens = tokens[:: max(1, len(tokens) * length // MEASURED)]
    curves: list[Curve | Simplex] = []
    known: dict[float, Score] = {}
    watch = watch or Watch()
    watch.begin("measuring", len(stages))

    def visited(done: int, of: int) -> None:
        watch.at(len(curves) * of + done, len(stages) * of)

    for name, stage in stages:
        count = points or (POINTS if name == "learned" else FEW)
        curves.append(measure_line(pair, tokens, stage, count, name, device, memory, visited, known))
    return curves
