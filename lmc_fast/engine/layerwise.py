"""A model over several batches, block by block: all of them go through a block before the next one is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checkpoints.lazy import Slots
from ..checkpoints.weights import Weights
from ..examples import Data, inputs_of
from .attention import Observer, Positions, ignore
from .block import block
from .model import embed, head_input, model_inputs, target_rows


class Walk:
    """The residual streams of all batches of one model, as far as it has been walked through.

    batches: inputs as in model.embed, of one length. The model may be lazy.
    """

    def __init__(self, weights: Weights, batches: Sequence[Tensor]):
        self.weights = weights
        self.streams = [embed_some(weights, inputs) for inputs in batches]  # (batch, T, d) each
        first = self.streams[0]
        self._positions = Positions.of(weights.spec, first.shape[1], first.dtype, first.device)

    def advance(self, batch: int, index: int, slots: Slots, observe: Observer = ignore) -> None:
        """Takes one batch through block `index`, whose slots are given; `observe` as in engine.block."""
        spec = self.weights.spec
        self.streams[batch] = block(spec, slots, self.streams[batch], self._positions, index, observe)

    def advance_all(self, index: int) -> None:
        """Loads block `index` and takes every batch through it."""
        slots = self.weights.blocks[index]
        for batch in range(len(self.streams)):
            self.advance(batch, index, slots)


def embed_some(weights: Weights, inputs: Tensor) -> Tensor:
    """model.embed, of lazy weights with those rows of the table alone that the inputs name."""
    table, ends = weights.tables.get("embed"), weights.ends
    if table is None:
        return embed(weights.spec, ends, inputs)
    tokens, rows = inputs.unique(return_inverse=True)
    return embed(weights.spec, ends | {"embed": table.pick(tokens)}, inputs, rows)


def head_inputs(weights: Weights, data: Data, batch: int) -> Tensor:
    """What the head reads wherever `data` asks for a prediction, or of features for every input (and token): (n, d).

    As model.prediction_rows, but with one block at a time in memory, and `batch` inputs going through it together.
    """
    spec, parts = weights.spec, data.split(batch)
    whole = spec.task == "features"
    inputs = [inputs_of(part) if whole else model_inputs(part) for part in parts]
    walk = Walk(weights, inputs)
    for index in range(spec.layers):
        walk.advance_all(index)
    read = [head_input(spec, weights.ends, x, y) for x, y in zip(walk.streams, inputs, strict=True)]
    rows = [x.flatten(0, -2) if whole else target_rows(x, part) for x, part in zip(read, parts, strict=True)]
    return torch.cat(rows)
