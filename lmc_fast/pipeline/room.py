"""Whether the disk has room for what will be written, asked before any work."""

from __future__ import annotations

import math
import resource
import shutil
from pathlib import Path

import torch

from ..architectures import Spec
from ..checkpoints import Model
from ..checkpoints.writer import SHARD_BYTES, companion_bytes
from ..errors import LmcError
from ..sizes import show_bytes
from ..symmetry.charts import Chart

_FLOAT64, _FLOAT32 = 8, 4
_SMALL = 1 << 18  # config, header, report, pictures


def require_room(directory: Path, needed: int, largest: int = 0) -> None:
    """Raises LmcError where the disk has less than `needed` bytes, or files of `largest` bytes are not allowed."""
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    room = shutil.disk_usage(directory).free
    if room < needed:
        raise LmcError(
            f"{directory} has {show_bytes(room)} free, but up to {show_bytes(needed)} are needed there; free some space"
        )
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if allowed != resource.RLIM_INFINITY and largest > allowed:
        raise LmcError(
            f"files of {show_bytes(allowed)} are allowed here, but {show_bytes(largest)} are needed; raise ulimit -f"
        )


def endpoint_bytes(model: Model, dtype: torch.dtype | None = None) -> int:
    """At most, of a checkpoint written from `model`; a tied head is written as well."""
    spec, stored = model.spec, model.checkpoint
    if model.original is model:
        sizes = [(math.prod(stored.shape(name)), stored.stored_dtype(name)) for name in stored.names]
    else:
        tensors = model.family.entries(spec, spec.tied)
        held = [(name, entry, i) for name, entry, i in tensors if i is not None or name in model.coverage.names]
        sizes = [(math.prod(entry.shape(spec)), model.stored_as(name, i)[1]) for name, entry, i in held]
    total = sum(size * (dtype or own).itemsize for size, own in sizes)
    head = spec.vocab * spec.width if spec.tied else 0
    return total + head * (dtype or model.dtype).itemsize + companion_bytes(model.home) + _SMALL


def largest_file(model: Model, dtype: torch.dtype | None = None) -> int:
    """Of those files."""
    return min(endpoint_bytes(model, dtype), SHARD_BYTES)


def alignment_bytes(spec: Spec, members: int = 2) -> int:
    """At most: an element of each model, and one that was matched before."""
    return 2 * members * _element_bytes(spec) + _SMALL


def state_bytes(spec: Spec, sides: int, members: int = 2) -> int:
    """At most, of what a run that learns keeps: matched elements; coordinates, their best, and two moments each."""
    leaves = Chart(spec, sides, device="meta", members=members).tensors.values()
    return members * _element_bytes(spec) + 4 * _FLOAT32 * sum(t.numel() for t in leaves) + _SMALL


def _element_bytes(spec: Spec) -> int:
    att, experts = spec.attention, spec.ffn.experts
    block = 4 * att.kv_heads * att.head_dim**2 + att.kv_heads + att.heads
    block += 2 * spec.ffn.width + experts.count * (1 + 2 * experts.width)
    return _FLOAT64 * (spec.width**2 + spec.width + spec.layers * block)
