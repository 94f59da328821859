"""What can be told of checkpoints before anything is loaded: what they are, whether they match, what learning takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..budget.devices import profile as profile_of
from ..budget.planner import Plan
from ..budget.planner import plan as plan_within
from ..checkpoints import Model, notes_on
from ..data import read_data, sequence_length
from ..errors import LmcError
from ..learning.schedule import Schedule
from ..pair import models_of, open_models
from ..sizes import parse_bytes
from ..symmetry import Group, legal_groups
from ..symmetry.grown import GrownModel
from .budgeted import schedule_job
from .placing import placed


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    groups: the symmetries of the architecture, each with the reason why it can be used or not. notes: what is unusual
    about the checkpoint; others, other_notes: the same of the further ones. problem: why they cannot be aligned (None:
    they can); grown: how models of different sizes are grown to one; warnings: what is not as it might be expected.

    >>> lmc.inspect("A").model.spec.family
    'gpt_neox'
    """

    model: Model
    groups: list[Group]
    notes: tuple[str, ...]
    others: tuple[Model, ...] = ()
    other_notes: tuple[tuple[str, ...], ...] = ()
    problem: str | None = None
    grown: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def match(self) -> bool | None:
        """Whether the checkpoints can be aligned; None where there is one."""
        return self.problem is None if self.others else None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "family": self.model.spec.family,
            "groups": [vars(group) for group in self.groups],
            "notes": list(self.notes),
        }
        if not self.others:
            return found
        more = {"grown": list(self.grown), "warnings": list(self.warnings)}
        return found | {"match": self.match, "problem": self.problem} | more


def inspect(
    path: str | Path,
    other: str | Path | None = None,
    data: str | Path | None = None,
    *,
    more: Sequence[str | Path] = (),
) -> Inspection:
    """What a checkpoint (a directory or a hub id) is, which symmetries it has, and whether `other`, or that and `more`,
    can be aligned with it. Only headers are read, unless blocks are to be added to one of them: data is a file, as for
    read_data, that tells where. Raises LmcError where one of them is not usable.

    >>> found = lmc.inspect("A", "B")
    >>> found.problem is None, [group.name for group in found.groups if group.legal][:2]
    (True, ['norm absorption', 'residual rotation'])
    """
    places = [path, *([] if other is None else [other]), *more]
    models = [Model(place, headers_only=data is None) for place in places]
    model, *others = models
    alone = Inspection(model, legal_groups(model.spec), tuple(notes_on(model)))
    if not others:
        return alone
    both = replace(alone, others=tuple(others), other_notes=tuple(tuple(notes_on(each)) for each in others))
    try:
        found = models_of(models)
    except LmcError as error:
        return replace(both, problem=str(error))
    if data is not None:
        found = placed(found, read_data(data, found.a, sequence_length(found.a)))
    grown = tuple(m.summary for m in found.members if isinstance(m, GrownModel))
    return replace(both, grown=grown, warnings=found.warnings)


def plan(
    a: str | Path,
    b: str | Path,
    *more: str | Path,
    memory: int | str,
    device: torch.device | str = "cpu",
    profile: str = "here",
    tokens: int | None = None,
    length: int | None = None,
    schedule: Schedule | None = None,
) -> Plan:
    """How `align(..., memory=...)` would learn the pair, or more models, and what to expect. Only headers are read.

    memory: bytes, or a text such as "8GiB". profile: a device of budget.devices.PROFILES to plan for, or "here": what
    `device` is. tokens: in a step, by default the schedule's batch of sequences; length: tokens in a sequence, by
    default 128 or as many as the model has positions.

    Raises LmcError for a pair that cannot be aligned, and TooSmall where no plan fits, with the smallest that does.

    >>> found = lmc.plan("A", "B", memory="2GiB", length=16)
    >>> found.total <= found.budget == 2 << 30
    True
    """
    for name, value in (("tokens", tokens), ("length", length)):
        if value is not None and value < 1:
            raise LmcError(f"{name} must be at least 1, not {value}")
    budget = parse_bytes(memory)
    pair = open_models([a, b, *more], headers_only=True)
    schedule = schedule or Schedule()
    length = pair.spec.position_rows if pair.spec.image else sequence_length(pair.a, length)
    job = schedule_job(schedule, tokens or schedule.batch * length, length, len(pair.members))
    return plan_within(pair.spec, job, profile_of(profile, device), budget)
