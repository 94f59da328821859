"""The loss of an ensemble, Σ share · p of each member: what no average of weights is expected to be better than."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..examples import Data
from .attention import Positions
from .block import block
from .evaluate import STREAM_ELEMENTS
from .head import CHUNK_ELEMENTS, HeadInputs, softmax_
from .model import embed, head_rows, labels, model_inputs
from .passes import visit_order
from .slots import Slots
from .source import Source


@torch.no_grad()
def ensemble_loss(
    source: Source,
    data: Data,
    shares: Sequence[float] | None = None,
    batch: int = 32,
    rows: int | None = None,
    logits: int = CHUNK_ELEMENTS,
    visited: Callable[[int], None] | None = None,
) -> float:
    """Mean loss in nats per prediction of the mixture of all members' predictions, by default with equal shares.

    batch: rows of data that go through a block together; rows: whose streams are held at a time, by default as many as
    make STREAM_ELEMENTS; logits: how many are held at a time; visited: told the number of each segment before it is
    visited.
    """
    if source.spec.task == "features":
        return 0.0  # the mixture is what distances are measured from
    spec, count = source.spec, len(source.ends)
    length = spec.length(model_inputs(data).shape)
    rows = max(batch, rows or STREAM_ELEMENTS // (count * length * spec.width))
    weights = torch.tensor(shares or [1 / count] * count, dtype=torch.float64).log()
    sums = [_of_rows(source, some, weights, batch, logits, visited) for some in data.split(rows)]
    return sum(loss for loss, _ in sums) / sum(predictions for _, predictions in sums)


def _of_rows(
    source: Source,
    data: Data,
    weights: Tensor,
    batch: int,
    logits: int,
    visited: Callable[[int], None] | None,
) -> tuple[float, int]:
    """(sum of losses, number of predictions), of rows whose streams are held together."""
    spec, count = source.spec, len(source.ends)
    parts = [part for part in data.split(batch) if len(labels(part))]
    if not parts:
        return 0.0, 0
    source.begin(visit_order(spec.layers, source.head_parts, learn=False))
    streams = [_embedded(source, part) for part in parts]
    positions = Positions.of(spec, streams[0][0].shape[1], streams[0][0].dtype, streams[0][0].device)
    for i in range(spec.layers):
        if visited:
            visited(i)
        with source.visit(i) as members:
            for each in streams:
                for k, w in enumerate(members):
                    each[k] = block(spec, w, each[k], positions, i)
    heads = [
        [HeadInputs([_read(source, w, x, part)], [1.0]) for w, x in zip(source.ends, each, strict=True)]
        for each, part in zip(streams, parts, strict=True)
    ]
    picked = [torch.zeros(count, len(labels(part)), dtype=torch.float64, device=labels(part).device) for part in parts]
    start = 0
    for k in range(source.head_parts):
        if visited:
            visited(spec.layers + k)
        with source.visit(spec.layers + k) as members:
            for part, head, found in zip(parts, heads, picked, strict=True):
                for own, w, mine in zip(head, members, found, strict=True):
                    _scan(own, w, start, labels(part), mine, spec.head_softcap, logits)
            start += len(members[0]["head"])
    total = 0.0
    for head, found in zip(heads, picked, strict=True):
        likelihood = found - torch.stack([own.normaliser.double() for own in head])
        total -= float(torch.logsumexp(likelihood + weights[:, None].to(likelihood.device), 0).sum())
    return total, sum(found.shape[1] for found in picked)


def _embedded(source: Source, part: Data) -> list[Tensor]:
    inputs, rows = model_inputs(part), None
    ends = [dict(slots) for slots in source.ends]
    if not source.spec.image:
        used, rows = inputs.unique(return_inverse=True)
        for w, table in zip(ends, source.embed_rows(used), strict=True):
            w["embed"] = table
    return [embed(source.spec, w, inputs, rows) for w in ends]


def _read(source: Source, w: Slots, x: Tensor, part: Data) -> Tensor:
    return head_rows(source.spec, w, x, part)


def _scan(head: HeadInputs, w: Slots, start: int, target: Tensor, found: Tensor, softcap: float, most: int) -> None:
    """Takes a run of the head's rows into the normaliser, and the targets' logits among them into `found`."""
    weight, count = w["head"], len(target)
    step = max(1, most // len(weight))
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        made = head.logits([weight], w.get("head_bias"), rows, softcap)
        place = target[rows] - start
        here = (place >= 0) & (place < len(weight))
        found[rows] += made.gather(1, place.clamp(0, len(weight) - 1)[:, None])[:, 0] * here
        head.see(softmax_(made, scaled=False), rows)
