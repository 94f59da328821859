from itertools import permutations

import numpy as np
import pytest
import torch

from lmc_fast.solvers import solve_assignments


def brute_force(score, best):
    n = len(score)
    return best(sum(float(score[i, p[i]]) for i in range(n)) for p in permutations(range(n)))


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_against_brute_force(threads):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, n, generator=generator) for n in (1, 2, 3, 5, 6, 6)]
    for maximize, best in ((True, max), (False, min)):
        found = solve_assignments(scores, maximize=maximize, threads=threads)
        for score, p in zip(scores, found, strict=True):
            assert p.dtype == torch.int64
            assert sorted(p.tolist()) == list(range(len(score)))
            assert float(score.double()[torch.arange(len(p)), p].sum()) == pytest.approx(
                brute_force(score.double(), best)
            )


def test_recovers_permutations_from_any_container_and_precision():
    truth = [torch.randperm(40, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    scores = torch.stack([torch.eye(40)[p] for p in truth])
    for container in (scores, scores.bfloat16(), scores.numpy(), list(scores.double())):
        for found, p in zip(solve_assignments(container), truth, strict=True):
            assert torch.equal(found, p)
    assert solve_assignments([]) == []


def test_refuses_rectangular_and_non_finite():
    with pytest.raises(ValueError, match=r"problem 1 .*square"):
        solve_assignments([np.zeros((2, 2)), np.zeros((2, 3))])
    with pytest.raises(ValueError, match=r"problem 0 .*non-finite"):
        solve_assignments([torch.tensor([[0.0, float("nan")], [0.0, 0.0]])])
