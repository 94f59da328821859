"""Ordinary distillation of one model from others: all its weights, by AdamW, towards what its teachers predict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..architectures.spec import SHARED
from ..checkpoints import Weights
from ..engine.head import CHUNK_ELEMENTS, capped
from ..engine.model import labels, last_hidden, model_inputs, target_rows
from ..examples import Data
from .schedule import WIDTH, Schedule

RATE = 1e-3  # of AdamW for models of Schedule's WIDTH and narrower ones; it falls as 1 / width
_BETAS = (0.9, 0.95)
_FLOAT = 4


def healing_bytes(elements: int, teachers: int) -> int:
    """Weights, gradients, two moments and the best copy of the model, and its teachers, all in float32."""
    return _FLOAT * elements * (5 + teachers)


class Healer:
    """One call of `step` is one batch, one update. The same seed and state give the same bits.

    student: moved in place. teachers: frozen. data: (calibration data, the numbers of the teachers of it) of each
    source; a batch takes as much of every source.
    """

    def __init__(
        self,
        student: Weights,
        teachers: Sequence[Weights],
        data: Sequence[tuple[Data, tuple[int, ...]]],
        schedule: Schedule,
        rate: float = RATE,
        micro_batch: int = 4,
    ):
        self.spec, self.teachers, self.data, self.schedule = student.spec, teachers, data, schedule
        self.rate, self.micro_batch, self.done = rate * min(1.0, WIDTH / student.spec.width), micro_batch, 0
        self.leaves = dict(_leaves(student))
        self.student = _of(student, self.leaves)
        self._adam = torch.optim.AdamW(self.leaves.values(), lr=self.rate, betas=_BETAS, weight_decay=0.0, foreach=True)

    def step(self) -> float:
        """Takes one step and returns the divergence from the teachers, in nats per prediction."""
        total, losses = 0, 0.0
        batches = list(self._batches())
        total = sum(len(labels(batch)) for batch, _ in batches)
        for t in self.leaves.values():
            t.grad = None
        for batch, who in batches:
            loss = self._divergence(batch, who) / total
            loss.backward()
            losses += loss.item()
        if not math.isfinite(losses):
            if not self.done:
                raise ArithmeticError(f"the loss is {losses} before the first step: look for huge weights")
            raise ArithmeticError(f"the loss became {losses} at step {self.done + 1}; try a smaller rate")
        self._adam.param_groups[0]["lr"] = self.rate * self.schedule.rate(self.done)
        self._adam.step()
        self.done += 1
        return losses

    def _batches(self) -> Iterator[tuple[Data, tuple[int, ...]]]:
        each = -(-self.schedule.batch // len(self.data))
        for data, who in self.data:
            rows = Schedule(batch=each, seed=self.schedule.seed).rows(self.done, len(data))
            for part in data[rows].split(self.micro_batch):
                yield part, who

    def _divergence(self, batch: Data, who: tuple[int, ...]) -> Tensor:
        """Sum over predictions of KL(mean of the teachers' ‖ the student's); logits by chunks, twice."""
        rows = target_rows(last_hidden(self.student, model_inputs(batch)), batch)
        with torch.no_grad():
            taught = [target_rows(last_hidden(self.teachers[k], model_inputs(batch)), batch) for k in who]
        size = max(1, CHUNK_ELEMENTS // self.spec.vocab)
        total = rows.new_zeros(())
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            with torch.no_grad():
                aims = [_logits(self.teachers[k], x[some]).softmax(1) for k, x in zip(who, taught, strict=True)]
                aim = torch.stack(aims).mean(0)
            total = total + checkpoint(self._chunk, rows[some], aim, use_reentrant=False)
        return total

    def _chunk(self, rows: Tensor, aim: Tensor) -> Tensor:
        return F.kl_div(_logits(self.student, rows).log_softmax(1), aim, reduction="sum")

    def state(self) -> dict[str, Tensor]:
        out = {f"weights.{name}": t.detach() for name, t in self.leaves.items()}
        for name, t in self.leaves.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if t in self._adam.state:
                    out[f"{key}.{name}"] = self._adam.state[t][key]
        return out

    def restore(self, state: dict[str, Tensor], done: int) -> None:
        """Puts a `state()` back. Raises KeyError or ValueError for one of another model."""
        self.done = done
        for name, t in self.leaves.items():
            found = state[f"weights.{name}"]
            if found.shape != t.shape:
                raise ValueError(f"{name} has shape {tuple(found.shape)}, not {tuple(t.shape)}")
            t.data.copy_(found)
            if done:
                moments = {key: state[f"{key}.{name}"].to(t.device, copy=True) for key in ("exp_avg", "exp_avg_sq")}
                self._adam.state[t] = {"step": torch.tensor(float(done)), **moments}


@torch.no_grad()
def loss_of(weights: Weights, data: Sequence[Data], micro_batch: int = 4) -> float:
    """On data of every source, mean of their losses in nats per prediction."""
    losses = []
    for part in data:
        total, count = 0.0, 0
        for batch in part.split(micro_batch):
            wanted = labels(batch)
            rows = target_rows(last_hidden(weights, model_inputs(batch)), batch)
            size = max(1, CHUNK_ELEMENTS // weights.spec.vocab)
            for x, y in zip(rows.split(size), wanted.split(size), strict=True):
                total += F.cross_entropy(_logits(weights, x), y, reduction="sum").item()
            count += len(wanted)
        losses.append(total / count)
    return sum(losses) / len(losses)


def _logits(weights: Weights, rows: Tensor) -> Tensor:
    out = F.linear(rows, weights.ends["head"], weights.ends.get("head_bias"))
    return capped(out, weights.spec.head_softcap)


def _leaves(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """A copy of every tensor that learns; of a tied head, the embedding alone."""
    for name, t in weights.ends.items():
        if not (weights.spec.tied and name == "head"):
            yield f"ends.{name}", t.detach().clone().requires_grad_()
    for i, slots in enumerate(weights.blocks):
        for name, t in slots.items():
            if i and name in SHARED:
                continue
            yield f"blocks.{i}.{name}", t.detach().clone().requires_grad_()


def _of(weights: Weights, leaves: dict[str, Tensor]) -> Weights:
    ends = {name: leaves.get(f"ends.{name}", leaves["ends.embed"]) for name in weights.ends}
    blocks = [
        {name: leaves[f"blocks.{0 if name in SHARED else i}.{name}"] for name in slots}
        for i, slots in enumerate(weights.blocks)
    ]
    return Weights(weights.spec, ends, blocks)


def with_tensors(weights: Weights, tensors: dict[str, Tensor]) -> Weights:
    """A healed model's weights, by the names of `Healer.leaves`."""
    return _of(weights, tensors)
