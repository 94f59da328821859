"""Learning within a budget: the plan, and the models prepared on disk, from where they stream."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..architectures import Spec
from ..budget.demand import ACTIVATION, FP32, Demand, Job
from ..budget.devices import Device, here
from ..budget.meter import available_memory
from ..budget.planner import Plan, Strategy, plan
from ..budget.stages import Stages, TooSmall
from ..checkpoints import Weights
from ..errors import LmcError
from ..kernels.dispatch import activation_route
from ..learning import parallel
from ..learning.learner import Chunking
from ..learning.schedule import Schedule
from ..matching.activations import GATHERED
from ..matching.closed_form import Evidence
from ..members import member_names
from ..output import remove_own
from ..sizes import show_bytes
from ..streaming.packing import Piece
from ..streaming.ring import Streamed
from ..streaming.store import STORE_NAMES, Store
from ..symmetry import Transform
from ..symmetry.storage import pack
from .prepare import prepare
from .progress import Watch
from .room import require_room
from .run_directory import STORE

_log = logging.getLogger("lmc_fast")

Base = Sequence[Transform]  # of every member


def plan_learning(
    spec: Spec,
    schedule: Schedule,
    length: int,
    device: torch.device,
    budget: int,
    strategy: Strategy | None = None,
    *,
    members: int = 2,
) -> Plan:
    """How to learn within a budget on the device at hand. Raises TooSmall, which names the smallest that works."""
    sequences = -(-schedule.batch // parallel.place()[1])
    job = schedule_job(schedule, sequences * length, length, members)
    found = plan(spec, job, here(device), budget, strategy)
    _log.info("a plan for %s of memory, expected to take %s:", show_bytes(budget), show_bytes(found.total))
    for line in found.summary():
        _log.info("%s", line)
    return found


def schedule_job(schedule: Schedule, tokens: int, length: int, members: int) -> Job:
    """A step of `tokens` on so many models."""
    return Job(tokens, length, schedule.elements(members), schedule.teachers, members, schedule.at_once(members))


def tokens_to_gather(spec: Spec, length: int, device: Device, budget: int, most: int, members: int = 2) -> int:
    """How many tokens statistics of activations can be taken from within a budget, by halving.

    Raises TooSmall, also where another stage needs more.
    """
    stages = Stages(spec, length, device.base, members)
    least = max(stages.all(device.kind).values())
    if least > budget:
        raise TooSmall(budget, least, device.uncertain)
    while stages.matching(most) > budget:
        most = max(GATHERED, most // 2)
    return most


def disk_bytes(spec: Spec, evidence: Evidence, plan: Plan | None, members: int = 2) -> int:
    """Most that matching, and then learning, keep on disk at once."""
    job = Job(1, 1, members, members=members)
    statistics = Demand(spec, job, FP32).statistics_bytes if evidence.activations else 0
    return max(statistics, plan.store_bytes if plan else 0)


def chunking_of(plan: Plan) -> Chunking:
    strategy, job = plan.strategy, plan.job
    # three places of the line for all sequences of a step: fewer streams than its line, gradient and teachers have
    return Chunking(strategy.micro_batch, False, strategy.logits, strategy.boundaries_on_host, rows=job.sequences)


def route_of(plan: Plan, spec: Spec, device: torch.device) -> str:
    """The plan's way of computing as one of kernels.routes.ROUTES."""
    return activation_route(spec.width, plan.device.dtype, device) if plan.strategy.route == ACTIVATION else "weight"


@contextmanager
def on_disk(
    members: Sequence[Weights], base: Base, plan: Plan, directory: Path, device: torch.device, watch: Watch
) -> Iterator[Streamed]:
    """The models, moved by `base`, from a store in `directory`: the one that is there, or one that is made now.

    Raises LmcError where the disk has too little room for it.
    """
    key = _key(base)
    if parallel.place()[0] == 0:
        _make(members, base, plan, directory / STORE, key, watch)
    parallel.wait()
    store = Store.open(directory / STORE, members[0].spec, key)
    pinned = plan.device.kind == "cuda" and plan.host_bytes < 0.9 * available_memory()
    with Streamed(store, device, max(plan.buffers, 1), plan.resident, pinned=pinned) as source:
        yield source


def _make(members: Sequence[Weights], base: Base, plan: Plan, target: Path, key: str, watch: Watch) -> None:
    spec = members[0].spec
    if target.exists():
        try:
            Store.open(target, spec, key).verify()  # rows of embeddings are read without a checksum, later
            return
        except LmcError as error:
            _log.info("%s: it is made anew", error)
            remove_own(target, STORE_NAMES)
    require_room(target.parent, plan.store_bytes)
    pieces = _watched(prepare(members, base, plan.device.dtype), watch, spec.layers)
    Store.create(target, spec, pieces, plan.device.dtype, key=key, members=len(members))


def _watched(pieces: Iterator[Piece], watch: Watch, layers: int) -> Iterator[Piece]:
    """Tells of every block that is asked for, and holds none."""
    while True:
        piece = next(pieces, None)
        if piece is None:
            return
        watch.at(piece[0] if isinstance(piece[0], int) else 0, layers)
        yield piece
        del piece


def _key(base: Base) -> str:
    """What was prepared, told by the transforms that were found for it."""
    digest, names = hashlib.sha256(), member_names(len(base))
    packed = {name: t for member, part in zip(names, base, strict=True) for name, t in pack(part, member).items()}
    for name, t in sorted(packed.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
