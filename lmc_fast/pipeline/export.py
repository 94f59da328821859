"""Stock checkpoints out: aligned endpoints and merged models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment import Alignment
from ..checkpoints import LazyBlocks, Model, Slots, Stored, Table, Weights, checkpoint_names, write_checkpoint
from ..checkpoints import export as export_weights
from ..checkpoints.reader import RUN_ELEMENTS
from ..errors import LmcError
from ..evaluation import Difference
from ..examples import Data
from ..output import atomic_directory, check_target, disk_errors, partial_of, require_apart, user_path
from ..pair import Pair, open_pair
from ..symmetry import Transform, canonicalize, check_legal
from .evaluate import compare
from .progress import Watch
from .room import alignment_bytes, endpoint_bytes, largest_file, require_room
from .run_directory import export_names

PROOF_SEQUENCES = 16


def export(
    pair: Pair,
    alignment: Alignment,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    tokens: Data | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Difference]:
    """Writes out/a and out/b (stock checkpoints) and out/alignment.safetensors, once both are proven; see `prove`.

    dtype: of the weights on disk, each endpoint's own by default. tokens: data to prove it on, by default random.

    Raises LmcError, and leaves nothing behind, if `out` exists and is not empty, if the alignment is none of this pair,
    or if what was written does not keep its function.
    """
    for transform in (alignment.a, alignment.b):
        check_legal(transform, pair.spec)
    target = user_path(out)
    require_apart((target, partial_of(target)), (pair.a.path, pair.b.path))
    writes = sum(endpoint_bytes(model, dtype) for model in (pair.a, pair.b)) + alignment_bytes(pair.spec)
    require_room(partial_of(target), writes, max(largest_file(model, dtype) for model in (pair.a, pair.b)))
    with atomic_directory(target, export_names(pair.a, pair.b)) as work:
        export_into(pair, alignment, work, dtype)
        proof = prove(pair, work, tokens, device)
        alignment.save(work / "alignment.safetensors")
        require_unchanged(pair)
    return proof


def prove(
    pair: Pair,
    directory: Path,
    tokens: Data | None = None,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Difference]:
    """How far directory/a and directory/b, as they are read back, are from the pair's endpoints.

    tokens: compared on at most PROOF_SEQUENCES of these, by default on random ones. memory: bytes that this may take;
    a run has planned with them. Raises LmcError where an endpoint does not keep its function.
    """
    sample = None if tokens is None else tokens[:PROOF_SEQUENCES]
    proof: dict[str, Difference] = {}
    watch = watch or Watch()
    watch.begin("verifying", 2)
    for name, original in (("a", pair.a), ("b", pair.b)):
        written = Model(directory / name)
        found, same = compare(original, written, sample, device, memory)
        if not same:
            short = written.dtype.itemsize < 4
            remedy = "write it in float32 (--dtype float32)" if short else "please report this as a bug"
            raise LmcError(
                f"the aligned {original.source} does not keep its function: KL {found.kl:.1e} nats to the original; "
                f"nothing is published; {remedy}"
            )
        proof[name] = found
        watch.at(len(proof), 2)
    return proof


def export_into(
    pair: Pair,
    alignment: Alignment,
    directory: Path,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> None:
    """Writes a/ and b/ into an existing directory. Raises LmcError, also where an input changed since it was opened."""
    require_unchanged(pair)
    watch = watch or Watch()
    watch.begin("writing", 2)
    for name, model, transform in (("a", pair.a, alignment.a), ("b", pair.b, alignment.b)):
        with disk_errors(directory / name):
            export_endpoint(model, transform, directory / name, dtype)
        watch.at(1 + (name == "b"), 2)
    require_unchanged(pair)


def require_unchanged(pair: Pair) -> None:
    """Raises LmcError where a file of the pair was written or replaced since it was opened."""
    for model in (pair.a, pair.b):
        model.checkpoint.identity.require_unchanged()


def export_endpoint(model: Model, transform: Transform, directory: Path, dtype: torch.dtype | None) -> None:
    """Canonical form and transform in float64, rounded once to the stored dtype; one block at a time."""
    weights = model.open_weights(torch.float64)
    export_weights(transform.apply(canonicalize(weights)), model, directory, dtype)


def merge(a: str | Path, b: str | Path, out: str | Path, weight: float = 0.5) -> None:
    """Writes the plain average (1 - weight) A + weight B of two checkpoints, tensor by tensor, in A's dtype.

    Raises LmcError if the checkpoints do not match, or `out` exists and is not empty.
    """
    if not 0 <= weight <= 1:
        raise LmcError(f"weight {weight} is not between 0 and 1")
    target = user_path(out)
    require_apart((target, partial_of(target)), (a, b))
    check_target(target)
    pair = open_pair(a, b)
    require_room(partial_of(target), endpoint_bytes(pair.a), largest_file(pair.a))
    with atomic_directory(target, checkpoint_names(pair.a.path)) as work:
        if pair.a.folds == pair.b.folds:
            write_checkpoint(work, _averaged(pair, weight), _config(pair), pair.a.path)
        else:  # what one folds into its weights the other does not: the same numbers mean something else
            export_weights(_mixed_slots(pair, weight), pair.a, work)
        require_unchanged(pair)


def _config(pair: Pair) -> dict[str, Any]:
    """A's, with the vocabulary and the tie that both have in common."""
    config = dict(pair.a.checkpoint.config)
    if "vocab_size" in config:
        config["vocab_size"] = pair.a.vocabulary
    if "tie_word_embeddings" in config or getattr(pair.a.config, "tie_word_embeddings", False):
        config["tie_word_embeddings"] = pair.a.spec.tied and pair.b.spec.tied
    return config


