"""Barriers and function checks of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ..alignment import Alignment
from ..budget import planner
from ..budget.meter import counted_bytes, return_freed_memory
from ..checkpoints import Model
from ..errors import LmcError
from ..evaluation import Curve, Difference, curve_between, difference
from ..evaluation.function import tolerance
from ..examples import Data, Examples, inputs_of
from ..pair import Pair
from ..symmetry import canonicalize

Device = torch.device | str


def barrier(
    pair: Pair,
    tokens: Data,
    alignment: Alignment | None = None,
    points: int = 11,
    *,
    name: str = "line",
    device: Device = "cpu",
    memory: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Curve:
    """Loss on tokens (n, T) at `points` places of the line between both checkpoints, aligned first if told how.

    One block of both is held at a time. memory: bytes that this may take; None: what is convenient. Raises LmcError.
    """
    if points < 3:
        raise LmcError(f"{points} points make no curve; use at least 3")
    portions = {}
    if memory is not None:
        return_freed_memory()
        length = pair.spec.length(inputs_of(tokens).shape)
        portions = asdict(planner.portions(pair.spec, length, points, memory, counted_bytes(device)))
    a, b = pair.a.open_weights(device=device), pair.b.open_weights(device=device)
    if alignment:
        a, b = alignment.apply(canonicalize(a), canonicalize(b))
    return curve_between(a, b, tokens.to(device), points, name, progress, **portions)


def verify(a: str | Path, b: str | Path, tokens: Data | None = None, device: Device = "cpu") -> tuple[Difference, bool]:
    """How far the functions of two checkpoints are apart, and whether that is within their dtypes' rounding.

    tokens: data to compare on; by default random token ids or images.
    """
    x, y = Model(a), Model(b)
    if (x.spec.family, x.spec.vocab) != (y.spec.family, y.spec.vocab):
        raise LmcError(
            f"{a} and {b} are not comparable: {x.spec.family}/{x.spec.vocab} and {y.spec.family}/{y.spec.vocab}"
        )
    if tokens is None:
        tokens = _random_inputs(x, y)
    found = difference(x.open_weights(device=device), y.open_weights(device=device), tokens.to(device))
    return found, found.kl <= tolerance(x.coarsest_dtype, y.coarsest_dtype)


def _random_inputs(x: Model, y: Model) -> Data:
    """Random tokens, or random images with random labels."""
    generator, spec = torch.Generator().manual_seed(0), x.spec
    if spec.image:
        shape = (8, spec.image.channels, spec.image.size, spec.image.size)
        return Examples(torch.randn(shape, generator=generator), torch.randint(spec.vocab, (8,), generator=generator))
    length = min(128, spec.max_positions, y.spec.max_positions)
    tokens = torch.randint(spec.table or spec.vocab, (8, length), generator=generator)
    return Examples(tokens, tokens) if spec.task == "masked" else tokens
