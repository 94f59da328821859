"""Do two checkpoints compute the same function?"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints import Weights
from ..engine.loss import capped
from ..engine.model import answers, logits, prediction_rows
from ..examples import Data, inputs_of

# Mean KL (nats per token) below which two checkpoints count as one function, by the coarser storage dtype: rounding
# every weight of a trained model once more stays well below it.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-8, torch.float16: 1e-4, torch.bfloat16: 1e-2}


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
    """
    worst, kl, losses, count = 0.0, 0.0, [0.0, 0.0], 0
    for part in data.split(batch):
        if a.spec.task == "features":
            p, q = (logits(w, inputs_of(part)).double() for w in (a, b))
            kl += ((p - q).square().mean() / p.square().mean()).item() * len(part)
            worst, count = max(worst, (p - q).abs().max().item()), count + len(part)
            continue
        p, q = (_log_probabilities(w, part) for w in (a, b))
        right = answers(part)
        worst = max(worst, (p - q).abs().max().item())
        kl += (p.exp() * (p - q)).sum(-1).sum().item()
        for i, x in enumerate((p, q)):
            losses[i] -= x.gather(-1, right[:, None]).sum().item()
        count += len(right)
    return Difference(worst, kl / count, losses[0] / count, losses[1] / count)


def _log_probabilities(w: Weights, data: Data) -> Tensor:
    rows = F.linear(prediction_rows(w, data), w.ends["head"], w.ends.get("head_bias"))
    return capped(rows, w.spec.head_softcap).double().log_softmax(-1)


def tolerance(*dtypes: torch.dtype) -> float:
    return max(TOLERANCES[dtype] for dtype in dtypes)
