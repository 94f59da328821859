"""The group: its elements keep the function, obey the group laws, and nothing else is let through."""

import pytest
import torch
from checkpoints_tiny import VARIANTS, reference_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from random_elements import random_element
from scipy.stats import ortho_group

from lmc_fast import LmcError
from lmc_fast.checkpoints import Model, export, lerp
from lmc_fast.engine.model import logits
from lmc_fast.symmetry import Transform, canonicalize, check_legal
from lmc_fast.symmetry.elements import Dense, Scale, Wreath
from lmc_fast.symmetry.storage import load_tensors, pack, save_tensors, unpack

SPECS = ["neox", "neox-sequential", "gpt2", "llama"]


def canonical(directory):
    return canonicalize(Model(directory).load(torch.float64))


def distance(x, y):
    pairs = zip([x.ends, *x.blocks], [y.ends, *y.blocks], strict=True)
    return max((a[name] - b[name]).abs().max().item() for a, b in pairs for name in a)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_elements_keep_the_function(variant, seed, make_checkpoint, tokens):
    weights = canonical(make_checkpoint(variant))
    element = random_element(weights.spec, seed)
    check_legal(element, weights.spec)
    moved = element.apply(weights)
    assert distance(moved, weights) > 0.1
    expected = reference_logits(make_checkpoint(variant), tokens).log_softmax(-1)
    assert (logits(moved, tokens).log_softmax(-1) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("variant", SPECS)
def test_a_moved_model_is_a_stock_model(variant, make_checkpoint, tokens, tmp_path):
    model = Model(make_checkpoint(variant))
    weights = canonical(model.path)
    export(random_element(weights.spec, 3).apply(weights), model, tmp_path / "out", torch.float64)
    expected = reference_logits(model.path, tokens).log_softmax(-1)
    assert (reference_logits(tmp_path / "out", tokens).log_softmax(-1) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("variant", SPECS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 3))
def test_group_laws(variant, make_checkpoint, seeds):
    weights = canonical(make_checkpoint(variant))
    f, g, h = (random_element(weights.spec, seed) for seed in seeds)
    one = Transform.identity(weights.spec)
    assert distance(one.apply(weights), weights) == 0
    assert distance(g.compose(f).apply(weights), g.apply(f.apply(weights))) < 1e-9
    assert distance(g.inverse().apply(g.apply(weights)), weights) < 1e-9
    assert distance(g.compose(g.inverse()).apply(weights), weights) < 1e-9
    left, right = h.compose(g).compose(f), h.compose(g.compose(f))
    assert distance(left.apply(weights), right.apply(weights)) < 1e-9
    assert distance(one.compose(g).apply(weights), g.compose(one).apply(weights)) < 1e-12
    both = g.compose(f).inverse(), f.inverse().compose(g.inverse())
    assert distance(both[0].apply(weights), both[1].apply(weights)) < 1e-8
    check_legal(left, weights.spec)
    check_legal(g.inverse(), weights.spec)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_relative_element_matters(variant, make_checkpoint, tokens):
    """Gauge fixing: f((1-λ) g_A A + λ g_B B) = f((1-λ) A + λ g_A⁻¹ g_B B)."""
    a, b = (canonical(make_checkpoint(variant, seed)) for seed in (1, 2))
    g_a, g_b = random_element(a.spec, 4), random_element(a.spec, 5)
    for t in (0.0, 0.3, 0.7, 1.0):
        both = logits(lerp(g_a.apply(a), g_b.apply(b), t), tokens).log_softmax(-1)
        one = logits(lerp(a, g_a.inverse().compose(g_b).apply(b), t), tokens).log_softmax(-1)
        assert (both - one).abs().max() < 1e-10 * both.abs().max()


def _break(element, space, change):
    if space == "stream":
        return Transform({"stream": Dense.orthogonal(change(element.stream.matrix))}, element.blocks)
    g = element.blocks[1].get(space)
    if isinstance(g, Dense):
        broken = Dense(change(g.matrix), torch.linalg.inv(change(g.matrix)))
    elif space == "scale":
        space, places = "units", element.blocks[1]["units"].places
        inner = element.blocks[1]["units"].inner
        broken = Wreath(places, Scale(change(getattr(inner, "scale", None))))
    else:
        broken = Wreath(change(g.places), g.inner)
    return Transform(element.model, [element.blocks[0], element.blocks[1] | {space: broken}])


_SIGNS = torch.tensor([-1.0] + [1.0] * 23, dtype=torch.float64)


def _generic_rotation():
    return torch.from_numpy(ortho_group.rvs(24, random_state=0))


def _swap_rows(x):
    return x[..., [1, 0, *range(2, x.shape[-2])], :]


ILLEGAL = [
    ("neox", "stream", lambda r: r * 1.1, "orthogonal"),
    ("neox", "stream", lambda r: r @ _generic_rotation(), "ones"),
    ("gpt2", "stream", lambda r: r * _SIGNS, "ones"),
    ("neox", "qk", _swap_rows, "rotary"),
    ("llama", "qk", _swap_rows, "rotary"),
    ("neox", "vo", lambda m: m[:2], "invertible"),
    ("neox", "heads", lambda p: torch.zeros_like(p), "permutation"),
    ("llama", "queries", lambda p: torch.zeros_like(p), "permutation"),
    ("neox", "units", lambda p: p[:-1], "shape"),
    ("neox", "scale", lambda _: torch.full((40,), 2.0).double(), "homogeneous"),
    ("neox-sequential", "scale", lambda s: -s, "positive"),
    ("llama", "scale", lambda s: s * 0, "zero"),
]


@pytest.mark.parametrize(("variant", "part", "change", "words"), ILLEGAL)
def test_illegal_elements_are_refused_and_would_change_the_function(
    variant, part, change, words, make_checkpoint, tokens
):
    weights = canonical(make_checkpoint(variant))
    broken = _break(random_element(weights.spec, 6), part, change)
    with pytest.raises(LmcError, match=words):
        check_legal(broken, weights.spec)
    if words in ("ones", "orthogonal", "rotary", "homogeneous", "positive"):
        before, after = logits(weights, tokens).log_softmax(-1), logits(broken.apply(weights), tokens).log_softmax(-1)
        assert (before - after).abs().max() > 1e-2


def test_turning_everything_round_is_legal_for_layernorm(make_checkpoint, tokens):
    weights = canonical(make_checkpoint("neox"))
    element = random_element(weights.spec, 6)
    element.model["stream"] = element.stream.map(torch.neg)
    check_legal(element, weights.spec)
    change = logits(element.apply(weights), tokens).log_softmax(-1) - logits(weights, tokens).log_softmax(-1)
    assert change.abs().max() < 1e-9


def test_differentiable_in_the_element(make_checkpoint):
    weights = canonical(make_checkpoint("neox"))
    element = random_element(weights.spec, 7)
    rotation, maps = element.stream.matrix.requires_grad_(), element.blocks[0]["vo"].matrix.requires_grad_()
    element.model["stream"] = Dense.orthogonal(rotation)
    moved = element.apply(weights)
    (moved.blocks[0]["v"].sum() + moved.ends["head"].sum()).backward()
    assert rotation.grad.abs().max() > 0 and maps.grad.abs().max() > 0


def test_result_keeps_the_dtype_of_the_weights(make_checkpoint):
    weights = canonical(make_checkpoint("neox"))
    element = random_element(weights.spec, 8)
    exact, rounded = element.apply(weights), element.apply(weights.to(torch.float32))
    assert rounded.blocks[0]["q"].dtype == torch.float32
    assert distance(exact, rounded.to(torch.float64)) < 1e-5


def test_storage_round_trip_and_damage(make_checkpoint, tmp_path):
    weights = canonical(make_checkpoint("llama"))
    element = random_element(weights.spec, 9)
    save_tensors(tmp_path / "x.safetensors", pack(element, "a"), {"n": 1})
    tensors, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"n": 1}
    again = pack(unpack(tensors, "a", 2), "a")
    assert again.keys() == pack(element, "a").keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in pack(element, "a").items())
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:200])
    for name in ("x.safetensors", "absent"):
        with pytest.raises(LmcError, match=name):
            load_tensors(tmp_path / name)
