"""Many linear assignment problems at once, each solved exactly."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def solve_assignments(
    scores: Sequence[Tensor | np.ndarray] | Tensor | np.ndarray,  # (n, n) each; sizes may differ
    *,
    maximize: bool = True,
    threads: int | None = None,
) -> list[Tensor]:
    """For each score matrix the permutation p, int64 (n,), that maximizes (or minimizes) Σ_i scores[i, p[i]].

    scipy's shortest augmenting path solver, which releases the GIL, in one thread for each problem (at most `threads`,
    by default one for each processor). Scores keep their precision; bfloat16 and float16 are widened.

    Raises ValueError for a matrix that is not square or has a non-finite entry.
    """
    from scipy.optimize import linear_sum_assignment  # half a second to import

    problems = [_as_array(score, index) for index, score in enumerate(scores)]

    def solve(problem: np.ndarray) -> Tensor:
        return torch.from_numpy(linear_sum_assignment(problem, maximize=maximize)[1].astype(np.int64, copy=False))

    workers = min(threads or len(os.sched_getaffinity(0)), len(problems))
    if workers <= 1:
        return [solve(problem) for problem in problems]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(solve, problems))


def _as_array(score: Tensor | np.ndarray, index: int) -> np.ndarray:
    if isinstance(score, Tensor):
        score = score.detach()
        wide = score if score.dtype in (torch.float32, torch.float64) else score.double()
        score = wide.cpu().numpy()
    if score.ndim != 2 or score.shape[0] != score.shape[1]:
        raise ValueError(f"solve_assignments: problem {index} has shape {score.shape}; expected a square matrix")
    if not np.isfinite(score).all():
        raise ValueError(f"solve_assignments: problem {index} has a non-finite score")
    return score
