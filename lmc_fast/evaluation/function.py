"""Do two checkpoints compute the same function?"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..checkpoints import Weights
from ..engine.model import logits

# Mean KL (nats per token) below which two checkpoints count as one function, by the coarser storage dtype: rounding
# every weight of a trained model once more stays well below it.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-8, torch.float16: 1e-4, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Difference:
    """Largest |Δ log-probability|, mean KL(A‖B) in nats per token, and both mean next-token losses."""

    max_log_probability: float
    kl: float
    loss_a: float
    loss_b: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def difference(a: Weights, b: Weights, tokens: Tensor, batch: int = 8) -> Difference:
    """Compares log-probabilities (not logits: alignment may shift all logits of a token alike) on tokens (n, T)."""
    worst, kl, losses = 0.0, 0.0, [0.0, 0.0]
    for ids in tokens.split(batch):
        p, q = (logits(w, ids).double().log_softmax(-1) for w in (a, b))
        worst = max(worst, (p - q).abs().max().item())
        kl += (p.exp() * (p - q)).sum(-1).mean().item() * len(ids)
        for i, x in enumerate((p, q)):
            losses[i] -= x[:, :-1].gather(-1, ids[:, 1:, None]).mean().item() * len(ids)
    return Difference(worst, kl / len(tokens), losses[0] / len(tokens), losses[1] / len(tokens))


def tolerance(*dtypes: torch.dtype) -> float:
    return max(TOLERANCES[dtype] for dtype in dtypes)
