"""Several processes on one step, through torch.distributed: each takes a share of the batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LmcError

_PATIENCE = timedelta(days=2)  # the others wait while the first process matches and prepares


@contextmanager
def together(device: torch.device | str) -> Iterator[None]:
    """In the group that torchrun set up, if it did. Raises LmcError if the processes do not find each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except Exception as error:
        raise LmcError(
            f"WORLD_SIZE is set, but the processes did not find each other ({error}); use torchrun"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """`cuda` as this process's own GPU where torchrun started several."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def place() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(rows: Tensor) -> Tensor:
    """This process's rows. Raises LmcError where some process would have none."""
    rank, world = place()
    if world > len(rows):
        raise LmcError(f"a batch of {len(rows)} sequences is too small for {world} processes; raise --batch")
    return rows[rank::world]


def mean(loss: Tensor, gradients: dict[str, Tensor], count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over all processes' predictions, of which this one's mean covers `count`."""
    if place()[1] == 1:
        return loss, gradients
    scalars = torch.stack([loss.double() * count, loss.new_tensor(count, dtype=torch.float64)])
    dist.all_reduce(scalars)
    for gradient in gradients.values():
        gradient *= count
        dist.all_reduce(gradient)
        gradient /= scalars[1].to(gradient.dtype)
    return scalars[0] / scalars[1], gradients


def first(value: float) -> float:
    """The first process's value: what all decide by, so that they decide alike."""
    if place()[1] == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        shared = shared.cuda()
    dist.broadcast(shared, 0)
    return shared.item()


def wait() -> None:
    """Until every process is here."""
    if place()[1] > 1:
        dist.barrier()
