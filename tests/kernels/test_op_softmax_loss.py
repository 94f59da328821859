import pytest
import torch
import torch.nn.functional as F
from kernels.checks import DEVICE, DTYPES, assert_as_good, values

from lmc_fast.kernels.softmax_loss import cross_entropy_, divergence_, reference, reference_divergence, row_statistics

pytestmark = pytest.mark.usefixtures("guarded")

SHAPES = [(7, 40), (1, 1), (3, 16), (5, 17), (2, 100)]


def labels(rows, width, seed=0):
    return torch.randint(width, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def buffer(t, extra=3):
    """t as a view between sentinels, and a function that says whether these survived."""
    big = torch.full((t.shape[0] + 2, t.shape[1] + 2 * extra), 77.0, dtype=t.dtype, device=t.device)
    view = big[1:-1, extra:-extra]
    view.copy_(t)

    def untouched():
        view.fill_(77.0)
        return bool((big == 77).all())

    return view, untouched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape, softcap, dtype):
    logits, target = (4 * values(1)(*shape)).to(dtype), labels(*shape)
    view, untouched = buffer(logits)
    loss = cross_entropy_(view, target, scale=0.25, softcap=softcap)
    plain, plain_slope = reference(logits, target, 0.25, softcap=softcap)
    truth, true_slope = reference(logits.double(), target, 0.25, softcap=softcap)
    assert_as_good(loss, plain, truth, "loss")
    assert_as_good(view, plain_slope, true_slope, "slope")
    assert untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("shares", [(1.0,), (0.3, 0.7), (1.0, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_divergence(shape, shares, softcap, dtype):
    draw = values(2)
    logits, *others = ((4 * draw(*shape)).to(dtype) for _ in range(1 + len(shares)))
    teachers = list(zip(others, shares, strict=True))
    doubled = [(t.double(), s) for t, s in teachers]
    view, untouched = buffer(logits)
    loss = divergence_(view, teachers, scale=0.5, softcap=softcap)
    plain, plain_slope = reference_divergence(logits, teachers, 0.5, softcap=softcap)
    truth, true_slope = reference_divergence(logits.double(), doubled, 0.5, softcap=softcap)
    assert_as_good(loss, plain, truth, "loss", size=1.0)
    assert_as_good(view, plain_slope, true_slope, "slope", size=0.1)
    assert untouched()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_references_are_torchs_losses(softcap):
    draw = values(3)
    x, one, two = (3 * draw(6, 11) for _ in range(3))
    target = labels(6, 11)

    def cap(t):
        return softcap * torch.tanh(t / softcap) if softcap else t

    aim = 0.4 * cap(one).softmax(1) + 0.6 * cap(two).softmax(1)
    x.requires_grad_()
    for expected, (loss, slope) in (
        (F.cross_entropy(cap(x), target), reference(x, target, 1 / 6, softcap=softcap)),
        (
            F.kl_div(cap(x).log_softmax(1), aim, reduction="batchmean"),
            reference_divergence(x, [(one, 0.4), (two, 0.6)], 1 / 6, softcap=softcap),
        ),
    ):
        torch.testing.assert_close(loss.mean(), expected)
        torch.testing.assert_close(slope, torch.autograd.grad(expected, x)[0])


def test_reference_gradients_are_autograds():
    x = (3 * values(4)(5, 9)).requires_grad_()
    target = labels(5, 9)
    loss = F.cross_entropy(4 * torch.tanh(x / 4), target, reduction="sum")
    torch.testing.assert_close(reference(x, target, softcap=4.0)[1], torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_in_runs_of_columns(dtype):
    draw = values(5)
    logits, one, two = ((3 * draw(6, 50)).to(dtype) for _ in range(3))
    target = labels(6, 50)
    cuts = [slice(0, 20), slice(20, 37), slice(37, 50)]
    stats = [row_statistics(logits[:, c], target, c.start) for c in cuts]
    log_sums = torch.stack([s for s, _ in stats]).logsumexp(0)
    truth, true_slope = reference(logits.double(), target)
    plain, plain_slope = reference(logits, target)
    assert_as_good(log_sums - sum(p for _, p in stats), plain, truth)
    whole = logits.clone()
    for c in cuts:
        assert cross_entropy_(whole[:, c], target, first=c.start, log_sums=log_sums).shape == (0,)
    assert_as_good(whole, plain_slope, true_slope)

    sums = torch.stack([t.float().logsumexp(1) for t in (logits, one, two)])
    truth, true_slope = reference_divergence(logits.double(), [(one.double(), 0.3), (two.double(), 0.7)])
    plain, plain_slope = reference_divergence(logits, [(one, 0.3), (two, 0.7)])
    whole, total = logits.clone(), 0.0
    for c in cuts:
        total = total + divergence_(whole[:, c], [(one[:, c], 0.3), (two[:, c], 0.7)], log_sums=sums)
    assert_as_good(total, plain, truth, size=4.0)
    assert_as_good(whole, plain_slope, true_slope)


def test_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 1.0], [-1e30, -1e30, -1e30]], device=DEVICE)
    target = torch.tensor([0, 2, 1], device=DEVICE)
    plain, slope = reference(logits, target)
    ours = logits.clone()
    torch.testing.assert_close(cross_entropy_(ours, target), plain)
    torch.testing.assert_close(ours, slope)
    plain, slope = reference_divergence(logits, [(logits, 1.0)])
    ours = logits.clone()
    torch.testing.assert_close(divergence_(ours, [(logits, 1.0)]), torch.zeros_like(plain))
    torch.testing.assert_close(ours, torch.zeros_like(slope))


def test_errors():
    logits = values(6)(4, 5).float()
    with pytest.raises(ValueError, match="one shape"):
        divergence_(logits, [(logits[:3], 1.0)])
    with pytest.raises(ValueError, match="one or two"):
        divergence_(logits, [])
    with pytest.raises(ValueError, match="adjacent"):
        cross_entropy_(logits.mT, torch.zeros(5).long())
