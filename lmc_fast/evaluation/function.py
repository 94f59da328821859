"""Do two checkpoints compute the same function?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints import Weights
from ..engine.head import capped
from ..engine.layerwise import head_inputs
from ..engine.model import answers
from ..examples import Data

# Mean KL (nats per token) below which two checkpoints count as one function, by the coarser storage dtype: rounding
# every weight of a trained model once more stays well below it.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-8, torch.float16: 1e-4, torch.bfloat16: 1e-2}


ROWS = 2048  # predictions that are compared together: with a run of the vocabulary, 32 MiB of logits at width 2048


@dataclass(frozen=True)
class Difference:
    """Largest |Δ log-probability|, mean KL(A‖B) in nats per prediction, and both mean losses."""

    max_log_probability: float
    kl: float
    loss_a: float
    loss_b: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def difference(a: Weights, b: Weights, data: Data, batch: int = 8) -> Difference:
    """Compares log-probabilities (not logits: alignment may shift all logits of a token alike) on tokens or examples.

    Towers have features and no loss: there `kl` is the mean squared difference relative to the mean square.
    Of lazy weights one block is in memory at a time; logits never are for all tokens and the whole vocabulary.
    """
    x, y = (head_inputs(w, data, batch) for w in (a, b))
    if a.spec.task == "features":
        p, q = (torch.cat([part for _, part in _logits(w, rows)], 1) for w, rows in ((a, x), (b, y)))
        kl = ((p - q).square().mean() / p.square().mean()).item()
        return Difference((p - q).abs().max().item(), kl, 0.0, 0.0)
    right = torch.cat([answers(part) for part in data.split(batch)])
    found = [_compare(a, b, *part) for part in zip(*(t.split(ROWS) for t in (x, y, right)), strict=True)]
    worst, *sums = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Difference(worst.max().item(), *(t.mean().item() for t in sums))


def _compare(a: Weights, b: Weights, x: Tensor, y: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(largest |Δ log-probability|, KL, loss of a, loss of b) for each of n rows of head inputs, float64.

    In one pass over the vocabulary, of which log-sum-exps, Σ exp(p)(p - q) and extremes of p - q are kept.
    """
    left, other = _LogSumExp(len(x), x.device), _LogSumExp(len(x), x.device)
    low = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    high, at = -low, torch.empty(2, len(x), dtype=torch.float64, device=x.device)
    for (start, p), (_, q) in zip(_logits(a, x), _logits(b, y), strict=True):
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


def _logits(w: Weights, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first column, logits in float64) of runs of the vocabulary."""
    head, bias = w.table("head"), w.ends.get("head_bias")
    assert head is not None
    for start, weight in head.chunks():
        part = F.linear(rows, weight, None if bias is None else bias[start : start + len(weight)])
        yield start, capped(part, w.spec.head_softcap).double()


def tolerance(*dtypes: torch.dtype) -> float:
    return max(TOLERANCES[dtype] for dtype in dtypes)
