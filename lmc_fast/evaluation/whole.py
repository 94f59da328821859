"""A model in memory as transformers runs it, all of it at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checkpoints import Stock
from ..engine.model import model_inputs, target_rows
from ..errors import LmcError
from ..examples import Data, inputs_of
from .reference import Unreadable, output_of, quiet, version


class WholeReference:
    """What from_pretrained makes of a stock model, in `dtype`, answering as evaluation.function wants.

    task: as in Spec. columns: how many of the head's, by default all. Raises Unreadable where transformers fails.
    """

    width = 1

    def __init__(
        self,
        stock: Stock,
        task: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        columns: int | None = None,
    ):
        self.task, self.device, self._dtype, self._columns = task, torch.device(device), dtype, columns
        try:
            with quiet():
                self.model = stock.model(dtype=dtype).eval().to(self.device)
        except LmcError:
            raise
        except Exception as error:  # transformers has many kinds
            raise Unreadable(f"transformers {type(error).__name__}: {error}") from error
        self.by = f"transformers {version()}"

    @torch.no_grad()
    def head_inputs(self, data: Data, batch: int) -> Tensor:
        """As Answering; here the whole output: one row of logits, or features, for each prediction."""
        return torch.cat([self._rows(part) for part in data.to(self.device).split(batch)])

    def logits(self, rows: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
        """As Answering."""
        for start in range(0, rows.shape[1], columns):
            yield start, rows[:, start : start + columns]

    def _rows(self, data: Data) -> Tensor:
        inputs = inputs_of(data) if self.task == "features" else model_inputs(data)
        name, dtype = ("pixel_values", self._dtype) if inputs.is_floating_point() else ("input_ids", torch.int64)
        found = output_of(self.model(**{name: inputs.to(dtype=dtype)}))
        rows = found.flatten(0, -2) if self.task == "features" else target_rows(found, data)
        return rows[..., : self._columns]
