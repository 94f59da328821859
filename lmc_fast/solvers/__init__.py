"""Batched maps from free matrices to rotations and invertible maps, with gradients; linear assignment.

Importable on its own: nothing here needs transformers.
"""

from lmc_fast.solvers.assignment import solve_assignments
from lmc_fast.solvers.cayley import cayley
from lmc_fast.solvers.expm import expm
from lmc_fast.solvers.polar import polar

__all__ = ["cayley", "expm", "polar", "solve_assignments"]
