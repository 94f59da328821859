"""Weights that are made anew whenever they are asked for, so that no more of a model is in memory than is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

Slots = dict[str, Tensor]

TABLES = ("embed", "head")  # slots that may be larger than a block: (V, d), one row for each token or class
CHUNK_ELEMENTS = 1 << 22  # of a table, held at a time: 32 MiB in float64


class LazyBlocks(Sequence[Slots]):
    """Blocks of which each is made by `make(index)` when it is asked for, and belongs to who asked.

    Asking twice makes it twice. A loop's variables keep the last block while the next one is made: where memory
    matters, let a function take `blocks[i]` and return.
    """

    def __init__(self, count: int, make: Callable[[int], Slots]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Slots: ...

    @overload
    def __getitem__(self, index: slice) -> LazyBlocks: ...

    def __getitem__(self, index: int | slice) -> Slots | LazyBlocks:
        if isinstance(index, slice):
            places = range(self._count)[index]
            return LazyBlocks(len(places), lambda i: self._make(places[i]))
        return self._make(range(self._count)[index])

    def map(self, function: Callable[[int, Slots], Slots]) -> LazyBlocks:
        """Blocks function(index, block), as lazy as these. The function may use up the dict that it is given."""
        return LazyBlocks(self._count, lambda i: function(i, self._make(i)))


@dataclass(frozen=True)
class Table:
    """A matrix of which runs of rows are read, and changed by `function` (row by row), when they are asked for."""

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]  # (start, stop) -> (stop - start, d)
    function: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def of(tensor: Tensor) -> Table:
        """The same of a matrix in memory."""
        rows, width = tensor.shape
        return Table((rows, width), lambda start, stop: tensor[start:stop])

    def rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, d)."""
        return self._changed(self.read(start, stop))

    def pick(self, rows: Tensor) -> Tensor:
        """Rows (n, d) of the given numbers (n,), which ascend; neighbours are read together."""
        numbers = rows.tolist()
        starts = [i for i, row in enumerate(numbers) if not i or row != numbers[i - 1] + 1]
        ends = [*starts[1:], len(numbers)]
        runs = [self.read(numbers[i], numbers[j - 1] + 1) for i, j in zip(starts, ends, strict=True)]
        return self._changed(torch.cat(runs))

    def runs(self, size: int | None = None) -> Iterator[tuple[int, int]]:
        """(start, stop) of runs of `size` rows, by default as many as make CHUNK_ELEMENTS."""
        return ((run.start, run.stop) for run in _runs(*self.shape, size))

    def chunks(self, size: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first row's number, rows) of each of `runs`."""
        return ((start, self.rows(start, stop)) for start, stop in self.runs(size))

    def map(self, function: Callable[[Tensor], Tensor]) -> Table:
        """The table of the rows that `function` makes of these; it is given any number of rows, also none."""
        first = self.function
        return replace(self, function=function if first is None else lambda rows: function(first(rows)))

    def _changed(self, rows: Tensor) -> Tensor:
        return rows if self.function is None else self.function(rows)


def row_runs(matrix: Tensor) -> Iterator[slice]:
    """Runs of a large matrix's rows, of CHUNK_ELEMENTS each."""
    return _runs(len(matrix), matrix.shape[1])


def _runs(count: int, width: int, size: int | None = None) -> Iterator[slice]:
    size = size or max(1, CHUNK_ELEMENTS // width)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
