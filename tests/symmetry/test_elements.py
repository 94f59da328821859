"""Atoms and wreaths against their matrices."""

import itertools

import pytest
import torch

from lmc_fast.architectures.axes import Move
from lmc_fast.symmetry.elements import IDENTITY, Dense, Scale, Wreath, compose, dense, inverse_of, moved, orthogonal

N, BATCH = 5, 3


def _made(kind: str, seed: int, batch: tuple[int, ...]):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    def places():
        flat = [torch.randperm(N, generator=g) for _ in range(batch[0] if batch else 1)]
        return torch.stack(flat).view(*batch, N)

    return {
        "dense": lambda: Dense.of(normal(N, N)),
        "scale": lambda: Scale(normal(N)),
        "permutation": lambda: Wreath(places()),
        "scaled permutation": lambda: Wreath(places(), Scale(normal(N))),
    }[kind]()


KINDS = ["dense", "scale", "permutation", "scaled permutation"]
BATCHES = [(), (BATCH,)]


def matrix(g):
    return dense(g).matrix.double()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_inverse_dual_and_order_are_those_of_the_matrix(kind, batch):
    g = _made(kind, 1, batch)
    inverse = torch.stack([torch.linalg.inv(m) for m in matrix(g).view(-1, N, N)]).view(*batch, N, N)
    assert torch.allclose(matrix(g.inverse), inverse)
    assert torch.allclose(matrix(g.dual), inverse.mT) and torch.allclose(dense(g).back.double(), inverse)
    if isinstance(g, Wreath):
        assert torch.equal(matrix(g.order), (matrix(g) != 0).double())
    else:
        assert g.order is IDENTITY
    assert moved(g, Move.CO) is g and torch.equal(matrix(moved(g, Move.CONTRA)), matrix(g.dual))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
def test_then_is_the_product(first, second, batch):
    f, g = _made(first, 2, batch), _made(second, 3, batch)
    assert torch.allclose(matrix(f.then(g)), matrix(g) @ matrix(f))
    assert IDENTITY.then(f) is f and torch.equal(matrix(f.then(IDENTITY)), matrix(f))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_act_on_any_index(kind, dim):
    g = _made(kind, 4, ())
    shape = [2, 3, 4, 6]
    shape[dim] = N
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(g.act(x, dim, None), torch.tensordot(matrix(g), x, ([1], [dim])).movedim(0, dim))


@pytest.mark.parametrize(("batch", "dim"), [(0, 1), (0, 2), (1, 3), (0, 3), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_act_in_each_place(kind, batch, dim):
    g = _made(kind, 5, (BATCH,))
    shape = [2, 4, 6, 7]
    shape[batch], shape[dim] = BATCH, N
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.einsum("bij,bj...->bi...", matrix(g), x.movedim((batch, dim), (0, 1)))
    assert torch.allclose(g.act(x, dim, batch), expected.movedim((0, 1), (batch, dim)))


def test_what_lies_in_a_place_goes_with_it():
    """The semidirect product of places and what is inside, against matrices of the whole."""

    def element(seed):
        return {"heads": Wreath(torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed)))} | {
            "vo": _made("dense", seed, (BATCH,))
        }

    def whole(elements):
        inside = torch.block_diag(*elements["vo"].matrix)
        return inside @ torch.kron(matrix(elements["heads"]), torch.eye(N, dtype=torch.float64))

    f, g = element(1), element(2)
    assert torch.allclose(whole(compose(g, f)), whole(g) @ whole(f))
    assert torch.allclose(whole(inverse_of(g)), torch.linalg.inv(whole(g)))
    alone = {"vo": f["vo"]}
    assert torch.equal(compose(alone, {})["vo"].matrix, f["vo"].matrix)
    assert torch.equal(compose({}, alone)["vo"].matrix, f["vo"].matrix)
    assert torch.equal(compose({"heads": g["heads"]}, alone)["vo"].matrix, f["vo"].matrix[g["heads"].places])


def test_a_signed_permutation_is_recognised():
    signed = torch.diag(torch.tensor([1.0, -1, 1])) @ torch.eye(3)[[2, 0, 1]]
    found = orthogonal(signed.double())
    assert isinstance(found, Wreath) and torch.equal(matrix(found), signed.double())
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert isinstance(orthogonal(turn), Dense)


def test_a_permutation_is_no_factor():
    with pytest.raises(TypeError, match="permutation"):
        _ = Wreath(torch.arange(3)).factor
    with pytest.raises(ValueError, match="identity"):
        dense(IDENTITY)
