"""Growing a checkpoint on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..budget.devices import require_device
from ..checkpoints import Model, checkpoint_names
from ..checkpoints import export as export_weights
from ..checkpoints.tensor_file import require_writable
from ..data import Given, as_data
from ..errors import LmcError
from ..examples import Data
from ..output import atomic_directory, check_target, disk_errors, partial_of, require_apart, user_path
from ..pair import open_pair
from ..symmetry.grown import GrownModel
from .evaluate import compare
from .placing import placed
from .progress import Cancel, Progress, Visits, Watch
from .room import endpoint_bytes, largest_file, require_room

PROOF_SEQUENCES = 16


def grow(
    model: str | Path,
    like: str | Path,
    out: str | Path | None = None,
    *,
    tokens: Given | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> Model:
    """A checkpoint as one of the size of another, with the same function: read so, or written and proven. Where each is
    the larger one in some respect, it gets the smallest size that has room for both.

    Args:
        model: a checkpoint directory or a hub id.
        like: the larger one.
        out: a directory to create; None: nothing is written.
        tokens: data that tells where empty blocks go, and on which what was written is compared; None: they are spread
            evenly, and it is compared on random data.
        dtype: of the weights that are written; None: the checkpoint's own.
        device: where to compute.
        progress: called in every stage, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.

    Returns:
        The grown model: as read from `out`, or as the checkpoint is read so.

    Raises:
        LmcError: it cannot be grown, with the reason, or is no smaller; otherwise as `export` does.
        Cancelled: `cancel` says so; nothing is left behind.

    >>> lmc.grow("SMALL", "A").spec.layers
    2
    """
    device = require_device(device)
    require_writable(dtype)
    pair, watch = open_pair(model, like), Watch(progress, cancel)
    if tokens is not None:
        tokens = as_data(tokens, pair.a)
        pair = placed(pair, tokens, device, watch=watch)
    grown = pair.a
    if not isinstance(grown, GrownModel):
        raise LmcError(f"{model} is no smaller than {like}: there is nothing to grow")
    if out is None:
        return grown
    target = user_path(out)
    require_apart((target, partial_of(target)), pair.homes)
    check_target(target)
    require_room(partial_of(target), endpoint_bytes(grown, dtype), largest_file(grown, dtype))
    with atomic_directory(target, checkpoint_names(grown.home)) as work:
        weights = Visits.of_models(watch, "writing", grown).of(grown.open_weights(torch.float64, device))
        with disk_errors(work):
            export_weights(replace(weights, spec=replace(weights.spec, tied=grown.spec.tied)), grown, work, dtype)
        require_same_function(grown, Model(work), tokens, device, watch)
        grown.checkpoint.identity.require_unchanged()
    return Model(target)


def require_same_function(
    grown: GrownModel, written: Model, tokens: Data | None, device: torch.device, watch: Watch | None = None
) -> None:
    """Raises LmcError where what was written computes something else."""
    sample = None if tokens is None else tokens[:PROOF_SEQUENCES]
    visits = Visits.of_models(watch or Watch(), "verifying", grown.original, written)
    found, same = compare(grown.original, written, sample, device, visited=visits)
    if not same:
        remedy = "write it in float32 (--dtype float32)" if written.dtype.itemsize < 4 else "please report this"
        raise LmcError(
            f"the grown {grown.source} does not keep its function: KL {found.kl:.1e} nats to the original; nothing is "
            f"published; {remedy}"
        )
