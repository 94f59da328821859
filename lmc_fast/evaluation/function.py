"""Do two checkpoints compute the same function?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget.stages import ELEMENTS
from ..checkpoints import Weights
from ..checkpoints.lazy import CHUNK_ELEMENTS, Table
from ..engine.head import capped
from ..engine.layerwise import head_inputs
from ..engine.model import labels
from ..errors import LmcError
from ..examples import Data

# Mean KL (nats per token) below which two checkpoints count as one function, by the coarser storage dtype: rounding
# every weight of a trained model once more stays well below it.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-8, torch.float16: 1e-4, torch.bfloat16: 1e-2}


ROWS = 2048  # predictions that are compared together


OURS = "lmc_fast"


@dataclass(frozen=True)
class Difference:
    """How far apart the functions of two checkpoints are.

    Attributes:
        max_log_probability: the largest difference of a log-probability; of towers without a loss, of a feature.
        kl: mean KL(A‖B) in nats per prediction; of towers, mean squared difference relative to the mean square.
        loss_a: A's mean loss in nats per prediction; 0 of towers.
        loss_b: B's.
        by: who computed: "transformers VERSION", or "lmc_fast", with the reason where transformers could not.

    Raises:
        LmcError: a figure is not finite.

    >>> lmc.verify("A", "A")[0].kl
    0.0
    """

    max_log_probability: float
    kl: float
    loss_a: float
    loss_b: float
    by: str = OURS

    def __post_init__(self) -> None:
        for what, value in (("first", self.loss_a), ("second", self.loss_b)):
            if not math.isfinite(value):
                raise LmcError(
                    f"the loss of the {what} checkpoint is {value}: numbers overflow; look for huge or NaN weights"
                )
        if not math.isfinite(self.kl + self.max_log_probability):
            raise LmcError("the outputs of these checkpoints are not finite; look for huge or NaN weights")

    def to_json(self) -> dict[str, Any]:
        """As report.json has it.

        Returns:
            All fields.
        """
        return asdict(self)


class Answering(Protocol):
    """Something that computes a model's answers: our engine, or transformers."""

    @property
    def by(self) -> str: ...

    @property
    def task(self) -> str:
        """As in Spec."""

    @property
    def width(self) -> int:
        """Of what the head reads."""

    def head_inputs(self, data: Data, batch: int) -> Tensor:
        """What the head reads wherever `data` asks for a prediction: (n, d); `batch` inputs are computed together."""

    def logits(self, rows: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
        """(first column, logits (n, c)) of runs of `columns` of the vocabulary, of rows (n, d) from head_inputs."""


@dataclass(frozen=True)
class Engine:
    """Our own engine's answers."""

    weights: Weights
    by: str = OURS

    @property
    def task(self) -> str:
        return self.weights.spec.task

    @property
    def width(self) -> int:
        return self._head.shape[1]

    @property
    def _head(self) -> Table:
        head = self.weights.table("head")
        assert head is not None
        return head

    def head_inputs(self, data: Data, batch: int) -> Tensor:
        return head_inputs(self.weights, data, batch)

    def logits(self, rows: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
        bias = self.weights.ends.get("head_bias")
        for start, weight in self._head.chunks(columns):
            part = F.linear(rows, weight, None if bias is None else bias[start : start + len(weight)])
            yield start, capped(part, self.weights.spec.head_softcap)


@torch.no_grad()
def difference(
    a: Weights | Answering,
    b: Weights | Answering,
    data: Data,
    batch: int = 8,
    *,
    rows: int | None = None,
    logits: int = ELEMENTS,
) -> Difference:
    """Compares log-probabilities (not logits: alignment may shift all logits of a token alike) on tokens or examples.

    Towers have features and no loss: there `kl` is the mean squared difference relative to the mean square.
    Of lazy weights one block is in memory at a time; logits never are for all tokens and the whole vocabulary.
    batch: inputs that go through a block together; rows: inputs whose streams are held, by default all, at the price of
    one pass over both models each; logits: how many of one model are held.
    """
    one, two = (Engine(w) if isinstance(w, Weights) else w for w in (a, b))
    some = data.split(max(batch, rows or len(data)))
    if one.task == "features":
        return _features(zip(*(_outputs(w, some, batch) for w in (one, two)), strict=True), one.by)
    found = []
    for part in some:
        x, y = (w.head_inputs(part, batch) for w in (one, two))
        right = torch.cat([labels(inputs) for inputs in part.split(batch)]).to(x.device)
        for p, q, answer in zip(*(t.split(ROWS) for t in (x, y, right)), strict=True):
            found.append(compared(_runs(one, two, p, q, logits), answer))
    worst, kl, *losses = (torch.cat(parts) for parts in zip(*found, strict=True))
    loss_a, loss_b = (t.mean().item() for t in losses)
    return Difference(worst.max().item(), kl.mean().item(), loss_a, loss_b, one.by)


def _outputs(w: Answering, parts: Sequence[Data], batch: int) -> Iterator[Tensor]:
    """The features of a tower, part by part of the data, in float64."""
    for part in parts:
        read = w.head_inputs(part, batch)
        yield torch.cat([out.double() for _, out in w.logits(read, max(1, ELEMENTS // len(read)))], 1)


def _features(pairs: Iterable[tuple[Tensor, Tensor]], by: str) -> Difference:
    worst = apart = size = 0.0
    for p, q in pairs:
        worst = max(worst, (p - q).abs().max().item())
        apart += (p - q).square().sum().item()
        size += p.square().sum().item()
    return Difference(worst, apart / size, 0.0, 0.0, by)


def _runs(a: Answering, b: Answering, x: Tensor, y: Tensor, elements: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What `compared` wants, of rows that both heads read."""
    columns = max(1, min(elements // len(x), CHUNK_ELEMENTS // max(a.width, b.width)))
    for (start, p), (_, q) in zip(a.logits(x, columns), b.logits(y, columns), strict=True):
        yield start, p.double(), q.double()


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


def tolerance(*dtypes: torch.dtype) -> float:
    return max(TOLERANCES[dtype] for dtype in dtypes)
