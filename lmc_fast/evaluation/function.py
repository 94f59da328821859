"""Do two checkpoints compute the same function?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget.stages import ELEMENTS
from ..checkpoints import Weights
from ..checkpoints.lazy import CHUNK_ELEMENTS
from ..engine.head import capped
from ..engine.layerwise import head_inputs
from ..engine.model import labels
from ..errors import LmcError
from ..examples import Data

# Mean KL (nats per token) below which two checkpoints count as one function, by the coarser storage dtype: rounding
# every weight of a trained model once more stays well below it.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-8, torch.float16: 1e-4, torch.bfloat16: 1e-2}


ROWS = 2048  # predictions that are compared together


@dataclass(frozen=True)
class Difference:
    """Largest |Δ log-probability|, mean KL(A‖B) in nats per prediction, and both mean losses."""

    max_log_probability: float
    kl: float
    loss_a: float
    loss_b: float

    def __post_init__(self) -> None:
        for what, value in (("first", self.loss_a), ("second", self.loss_b)):
            if not math.isfinite(value):
                raise LmcError(f"the loss of the {what} checkpoint is {value}: numbers overflow; look for huge weights")
        if not math.isfinite(self.kl + self.max_log_probability):
            raise LmcError("the outputs of these checkpoints are not finite; look for huge weights")

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def difference(
    a: Weights, b: Weights, data: Data, batch: int = 8, *, rows: int | None = None, logits: int = ELEMENTS
) -> Difference:
    """Compares log-probabilities (not logits: alignment may shift all logits of a token alike) on tokens or examples.

    Towers have features and no loss: there `kl` is the mean squared difference relative to the mean square.
    Of lazy weights one block is in memory at a time; logits never are for all tokens and the whole vocabulary.
    batch: inputs that go through a block together; rows: inputs whose streams are held, by default all, at the price of
    one pass over both models each; logits: how many of one model are held.
    """
    some = data.split(max(batch, rows or len(data)))
    if a.spec.task == "features":
        return _features(zip(*(_outputs(w, some, batch) for w in (a, b)), strict=True))
    found = []
    for part in some:
        x, y = (head_inputs(w, part, batch) for w in (a, b))
        right = torch.cat([labels(inputs) for inputs in part.split(batch)])
        for p, q, answer in zip(*(t.split(ROWS) for t in (x, y, right)), strict=True):
            found.append(compared(_runs(a, b, p, q, logits), answer))
    worst, *sums = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Difference(worst.max().item(), *(t.mean().item() for t in sums))


def _outputs(w: Weights, parts: Sequence[Data], batch: int) -> Iterator[Tensor]:
    """The features of a tower, part by part of the data, in float64."""
    for part in parts:
        read = head_inputs(w, part, batch)
        yield torch.cat([out for _, out in _logits(w, read, max(1, ELEMENTS // len(read)))], 1)


def _features(pairs: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    worst = apart = size = 0.0
    for p, q in pairs:
        worst = max(worst, (p - q).abs().max().item())
        apart += (p - q).square().sum().item()
        size += p.square().sum().item()
    return Difference(worst, apart / size, 0.0, 0.0)


def _runs(a: Weights, b: Weights, x: Tensor, y: Tensor, elements: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What `compared` wants, of rows that both heads read."""
    columns = max(1, elements // len(x))
    for (start, p), (_, q) in zip(_logits(a, x, columns), _logits(b, y, columns), strict=True):
        yield start, p, q


def compared(runs: Iterable[tuple[int, Tensor, Tensor]], right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(largest |Δ log-probability|, KL, loss of a, loss of b) of each of n predictions, float64.

    runs: (first column, logits of a, logits of b), both (n, columns) float64, which together are the vocabulary, read
    in one pass; right (n,): the answers. Log-sum-exps, Σ exp(p)(p - q) and extremes of p - q are all that is kept.
    """
    count, device = len(right), right.device
    left, other = _LogSumExp(count, device), _LogSumExp(count, device)
    low = torch.full((count,), torch.inf, dtype=torch.float64, device=device)
    high, at = -low, torch.empty(2, count, dtype=torch.float64, device=device)
    for start, p, q in runs:
        gap = p - q
        low, high = torch.minimum(low, gap.amin(1)), torch.maximum(high, gap.amax(1))
        here = (right >= start) & (right < start + p.shape[1])
        for i, logits in enumerate((p, q)):
            at[i, here] = logits[here, right[here] - start]
        left.add(p, gap)
        other.add(q, gap)
    shift = left.value - other.value
    worst = torch.maximum(high - shift, shift - low)
    return worst, left.mean - shift, left.value - at[0], other.value - at[1]


class _LogSumExp:
    """Running log Σ exp(logits) over columns, and Σ of given values weighted with exp(logits)."""

    def __init__(self, rows: int, device: torch.device):
        self.top = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.total = torch.zeros_like(self.top)
        self.weighted = torch.zeros_like(self.top)

    def add(self, logits: Tensor, values: Tensor) -> None:
        """logits, values (rows, columns)."""
        top = torch.maximum(self.top, logits.amax(1))
        share, before = (logits - top[:, None]).exp_(), (self.top - top).exp()
        self.top, self.total = top, self.total * before + share.sum(1)
        self.weighted = self.weighted * before + share.mul_(values).sum(1)

    @property
    def value(self) -> Tensor:
        return self.top + self.total.log()

    @property
    def mean(self) -> Tensor:
        return self.weighted / self.total


def _logits(w: Weights, rows: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    """(first column, logits in float64) of runs of the vocabulary, of `columns` at most."""
    head, bias = w.table("head"), w.ends.get("head_bias")
    assert head is not None
    for start, weight in head.chunks(min(columns, max(1, CHUNK_ELEMENTS // head.shape[1]))):
        part = F.linear(rows, weight, None if bias is None else bias[start : start + len(weight)])
        yield start, capped(part, w.spec.head_softcap).double()


def tolerance(*dtypes: torch.dtype) -> float:
    return max(TOLERANCES[dtype] for dtype in dtypes)