def _averaged(pair: Pair, weight: float) -> Iterator[Stored]:
    """The tensors of the family's table under A's names, whatever both store and call them; A's buffers."""
    ours, theirs, left, right = pair.a.coverage, pair.b.coverage, pair.a.checkpoint, pair.b.checkpoint
    ties = pair.a.family.ties(pair.spec) if pair.a.spec.tied and pair.b.spec.tied else []
    once = {c.name for c, o in ties if all(k.names.get(c.name) == k.names.get(o.name) for k in (ours, theirs))}
    for name, entry, _ in pair.a.family.entries(replace(pair.spec, tied=False)):
        x, y = ours.names.get(name), theirs.names.get(name)
        if name in once or not (x or y):
            continue
        disk, shape = ours.own.get(name, name), entry.shape(pair.spec)
        if x and y:
            yield Stored(disk, left.stored_dtype(x), shape, partial(_mixed, pair, (x, y), shape, weight))
        else:  # an optional one, such as a pooler, that only one of both has
            of, own = (left, x) if x else (right, y)
            assert own is not None
            yield Stored(disk, of.stored_dtype(own), shape, partial(of.read_runs, own))
    for name in ours.buffers:
        yield Stored(name, left.stored_dtype(name), left.shape(name), partial(left.read_runs, name))


def _mixed_slots(pair: Pair, weight: float) -> Weights:
    """The average in normal form, one block at a time."""
    a, b = (model.open_weights(torch.float64) for model in (pair.a, pair.b))

    def mix(x: Slots, y: Slots) -> Slots:
        return {name: torch.lerp(x.pop(name), y.pop(name), weight) for name in list(x)}

    def rows(name: str, start: int, stop: int) -> Tensor:
        return torch.lerp(a.tables[name].rows(start, stop), b.tables[name].rows(start, stop), weight)

    tables = {name: Table(table.shape, partial(rows, name)) for name, table in a.tables.items()}
    blocks = LazyBlocks(len(a.blocks), lambda i: mix(a.blocks[i], b.blocks[i]))
    return Weights(a.spec, mix(dict(a.ends), dict(b.ends)), blocks, tables)


def _mixed(pair: Pair, names: tuple[str, str], shape: tuple[int, ...], weight: float) -> Iterator[Tensor]:
    """The average of one tensor, or of its first rows, by runs of its first dimension."""
    name, size = names[0], max(1, RUN_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], size):
        stop = min(start + size, shape[0])
        x, y = (m.checkpoint.read_rows(n, start, stop) for m, n in zip((pair.a, pair.b), names, strict=True))
        if x.is_floating_point():
            wide = torch.promote_types(x.dtype, torch.float32)
            mixed = torch.lerp(x.to(wide), y.to(wide), weight)
            if not mixed.isfinite().all():  # the difference of two huge numbers; their average is none
                mixed = torch.lerp(x.double(), y.double(), weight)
            mixed = mixed.to(x.dtype)
            if not mixed.isfinite().all():
                raise LmcError(f"the average of tensor {name} overflows in {x.dtype}; merge with the other model first")
            yield mixed
        else:
            yield x
