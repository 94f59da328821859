import pytest
import torch
from kernels.checks import DEVICE, DTYPES, compare, values

from lmc_fast.kernels import head_maps as module
from lmc_fast.kernels.head_maps import head_maps, reference

pytestmark = pytest.mark.usefixtures("guarded")


def case(positions=9, sequences=2, heads=4, groups=2, e=8, rotary=8, lam=0.3, maps=True, bias=True, seed=0):
    draw = values(seed)
    T = positions * sequences
    inputs = {"ya": draw(T, heads * e), "yb": draw(T, heads * e)}
    constants = {"heads": heads}
    if isinstance(lam, tuple):
        constants["lam"] = lam
    else:
        inputs["lam"] = torch.tensor(lam, dtype=torch.float64, device=DEVICE)
    if maps:
        inputs["maps"] = draw(groups, e, e) / e**0.5
    if bias:
        inputs["bias"] = draw(heads * e)
    table = draw(positions, rotary // 2) * 3

    def with_rope(function):
        if not rotary:
            return function
        return lambda **given: function(**given, rope=(table.cos().to(given["ya"]), table.sin().to(given["ya"])))

    sizes = {"lam": 2 * (T * heads * e) ** 0.5}
    return with_rope(head_maps), with_rope(reference), inputs, constants, sizes


def check(dtype=torch.float32, **options):
    ours, plain, inputs, constants, sizes = case(**options)
    compare(ours, plain, inputs, constants, dtype, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, (1.0, -1.0)])
def test_factors(lam, dtype):
    check(dtype, lam=lam)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [0, 2, 6, 8])
@pytest.mark.parametrize("maps", [False, True])
def test_rotary_channels(maps, rotary, dtype):
    check(dtype, maps=maps, rotary=rotary)


@pytest.mark.parametrize("maps, bias", [(False, False), (True, False), (False, True)])
def test_without(maps, bias):
    check(maps=maps, bias=bias)


@pytest.mark.parametrize(
    "sizes",
    [
        {"positions": 1, "sequences": 1, "heads": 1, "groups": 1, "e": 2, "rotary": 2},
        {"positions": 5, "sequences": 0},
        {"positions": 33, "sequences": 1, "heads": 3, "groups": 3, "e": 20, "rotary": 10},
        {"positions": 3, "sequences": 7, "heads": 6, "groups": 1, "e": 33, "rotary": 32},
        {"positions": 17, "sequences": 1, "heads": 2, "groups": 2, "e": 48, "rotary": 12},
    ],
)
def test_shapes(sizes):
    check(**sizes)


def test_long_runs_of_tokens(monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 8)
    check(positions=40, sequences=3)


def test_views_of_one_product():
    draw = values(5)
    both = draw(6, 3, 16).float()
    maps = draw(2, 8, 8).float()
    ours = head_maps(both[:, 0], both[:, 2], (0.5, 0.5), maps, heads=2)
    torch.testing.assert_close(ours, reference(both[:, 0], both[:, 2].contiguous(), (0.5, 0.5), maps, heads=2))


@pytest.mark.parametrize("learned", [False, True])
def test_only_what_backward_reads_is_kept(learned):
    draw = values(8)
    ya, yb, maps = (draw(*shape).float().requires_grad_(learned) for shape in ((6, 16), (6, 16), (2, 8, 8)))
    out = head_maps(ya.detach().requires_grad_(), yb, (0.5, 0.5), maps, heads=2)
    sizes = [t.numel() for t in out.grad_fn.saved_tensors if t is not None]
    assert sizes == ([yb.numel()] if learned else []) + [maps.numel()]


def test_errors():
    y = values(6)(6, 16).float()
    with pytest.raises(ValueError, match="3 e"):
        head_maps(y, y, (1, 1), heads=3)
    with pytest.raises(ValueError, match="divisor of 2"):
        head_maps(y, y, (1, 1), torch.ones(3, 8, 8, device=DEVICE), heads=2)
    with pytest.raises(ValueError, match="16 channels"):
        head_maps(y, y, (1, 1), bias=y[:, 0], heads=2)
    with pytest.raises(ValueError, match="divisor of 6"):
        head_maps(y, y, (1, 1), rope=(y[:4, :4], y[:4, :4]), heads=2)
