"""A change of low rank of one slot: what an adapter adds to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Adds left @ right to a slot (rows, columns), and `bias` to its bias.

    left (rows, r), right (r, columns), bias (rows,) or None for nothing.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None = None

    def scaled(self, factor: float) -> LowRank:
        """`factor` times the same."""
        return LowRank(self.left * factor, self.right, None if self.bias is None else self.bias * factor)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the change, (stop - start, columns)."""
        return self.left[start:stop] @ self.right
