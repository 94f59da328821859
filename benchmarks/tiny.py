"""Tiny models that are trained here within a minute, and losses between them by transformers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import ROOT
from lmc_fast import Alignment, Examples, Models
from lmc_fast.data import mask_tokens

DATA = ROOT / "examples" / "pair"
VOCABULARY = 1024  # of its tokens
LENGTH, BATCH = 64, 16
PART = 64  # sequences that are measured at a time
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def text(part: str, length: int = LENGTH) -> Tensor:
    """Token ids (n, length) of examples/pair: train, val or test."""
    ids = torch.from_numpy(np.load(DATA / f"{part}.npy").astype(np.int64))
    return ids[: len(ids) // length * length].view(-1, length)


def next_token_loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def masked_loss(model: PreTrainedModel, batch: Examples) -> Tensor:
    logits = model(input_ids=batch.inputs).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-1)


def masked(tokens: Tensor, seed: int = 0) -> Examples:
    """With a part hidden behind an id of its own, the one after the vocabulary."""
    return mask_tokens(tokens, VOCABULARY, seed)


def train(
    model: PreTrainedModel,
    tokens: Tensor,
    steps: int,
    seed: int,
    rate: float = 3e-3,
    held: Mapping[str, Tensor] | None = None,
    hide: bool = False,
) -> PreTrainedModel:
    """AdamW with linear warm-up and decay; the order of the text follows from `seed`.

    held: {parameter: bool mask of the entries that stay as they are}. hide: train on masked tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0 if held else 0.01)
    parameters = dict(model.named_parameters())
    for step in range(steps):
        batch = tokens[torch.randint(len(tokens), (BATCH,), generator=generator)]
        loss = masked_loss(model, masked(batch, seed * 100_003 + step)) if hide else next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        for name, mask in (held or {}).items():
            gradient = parameters[name].grad
            assert gradient is not None
            gradient.masked_fill_(mask, 0.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 30, (steps - step) / (0.6 * steps))
        optimizer.step()
    return model.eval()


@torch.no_grad()
def loss_of(model: PreTrainedModel, data: Tensor | Examples) -> float:
    """Nats per prediction."""
    total, count = 0.0, 0
    for part in data.split(PART):
        loss = masked_loss(model, part) if isinstance(part, Examples) else next_token_loss(model, part)
        n = part.numel() if isinstance(part, Examples) else part[:, 1:].numel()
        total, count = total + loss.item() * n, count + n
    return total / count


def average(models: Sequence[PreTrainedModel], shares: Sequence[float]) -> PreTrainedModel:
    """A model of the averages of all tensors."""
    states = [model.state_dict() for model in models]
    made = type(models[0])(models[0].config).eval()
    made.load_state_dict(
        {
            name: sum(s * state[name] for s, state in zip(shares, states, strict=True)) if t.is_floating_point() else t
            for name, t in states[0].items()
        }
    )
    return made


def excesses(a: PreTrainedModel, b: PreTrainedModel, data: Tensor | Examples) -> tuple[float, float]:
    """(barrier, excess of the middle) of the line between both, in nats."""
    losses = [loss_of(average((a, b), (1 - lam, lam)), data) for lam in LAMBDAS]
    over = [x - (1 - lam) * losses[0] - lam * losses[-1] for lam, x in zip(LAMBDAS, losses, strict=True)]
    return max(over), over[len(over) // 2]


def aligned(pair: Models, alignment: Alignment, matched: bool = False) -> list[PreTrainedModel]:
    """Stock models of all members, as learned or as matched, float32."""
    chosen = Alignment(*alignment.matched, matched=alignment.matched) if matched else alignment
    return [stock.model().float().eval() for stock in chosen.state_dicts(pair, torch.float32)]


def fresh(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return build()
