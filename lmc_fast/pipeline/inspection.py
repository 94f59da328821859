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

    Attributes:
        model: the first checkpoint; its `spec` says what it is.
        groups: the symmetries of the architecture, each with the reason why it can be used or not.
        notes: what is unusual about the first checkpoint, in sentences.
        others: the further checkpoints.
        other_notes: the notes on each of them.
        problem: why they cannot be aligned; None: they can, or there is one.
        grown: how models of different sizes are grown to one, in sentences.
        warnings: what is not as it might be expected, in sentences.

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
        """As `lmc-fast inspect --json` prints it.

        Returns:
            family, groups and notes; of several checkpoints also match, problem, grown and warnings.
        """
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
    """What a checkpoint is, which symmetries it has, and whether others can be aligned with it. Only headers are read,
    unless blocks are to be added to a model.

    Args:
        path: a checkpoint directory or a hub id.
        other: another one, to compare with it.
        data: a file as for read_data, that tells where blocks are to be added to the smaller model.
        more: further ones.

    Returns:
        What was found; of checkpoints that do not match, `problem` says why.

    Raises:
        LmcError: one of them is not usable by itself.

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
    """How `align(..., memory=...)` would learn the models, and what to expect. Only headers are read.

    Args:
        a: a checkpoint directory or a hub id.
        b: the other.
        *more: further ones.
        memory: bytes, or a text such as "8GiB".
        device: that "here" means.
        profile: a device to plan for, see `lmc-fast plan --help`; "here": `device`, measured for a moment.
        tokens: in a step; None: the schedule's batch of sequences.
        length: tokens in a sequence; None: 128, or as many as the model has positions.
        schedule: how to learn; None: as `align` does.

    Returns:
        The plan with the shortest step.

    Raises:
        TooSmall: no plan fits; `smallest` is the least budget that does.
        LmcError: the models cannot be aligned, or an argument makes no sense.

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
