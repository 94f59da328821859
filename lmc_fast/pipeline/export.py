"""Stock checkpoints out: aligned endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

import torch

from ..alignment import Alignment
from ..budget.devices import device_errors, require_device
from ..checkpoints import Model, Place, Stock
from ..checkpoints import export as export_weights
from ..checkpoints.tensor_file import require_writable
from ..data import Given, as_data
from ..errors import LmcError
from ..evaluation import Difference
from ..examples import Data, inputs_of
from ..output import atomic_directory, disk_errors, partial_of, require_apart, user_path
from ..pair import Models
from ..symmetry import Transform, canonicalize, check_legal
from ..symmetry.grown import as_recorded
from .evaluate import compare, require_fitting
from .progress import Visits, Watch
from .room import alignment_bytes, endpoint_bytes, largest_file, require_room
from .run_directory import export_names

PROOF_SEQUENCES, PROOF_TOKENS = 16, 512  # a function that is another one differs at every token


@overload
def export(
    pair: Models,
    alignment: Alignment,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    tokens: Given | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Difference]: ...
@overload
def export(
    pair: Models,
    alignment: Alignment,
    *,
    in_memory: Literal[True],
    dtype: torch.dtype | None = None,
    tokens: Given | None = None,
    device: torch.device | str = "cpu",
) -> list[Stock]: ...
@device_errors()
def export(
    pair: Models,
    alignment: Alignment,
    out: str | Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    in_memory: bool = False,
    tokens: Given | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Difference] | list[Stock]:
    """Writes the aligned models as stock checkpoints, once all are proven to keep their functions.

    Args:
        pair: the models that were aligned, in order.
        alignment: what `align` found.
        out: a directory to create, for a/, b/, ... and alignment.safetensors.
        dtype: of the weights that are written; None: each model's own.
        in_memory: write nothing and return what would be written.
        tokens: data to prove it on, as for `align`; None: random.
        device: where to prove it.

    Returns:
        {name: how far what was written is from the original}; with in_memory the models as (config, state dict).

    Raises:
        LmcError: `out` exists and is not empty, the alignment is none of these models, or what was written does not
            keep its function. Nothing is left behind.

    >>> pair = lmc.open_pair("A", "B")
    >>> tokens = lmc.read_tokens("text.txt", pair.a, 16)
    >>> alignment = lmc.align(pair, tokens, steps=2, batch=2)
    >>> proof = lmc.export(pair, alignment, "EXPORT")
    >>> proof["a"].kl < 1e-9
    True
    >>> lmc.export(pair, alignment, in_memory=True)[0].model().num_parameters() > 10_000
    True
    """
    require_fitting(pair, alignment)
    require_writable(dtype)
    if (out is None) != in_memory:
        raise LmcError("export writes to `out`, or returns what it would write (in_memory=True): give one of them")
    require_device(device)
    tokens = None if tokens is None else as_data(tokens, pair.members[0])
    for transform in alignment.members:
        check_legal(transform, pair.spec)
    pair = pair.with_members(as_recorded(pair.members, alignment.info.get("grown")))
    if out is None:
        found = alignment.state_dicts(pair, dtype)
        prove(pair, found, tokens, device)
        require_unchanged(pair)
        return found
    target = user_path(out)
    require_apart((target, partial_of(target)), pair.homes)
    writes = sum(endpoint_bytes(model, dtype) for model in pair.members)
    writes += alignment_bytes(pair.spec, len(pair.members))
    require_room(partial_of(target), writes, max(largest_file(model, dtype) for model in pair.members))
    with atomic_directory(target, export_names(pair)) as work:
        export_into(pair, alignment, work, dtype)
        proof = prove(pair, [work / name for name in pair.names], tokens, device)
        alignment.save(work / "alignment.safetensors")
        require_unchanged(pair)
    return proof


def prove(
    pair: Models,
    written: Sequence[Place],
    tokens: Data | None = None,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Difference]:
    """How far what was written of each endpoint, as it is read back, is from the pair's.

    tokens: compared on at most PROOF_SEQUENCES of these, or PROOF_TOKENS tokens, by default on random ones. memory:
    bytes that this may take; a run has planned with them. Raises LmcError where an endpoint does not keep its function.
    """
    sample = None
    if tokens is not None:
        count = max(1, min(PROOF_SEQUENCES, PROOF_TOKENS // pair.spec.length(inputs_of(tokens).shape)))
        sample = tokens[:: max(1, len(tokens) // count)][:count]
    proof: dict[str, Difference] = {}
    visits = Visits.of_models(watch or Watch(), "verifying", *(2 * pair.members))
    for name, original, place in zip(pair.names, pair.members, written, strict=True):
        model = Model(place)
        found, same = compare(original.original, model, sample, device, memory, visits)
        if not same:
            short = model.dtype.itemsize < 4
            remedy = "write it in float32 (--dtype float32)" if short else "please report this as a bug"
            raise LmcError(
                f"the aligned {original.source} does not keep its function: KL {found.kl:.1e} nats to the original; "
                f"nothing is published; {remedy}"
            )
        proof[name] = found
    return proof


def export_into(
    pair: Models,
    alignment: Alignment,
    directory: Path,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> None:
    """Writes a/, b/, ... into an existing directory. Raises LmcError, also where an input changed meanwhile."""
    require_unchanged(pair)
    visits = Visits.of_models(watch or Watch(), "writing", *pair.members)
    for name, model, transform in zip(pair.names, pair.members, alignment.members, strict=True):
        with disk_errors(directory / name):
            export_endpoint(model, transform, directory / name, dtype, visits)
    require_unchanged(pair)


def require_unchanged(pair: Models) -> None:
    """Raises LmcError where a file of a model was written or replaced since it was opened."""
    for model in pair.members:
        model.checkpoint.identity.require_unchanged()


def export_endpoint(
    model: Model, transform: Transform, directory: Path, dtype: torch.dtype | None, visits: Visits | None = None
) -> None:
    """Canonical form and transform in float64, rounded once to the stored dtype; one block at a time."""
    weights = transform.apply(canonicalize(model.open_weights(torch.float64)))
    export_weights(visits.of(weights) if visits else weights, model, directory, dtype)
