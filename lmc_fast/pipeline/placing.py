"""Where the empty blocks of grown models are."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from ..budget.meter import Meter
from ..examples import Data
from ..matching.placement import adds_blocks, place
from ..pair import M
from ..symmetry.grown import Record, as_recorded
from .progress import Watch


def placed(
    pair: M,
    data: Data,
    device: torch.device | str = "cpu",
    record: Record | None = None,
    *,
    meter: Meter | None = None,
    watch: Watch | None = None,
) -> M:
    """The pair with its empty blocks where a record of before has them, or else where `data` says they fit best."""
    models, watch = pair.members, watch or Watch()
    if record is None and not any(adds_blocks(model) for model in models):
        return pair
    if record is not None:
        found = as_recorded(models, record)
    else:
        with meter.stage("placing") if meter else nullcontext():
            watch.begin("placing", sum(model.original.spec.layers for model in models))
            found = place(models, data, device, watch.at)
    return pair.with_members(found)
