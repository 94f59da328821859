"""Threads, instruction sets, shapes, strides, dirty memory, refused input: what is common to the solvers."""

import subprocess
import sys

import pytest
import torch
from solvers.references import DTYPES, SIZES, cayley_lu, error, expm_scipy, general, skew

from lmc_fast import implementations
from lmc_fast.solvers import cayley, expm

SOLVERS = {"cayley": (cayley, cayley_lu), "expm": (expm, expm_scipy)}
native = implementations.extension()
needs_extension = pytest.mark.skipif(native is None, reason="the C++ solvers are not built")


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def forward_backward(f, X, G, threads=1):
    """f(X) and its gradient. Only the solver gets several threads: torch's own crawl on a busy machine."""
    leaf = X.clone().requires_grad_()
    torch.set_num_threads(threads)
    Y = f(leaf)
    Y.backward(G)
    torch.set_num_threads(1)
    return Y.detach(), leaf.grad


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("n", SIZES)
def test_same_bits_at_every_thread_count(name, n):
    f = SOLVERS[name][0]
    for batch in (1, 5) if n < 100 else (3,):
        X, G = skew(batch, n, 1.0, torch.float32), general(batch, n, 1.0, torch.float32)
        results = [forward_backward(f, X, G, threads) for threads in (1, 2, 3)]
        for Y, grad in results[1:]:
            assert torch.equal(Y, results[0][0])
            assert torch.equal(grad, results[0][1])


@needs_extension
@pytest.mark.parametrize("isa", ("generic", "avx2", "avx512"))
def test_every_instruction_set(isa):
    before = native.isa()
    try:
        native.use_isa(isa)
    except ValueError:
        pytest.skip(f"this processor does not run {isa}")
    try:
        for dtype, tolerance in zip(DTYPES, (3e-6, 1e-14), strict=True):
            for n in (1, 2, 15, 16, 33, 130, 260) if dtype == torch.float32 else (1, 9, 16, 70):
                X, G = skew(2, n, 1.0, dtype), general(2, n, 1.0, dtype)
                for f, reference in SOLVERS.values():
                    Y, grad = forward_backward(f, X, G)
                    assert error(Y, reference(X.double())) < tolerance
                    plain = torch.linalg.matrix_exp if f is expm else cayley_lu
                    assert error(grad, forward_backward(plain, X.double(), G.double())[1]) < tolerance
    finally:
        native.use_isa(before)


@needs_extension
@pytest.mark.parametrize("isa", ("generic", "avx2", "nonsense"))
def test_the_environment_chooses_the_instruction_set(isa, monkeypatch):
    before = native.isa()
    monkeypatch.setenv("LMC_FAST_ISA", isa)
    try:
        assert implementations.import_extension.__wrapped__().isa() == isa
        X = skew(2, 33, 1.0, torch.float64)
        assert error(cayley(X), torch.linalg.solve(torch.eye(33) - X / 2, torch.eye(33) + X / 2)) < 1e-14
    except ValueError as refused:
        assert str(refused).startswith(f'LMC_FAST_ISA is "{isa}": ') and native.isa() == before
        if isa != "nonsense":
            pytest.skip(f"this processor does not run {isa}")
    finally:
        native.use_isa(before)


@pytest.mark.parametrize("name", SOLVERS)
def test_shapes_and_strides(name):
    f = SOLVERS[name][0]
    X = skew(6, 10, 1.0, torch.float64)
    flat = f(X)
    assert torch.equal(f(X.view(2, 3, 10, 10)), flat.view(2, 3, 10, 10))
    assert torch.equal(f(X[4]), flat[4])
    assert torch.equal(f(X[::2]), flat[::2])
    assert torch.equal(f(X.mT), f(X.mT.contiguous()))
    assert torch.equal(f(X[:, ::2, ::2]), f(X[:, ::2, ::2].contiguous()))
    assert torch.equal(f(X[:1].expand(3, 10, 10)), flat[:1].expand(3, 10, 10))
    grad = forward_backward(f, X, torch.ones(()).double().expand(6, 10, 10))[1]
    assert torch.equal(grad, forward_backward(f, X, torch.ones(6, 10, 10).double())[1])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shape", ((0, 5, 5), (3, 0, 0), (2, 0, 4, 4)))
def test_empty(name, shape):
    X = torch.empty(shape, requires_grad=True)
    Y = SOLVERS[name][0](X)
    assert Y.shape == X.shape
    Y.sum().backward()
    assert X.grad is not None and X.grad.shape == X.shape


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("grad", (False, True))
def test_non_finite_is_refused(name, value, grad):
    X = skew(4, 20, 1.0, torch.float32)
    X[2, 3, 7], X[2, 7, 3] = value, -value
    with pytest.raises(ValueError, match=rf"{name}: .*non-finite.*matrix 2 of 4"):
        SOLVERS[name][0](X.requires_grad_(grad))


