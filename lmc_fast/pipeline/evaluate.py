"""Barriers and function checks of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import overload

import torch

from ..alignment import Alignment, require_alignment
from ..architectures import Spec
from ..budget.devices import device_errors, require_device
from ..budget.meter import UNCERTAIN, counted_bytes, return_freed_memory
from ..budget.stages import POINTS, Stages, TooSmall
from ..checkpoints import Model, Place
from ..data import LABELLED, Given, as_data
from ..engine.evaluate import Score
from ..errors import LmcError
from ..evaluation import Curve, Difference, Simplex, curve_between, difference, simplex_between
from ..evaluation.function import OURS, tolerance
from ..evaluation.reference import Unreadable
from ..examples import Data, Examples, inputs_of
from ..pair import Models, Pair, in_common
from ..places import simplex_places
from ..sizes import require_bytes
from ..symmetry import canonicalize
from .placing import placed
from .progress import Cancel, Progress, Visits, Watch
from .proof import by_transformers

Device = torch.device | str
MOST_POINTS = 1001
_log = logging.getLogger("lmc_fast")


@overload
def barrier(
    pair: Pair,
    tokens: Given,
    alignment: Alignment | None = None,
    points: int = POINTS,
    *,
    name: str = "line",
    device: Device = "cpu",
    memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> Curve: ...
@overload
def barrier(
    pair: Models,
    tokens: Given,
    alignment: Alignment | None = None,
    points: int = POINTS,
    *,
    name: str = "line",
    device: Device = "cpu",
    memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> Curve | Simplex: ...
@device_errors()
def barrier(
    pair: Models,
    tokens: Given,
    alignment: Alignment | None = None,
    points: int = POINTS,
    *,
    name: str = "line",
    device: Device = "cpu",
    memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> Curve | Simplex:
    """Loss at places of the line between both checkpoints; of more than two, of every edge, at the centroid and inside.
    One block of all is held at a time.

    Args:
        pair: the models.
        tokens: held-out data: token ids (n, T) of integers, also numpy's, or Examples.
        alignment: by which they are aligned first; None: as they are.
        points: of the line, or of each edge, from 3 to 1001, by default 11, ends included.
        name: of the result.
        device: where to compute.
        memory: bytes that this process (on a GPU: its memory there) may take; None: what is convenient.
        progress: called in every stage, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.

    Returns:
        A Curve of a pair; of more models a Simplex, with the loss of their ensemble.

    Raises:
        LmcError: an argument makes no sense, the alignment is of other models, or a loss is not finite.
        TooSmall: `memory` is too little; `smallest` is enough.
        Cancelled: `cancel` says so.

    >>> pair = lmc.open_pair("A", "B")
    >>> alignment = lmc.Alignment.load("DIR/alignment.safetensors")
    >>> curve = lmc.barrier(pair, lmc.read_tokens("held-out.txt", pair.a, 16), alignment, points=3)
    >>> len(curve.losses), curve.barrier >= 0
    (3, True)
    """
    require_points(points)
    require_device(device)
    require_bytes(memory)
    tokens = as_data(tokens, pair.a)
    if alignment is not None:
        require_fitting(pair, alignment)
    if memory is not None:
        stages = _stages(pair.spec, tokens, device, len(pair.members))
        _require(stages.measuring(_count(pair, points), alignment is not None, held=True), memory, device)
    watch = Watch(progress, cancel)
    recorded = alignment.info.get("grown") if alignment else None
    pair = placed(pair, tokens, device, recorded, watch=watch)
    watch.begin("measuring", 1)
    return measure_line(pair, tokens, alignment, points, name, device, memory, watch.at)


def measure_line(
    pair: Models,
    tokens: Data,
    alignment: Alignment | None,
    points: int,
    name: str,
    device: Device,
    memory: int | None,
    visited: Callable[[int, int], None] | None = None,
    known: dict[float, Score] | None = None,
) -> Curve | Simplex:
    """As `barrier`; where `memory` is too little, the smallest portions are taken: a run has planned with them.

    visited: see engine.evaluate.line_scores; known: see evaluation.curve_between.
    """
    portions = {}
    if memory is not None:
        stages = _stages(pair.spec, tokens, device, len(pair.members))
        portions = asdict(stages.portions_of_line(_count(pair, points), memory, alignment is not None))
    members = [model.open_weights(device=device) for model in pair.members]
    if alignment:
        members = list(alignment.apply(*map(canonicalize, members)))
    if len(members) > 2:
        return simplex_between(members, tokens.to(device), points, name, visited, **portions)
    return curve_between(members[0], members[1], tokens.to(device), points, name, visited, known, **portions)


def _count(models: Models, points: int) -> int:
    """Places that are measured."""
    count = len(models.members)
    return points if count == 2 else len(simplex_places(count, points))


def require_fitting(models: Models, alignment: Alignment) -> None:
    """Raises LmcError unless there is an element for each model, in their order; warns where it was made for others."""
    require_alignment(alignment)
    count = len(alignment.members)
    if count != len(models.members):
        raise LmcError(f"this alignment is of {count} models, not of {len(models.members)}; give that of these models")
    inputs = alignment.info.get("inputs")
    made_for = inputs.get("members") if isinstance(inputs, dict) else None
    if not isinstance(made_for, list):
        return
    found = [model.checkpoint.identity.digests() for model in models.members]
    wrong = [
        x for x, y in zip(found, made_for, strict=False) if isinstance(y, dict) and x.keys() == y.keys() and x != y
    ]
    if wrong and sorted(map(str, found)) == sorted(map(str, made_for)):
        raise LmcError(
            "this alignment is of these models in another order; give them in the order they were aligned in"
        )
    if wrong:
        source = models.members[found.index(wrong[0])].source
        _log.warning("this alignment was made for another checkpoint than %s: what it does to it is not flat", source)


def require_points(points: int) -> None:
    """Raises LmcError for a number of points that makes no curve, or takes for ever."""
    if not isinstance(points, int) or not 3 <= points <= MOST_POINTS:
        raise LmcError(f"{points} points make no curve; use at least 3, and {MOST_POINTS} at most")


@device_errors()
def verify(
    a: Place,
    b: Place,
    tokens: Given | None = None,
    device: Device = "cpu",
    *,
    memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> tuple[Difference, bool]:
    """Do two checkpoints compute the same function? Computed by transformers wherever it can; the difference tells who
    did.

    Args:
        a: a checkpoint, as for open_pair.
        b: the other.
        tokens: data to compare on; None: random token ids or images.
        device: where to compute.
        memory: bytes that this process (on a GPU: its memory there) may take; None: what is convenient.
        progress: called for every block, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.

    Returns:
        The difference, and whether its KL is within the rounding of their dtypes (1e-8 nats for float32, 1e-4 for
        float16, 1e-2 for bfloat16).

    Raises:
        LmcError: one is not usable, or they are not comparable: another family or vocabulary.
        TooSmall: `memory` is too little; `smallest` is enough.
        Cancelled: `cancel` says so.

    >>> difference, same = lmc.verify("A", "DIR/a")
    >>> same, lmc.verify("A", "B")[1]
    (True, False)
    """
    require_device(device)
    require_bytes(memory)
    x, y = Model(a), Model(b)
    tokens = None if tokens is None else as_data(tokens, x)
    if memory is not None:
        data = _inputs(x, y) if tokens is None else tokens
        _require(max(_stages(m.spec, data, device).verifying(held=True) for m in (x, y)), memory, device)
    return compare(x, y, tokens, device, memory, Visits.of_models(Watch(progress, cancel), "verifying", x, y))


def compare(
    x: Model,
    y: Model,
    tokens: Data | None,
    device: Device = "cpu",
    memory: int | None = None,
    visited: Visits | None = None,
) -> tuple[Difference, bool]:
    """As `verify`; where `memory` is too little, the smallest portions are taken: a run has planned with them.

    visited: counts the blocks of both.
    """
    visited = visited or Visits.of_models(Watch(), "verifying", x, y)
    x, y = in_common(x, y)
    if (x.spec.family, x.spec.vocab) != (y.spec.family, y.spec.vocab):
        raise LmcError(
            f"{x.checkpoint.source} and {y.checkpoint.source} are not comparable: "
            f"{x.spec.family}/{x.spec.vocab} and {y.spec.family}/{y.spec.vocab}"
        )
    if tokens is None:
        tokens = _inputs(x, y)
    try:
        found = by_transformers(x, y, tokens, device, memory, visited)
    except Unreadable as error:
        _log.info("both models are compared by our own engine, since %s", error)
        portions = {}
        if memory is not None:
            wider = x.spec if x.spec.width >= y.spec.width else y.spec
            portions = asdict(_stages(wider, tokens, device).portions_of_comparison(memory))
        one, two = (visited.of(model.open_weights(device=device)) for model in (x, y))
        found = difference(one, two, tokens.to(device), **portions)
        found = replace(found, by=f"{OURS}, since {error}")
    return found, found.kl <= tolerance(x.coarsest_dtype, y.coarsest_dtype)


def _stages(spec: Spec, tokens: Data, device: Device, members: int = 2) -> Stages:
    """What measuring on this data takes, in this process as it is now."""
    return_freed_memory()
    return Stages(spec, spec.length(inputs_of(tokens).shape), counted_bytes(device), members)


def _require(least: int, memory: int, device: Device) -> None:
    if least > memory:
        raise TooSmall(memory, least, 0 if torch.device(device).type == "cuda" else UNCERTAIN)


def _inputs(x: Model, y: Model) -> Data:
    """Random tokens, or random images with random labels."""
    generator, spec = torch.Generator().manual_seed(0), x.spec
    if spec.image:
        shape = (8, spec.image.channels, spec.image.size, spec.image.size)
        return Examples(torch.randn(shape, generator=generator), torch.randint(spec.vocab, (8,), generator=generator))
    length = min(128, spec.max_positions, y.spec.max_positions)
    tokens = torch.randint(spec.table or spec.vocab, (8, length), generator=generator)
    if spec.task == "masked":
        return Examples(tokens, tokens)
    if spec.task in LABELLED:
        labels = torch.randint(spec.vocab, (8, length), generator=generator)
        return Examples(tokens, labels if spec.task == "tags" else labels[:, 0])
    return tokens
