"""Where the empty blocks of a grown model go: by how alike the streams of two models are, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checkpoints.weights import Model, Weights
from ..engine.layerwise import Walk
from ..examples import Data, inputs_of
from ..symmetry.grown import GrownModel
from ..symmetry.growth import place_by

TOKENS = 2048  # that both models read, or one sequence
ROWS = 256  # of the stream that are compared: as many squared are kept for every block
FEWEST = 16  # with less nothing can be said
log = logging.getLogger("lmc_fast")


def place(
    models: Sequence[Model],
    data: Data,
    device: torch.device | str = "cpu",
    visited: Callable[[int, int], None] | None = None,
) -> list[Model]:
    """The same models; those that were grown by blocks have these where their streams are most like those of the first
    model that has all blocks of its own, in the order of blocks (symmetry.growth.place_by). One block at a time.

    visited: told how many blocks of how many were walked through.
    """
    whole = next((model for model in models if not adds_blocks(model)), None)
    if whole is None or not any(adds_blocks(model) for model in models):
        return list(models)
    inputs = inputs_of(data)
    count = max(1, min(len(inputs), TOKENS // whole.spec.length(inputs.shape)))
    sample = inputs[:: len(inputs) // count][:count].to(device)
    if len(sample) * whole.spec.length(sample.shape) < FEWEST:
        return list(models)
    compared = [whole, *(model for model in models if adds_blocks(model))]
    done, total = 0, sum(model.original.spec.layers for model in compared)

    def kernels_of(model: Model) -> list[Tensor]:
        nonlocal done
        found = stream_kernels(model.original.open_weights(device=device), sample)
        done += model.original.spec.layers
        if visited:
            visited(done, total)
        return found

    theirs = kernels_of(whole)
    found = [_placed(model, kernels_of(model), theirs) if adds_blocks(model) else model for model in models]
    for model in found:
        if isinstance(model, GrownModel) and model.adds_blocks:
            log.info(model.summary)
    return found


def adds_blocks(model: Model) -> bool:
    """Whether it was grown, by blocks among other things."""
    return isinstance(model, GrownModel) and model.adds_blocks


def _placed(model: Model, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Model:
    assert isinstance(model, GrownModel)
    found = place_by(similarity(ours, theirs), model.original.spec, model.spec)
    assert found is not None  # there was one when it was grown
    return model.placed(found, "by the similarity of streams")


@torch.no_grad()
def stream_kernels(weights: Weights, inputs: Tensor) -> list[Tensor]:
    """Of the stream behind the first 0, 1, ... blocks, as norms see it: inner products (n, n) between tokens, centred
    and without the diagonal, so that products of two of them are unbiased (Song et al. 2012, Kornblith et al. 2019).
    """
    walk = Walk(weights, [inputs])
    kernels = [_kernel(weights.spec.norms.kind, walk.streams[0])]
    for index in range(weights.spec.layers):
        walk.advance_all(index)
        kernels.append(_kernel(weights.spec.norms.kind, walk.streams[0]))
    return kernels


def _kernel(norm: str, stream: Tensor) -> Tensor:
    rows = stream.flatten(0, -2)
    rows = rows[:: max(1, len(rows) // ROWS)][:ROWS]
    if norm == "layernorm":
        rows = rows - rows.mean(1, keepdim=True)
    rows = torch.nn.functional.normalize(rows, dim=1)
    k, n = (rows @ rows.mT).fill_diagonal_(0), len(rows)
    mean = k.sum(1, keepdim=True) / (n - 2)
    return (k - mean - mean.mT + mean.sum() / (n - 1)).fill_diagonal_(0)


def similarity(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Centred kernel alignment of each of our kernels with each of theirs: (l + 1, L + 1), at most 1."""
    values = [[float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-30)) for y in theirs] for x in ours]
    return torch.tensor(values, dtype=torch.float64)