@needs_extension
@pytest.mark.parametrize("threads", (1, 3))
def test_no_order_hides_a_nan_or_a_large_norm(threads):
    """The length of the tape follows the largest norm of the batch."""
    eye = torch.eye(20)
    sizes = torch.tensor([100.0, float("nan"), 1.0] * 200)  # enough for threads
    X = sizes[:, None, None] * eye

    def norm(X):
        return native.one_norm_float32(X.data_ptr(), len(X), 20, threads)

    assert norm(X) != norm(X)
    assert norm(X[::3].contiguous()) == 100 and norm(X[2::3].contiguous()) == 1
    torch.set_num_threads(threads)
    with pytest.raises(ValueError, match=r"non-finite.*matrix 1 of 600"):
        expm(X.requires_grad_())
    early = eye.clone()[None]
    early[0, 0, 0] = float("nan")  # the columns after it are finite
    assert norm(early) != norm(early)


@pytest.mark.parametrize("name", SOLVERS)
def test_wrong_types_are_refused(name):
    f = SOLVERS[name][0]
    with pytest.raises(ValueError, match="square"):
        f(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="float32 or float64"):
        f(torch.zeros(3, 3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        f([[0.0]])


@pytest.mark.parametrize("name", SOLVERS)
def test_double_backward_is_refused(name):
    X = skew(1, 3, 1.0, torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(SOLVERS[name][0](X).sum(), X, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("name", SOLVERS)
def test_retained_graph_gives_the_same_gradient(name):
    X = skew(3, 12, 4.0, torch.float64).requires_grad_()
    loss = SOLVERS[name][0](X).square().sum() + SOLVERS[name][0](X)[0, 0, 1]
    first = torch.autograd.grad(loss, X, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, X)[0])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("n", (5, 16, 50))
def test_nothing_is_read_before_it_is_written(name, n, monkeypatch):
    """Fresh tensors full of NaN, and scratch left dirty by a refused matrix."""
    f = SOLVERS[name][0]
    X, G = skew(3, n, 3.0, torch.float64), general(3, n, 1.0, torch.float64)
    clean = forward_backward(f, X, G)
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: empty(*a, **k).fill_(-1 if k.get("dtype") == torch.int32 else float("nan"))
    )
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    with pytest.raises(ValueError, match="non-finite"):
        f(torch.full_like(X, float("nan")))
    dirty = forward_backward(f, X, G)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@needs_extension
@pytest.mark.parametrize("n", (3, 16, 31))
def test_skew_matrices_are_recognised_whatever_the_signs_of_their_zeros(n):
    X = torch.stack([-skew(1, n, 1.0, torch.float32)[0], torch.full((n, n), -0.0)])
    Q = torch.empty_like(X)

    def status():
        return native.cayley_forward_float32(X.data_ptr(), Q.data_ptr(), 2, n, 1)

    assert status() == (-1, 0)
    assert torch.equal(Q[1], torch.eye(n))
    X[1, 0, 1] = torch.finfo(torch.float32).tiny
    assert status() == (1, 1)
    X[1, 0, 1] = X[1, 1, 0] = float("inf")
    assert status() == (1, 1)


@needs_extension
@pytest.mark.parametrize("n", (3, 16, 31))
def test_nothing_is_written_outside(n):
    X, G = skew(2, n, 1.0, torch.float32), general(2, n, 1.0, torch.float32)
    guard, size = 64, X.numel()

    def guarded():
        return torch.full((size + 2 * guard,), 7.0)

    Q, X_bar = guarded(), guarded()
    inside = Q.element_size() * guard
    native.cayley_forward_float32(X.data_ptr(), Q.data_ptr() + inside, 2, n, 1)
    native.cayley_backward_float32(Q.data_ptr() + inside, G.data_ptr(), X_bar.data_ptr() + inside, 2, n, 1)
    for buffer in (Q, X_bar):
        assert (buffer[:guard] == 7).all() and (buffer[-guard:] == 7).all()
    assert torch.equal(Q[guard:-guard].view(2, n, n), cayley(X))


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(implementations, "import_extension", lambda: None)
    implementations.extension.cache_clear()
    yield
    implementations.extension.cache_clear()


def test_without_the_extension_one_warning_and_the_same_results(without_extension):
    X, G = skew(3, 20, 2.0, torch.float64), general(3, 20, 1.0, torch.float64)
    with pytest.warns(RuntimeWarning, match="not built") as caught:
        results = {name: forward_backward(f, X, G) for name, (f, _) in SOLVERS.items()}
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert implementations.backends().cpu == "torch" and implementations.backends().isa == "none"
    for name, (_, reference) in SOLVERS.items():
        assert error(results[name][0], reference(X)) < 1e-14
    for f, plain, got in ((cayley, cayley_lu, results["cayley"]), (expm, torch.linalg.matrix_exp, results["expm"])):
        assert error(got[1], forward_backward(plain, X, G)[1]) < 1e-13
        assert torch.autograd.gradcheck(f, general(2, 4, 1.0, torch.float64).requires_grad_())
        with pytest.raises(ValueError, match="non-finite"):
            f(torch.full((2, 2), float("nan")))


def test_forked_processes_get_threads_of_their_own():
    code = (
        "import os, torch; from lmc_fast.solvers import cayley; torch.set_num_threads(2)\n"
        "W = torch.randn(24, 32, 32); X = W - W.mT; Q = cayley(X); pid = os.fork()\n"
        "ok = torch.equal(cayley(X), Q)\n"
        "if pid == 0: os._exit(0 if ok else 1)\n"
        "assert ok and os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_importable_without_transformers():
    code = "import sys, lmc_fast.solvers; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
