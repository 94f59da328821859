"""Muon for batches of matrices: momentum, then the nearest semi-orthogonal matrix as the step.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). Against Adam on the generators of
rotations and head maps: docs/facts.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose iterates send singular values into about [0.7, 1.2]
_ITERATIONS = 6


def orthogonalized(x: Tensor) -> Tensor:
    """x (..., n, n) with all its singular values moved near 1, by Newton-Schulz iteration; zero stays zero."""
    a, b, c = _COEFFICIENTS
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + torch.finfo(x.dtype).tiny)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@torch.no_grad()
def muon_step(leaf: Tensor, gradient: Tensor, momentum: Tensor, rate: float) -> None:
    """One Nesterov step on the matrices of every model (S, ..., n, n): changes `leaf` and `momentum` in place.

    `rate` is the spectral size of the step: about the angle, in radians, by which a rotation turns. One model after the
    other: what this needs beside its operands does not grow with their number.
    """
    momentum.mul_(MOMENTUM).add_(gradient)
    for part, slope, mean in zip(leaf.split(1), gradient.split(1), momentum.split(1), strict=True):
        part.sub_(orthogonalized(slope + MOMENTUM * mean), alpha=rate)
