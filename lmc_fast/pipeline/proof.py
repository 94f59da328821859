"""Do two checkpoints compute the same function, by transformers' own forward passes wherever it can run them?"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable

import torch

from ..budget.demand import FP32, WEIGHT, Demand, Job
from ..budget.meter import counted_bytes, return_freed_memory
from ..budget.stages import ELEMENTS
from ..checkpoints import Model
from ..evaluation import Difference, difference
from ..evaluation.reference import Reference, Unreadable
from ..evaluation.whole import WholeReference
from ..examples import Data, inputs_of
from ..sizes import show_bytes

_log = logging.getLogger("lmc_fast")
TABLES = 48 << 20  # runs of rows of both heads, with what they are read from
HELD = 6  # tensors of the size of a run of logits: of both, also wide, their gap, a share
SPARE = 0.04
_BATCH = 32  # inputs that go through a block together


def by_transformers(
    x: Model,
    y: Model,
    data: Data,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    visited: Callable[[], None] | None = None,
) -> Difference:
    """How far two checkpoints' functions are apart on data, in float32, block by block, within `memory` bytes.

    visited: called whenever a block of one of them is about to run.

    Raises Unreadable where transformers cannot run one of them like that.
    """
    if memory is not None:
        return_freed_memory()
        _require(memory, counted_bytes(device) + _held_whole(x) + _held_whole(y))
    if x.home is None or y.home is None:
        first, second = (WholeReference(m.stock(), m.spec.task, device, columns=m.vocabulary) for m in (x, y))
        return difference(first, second, data, 1, rows=1)
    a, b = (
        Reference(m.path, m.spec.task, m.family.architectures, device, columns=m.vocabulary, visited=visited)
        for m in (x, y)
    )
    batch = rows = len(data)
    if memory is not None:
        length = x.spec.length(inputs_of(data).shape)
        each = length * FP32 * Demand(x.spec, Job(length, length), FP32).block_floats(WEIGHT)
        kept = 2 * length * x.spec.width * FP32
        block, head = max(a.block_bytes, b.block_bytes), HELD * ELEMENTS * 2 * FP32 + TABLES
        _require(memory, counted_bytes(device) + kept + max(block + each, head))
        room = memory * (1 - SPARE) - counted_bytes(device)
        batch = max(1, min(_BATCH, int((room - block) / 2 / each)))
        rows = max(batch, int((room - max(block + batch * each, head)) / kept))
    return difference(a, b, data, min(batch, _BATCH), rows=rows)


def _require(memory: int, needed: float) -> None:
    if needed > memory * (1 - SPARE):
        least = show_bytes(needed / (1 - SPARE))
        _log.info(
            "transformers would need %s of memory to compare, more than the %s allowed", least, show_bytes(memory)
        )
        raise Unreadable("transformers needs more memory than is allowed")


def _held_whole(model: Model) -> int:
    """Bytes of files that transformers cannot map."""
    if model.home is None:
        return 0
    files = [file for file in model.home.glob("pytorch_model*.bin") if not zipfile.is_zipfile(file)]
    return 0 if any(model.home.glob("*.safetensors")) else sum(file.stat().st_size for file in files)
