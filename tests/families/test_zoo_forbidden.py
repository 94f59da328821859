"""Changes that look like symmetries and are not: no group element expresses them, and each changes the function.

They guard the places where an implementation of a family goes wrong without an error.
"""

import dataclasses

import pytest
import torch
import zoo
from elements import KNOWN, Random, random_element
from test_zoo_symmetries import canonical, changed

from lmc_fast.architectures.layouts import Plain
from lmc_fast.checkpoints import Model, export
from lmc_fast.checkpoints.weights import Weights
from lmc_fast.symmetry import Transform, canonicalize
from lmc_fast.symmetry.canonical import for_each_query
from lmc_fast.symmetry.elements import orthogonal

VISIBLE = 1e-3


def loaded(directory):
    return Model(directory).load(torch.float64)


def edited(weights, **changes):
    """Slots of the first block replaced; a function gets the block."""
    block = weights.blocks[0] | {slot: change(weights.blocks[0]) for slot, change in changes.items()}
    return Weights(weights.spec, weights.ends, [block, *weights.blocks[1:]])


def roll_heads(count):
    return lambda t: t.unflatten(0, (count, -1)).roll(1, 0).flatten(0, 1)


FORBIDDEN = {
    "the embedding's mean is not invisible to RMSNorm": (
        "mistral",
        lambda w: Weights(
            w.spec, w.ends | {"embed": w.ends["embed"] - w.ends["embed"].mean(1, keepdim=True)}, w.blocks
        ),
    ),
    "a key bias under RoPE is seen": ("qwen2", lambda w: edited(w, k_bias=lambda b: b["k_bias"] * 0)),
    "a key bias is seen where keys meet queries of distances": (
        "deberta",
        lambda w: edited(w, k_bias=lambda b: b["k_bias"] * 0),
    ),
    "the table of distances moves with the stream": (
        "deberta",
        lambda w: edited(w, relative=lambda b: b["relative"].roll(1, 1)),
    ),
    "without a norm in front, the mean of the stream is seen": (
        "modernbert",
        lambda w: edited(w, q=lambda b: b["q"] - b["q"].mean(1, keepdim=True)),
    ),
    "a sink is seen by one query head": ("gpt-oss", lambda w: edited(w, sinks=lambda b: b["sinks"].roll(1, 0))),
    "a value bias that a sink takes a share of does not fold": (
        "gpt-oss",
        lambda w: edited(
            w,
            v_bias=lambda b: b["v_bias"] * 0,
            o_bias=lambda b: b["o_bias"] + b["o"] @ for_each_query(w.spec, b["v_bias"]),
        ),
    ),
    "a gate cannot be scaled": (
        "mistral",
        lambda w: edited(w, gate=lambda b: 2 * b["gate"], down=lambda b: b["down"] / 2),
    ),
    "queries stay in their group": (
        "mistral",
        lambda w: edited(w, q=lambda b: roll_heads(4)(b["q"]), o=lambda b: roll_heads(4)(b["o"].mT).mT),
    ),
    "the query norm's gain does not fold into the query projection": (
        "qwen3",
        lambda w: edited(
            w, q=lambda b: b["q"] * b["q_norm"].repeat(4)[:, None], q_norm=lambda b: torch.ones_like(b["q_norm"])
        ),
    ),
    "one query head's sign is seen": (
        "qwen3",
        lambda w: edited(w, q=lambda b: torch.cat([-b["q"][:8], b["q"][8:]])),
    ),
    "OLMo-2's heads do not move without their gains": (
        "olmo2",
        lambda w: edited(
            w,
            **{n: (lambda b, n=n, c=c: roll_heads(c)(b[n])) for n, c in (("q", 2), ("k", 2), ("v", 2))},
            o=lambda b: roll_heads(2)(b["o"].mT).mT,
        ),
    ),
    "experts do not move without their router rows": (
        "mixtral",
        lambda w: edited(
            w, **{n: (lambda b, n=n: b[n].roll(1, 0)) for n in ("experts_up", "experts_gate", "experts_down")}
        ),
    ),
    "a router cannot be scaled": ("mixtral", lambda w: edited(w, router=lambda b: 2 * b["router"])),
    "an interior norm of BERT does not fold": (
        "bert",
        lambda w: edited(
            w,
            attn_post_norm=lambda b: torch.ones_like(b["attn_post_norm"]),
            up=lambda b: b["up"] * b["attn_post_norm"],
        ),
    ),
    "signs of single channels of BERT are seen": (
        "bert",
        lambda w: _with_stream(random_element(KNOWN["bert"], w.spec, 1), _one_flip(24)).apply(w),
    ),
}


def _with_stream(element, matrix):
    return Transform(element.model | {"stream": orthogonal(matrix)}, element.blocks)


def _one_flip(n):
    flip = torch.eye(n, dtype=torch.float64)
    flip[3, 3] = -1
    return flip


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_looks_like_a_symmetry_and_is_none(what, checkpoint_of, expected_of):
    name, change = FORBIDDEN[what]
    weights = loaded(checkpoint_of(name))
    assert changed(name, weights, expected_of(name)) < 1e-12
    assert changed(name, change(weights), expected_of(name)) > VISIBLE


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bloom", "the embedding's norm has gains until its table is solved anew"),
        ("dinov2", "the layer-scale sits between writer and stream until it is folded"),
        ("mistral", "norms have gains until they are absorbed"),
        ("olmoe", "norms have gains until they are absorbed"),
    ],
)
def test_a_rotation_needs_the_canonical_form(name, why, checkpoint_of, expected_of):
    weights = loaded(checkpoint_of(name))
    element = random_element(KNOWN[name], weights.spec, 2)
    element.blocks = [{} for _ in element.blocks]
    assert changed(name, element.apply(weights), expected_of(name)) > VISIBLE, why
    assert changed(name, element.apply(canonicalize(weights)), expected_of(name)) < 1e-12


def test_a_rotation_that_skips_the_router(checkpoint_of, expected_of):
    weights = canonical(checkpoint_of("mixtral"))
    rotation = Random(1).residual("any", 24)
    element = Transform({"stream": orthogonal(rotation)}, [{} for _ in range(weights.spec.layers)])
    moved = element.apply(weights)
    for old, new in zip(weights.blocks, moved.blocks, strict=True):
        new["router"] = old["router"]
    assert changed("mixtral", moved, expected_of("mixtral")) > VISIBLE


@pytest.mark.parametrize("name", ["gpt2-tied", "gemma", "qwen2-tied-window"])
def test_the_tie_cannot_be_kept(name, checkpoint_of, expected_of, tmp_path):
    """The final norm's gain is in the head now: a tied export would lose it."""
    model = Model(checkpoint_of(name))
    weights = canonical(model.path)
    assert not weights.spec.tied
    export(
        Weights(dataclasses.replace(weights.spec, tied=True), weights.ends, weights.blocks), model, tmp_path / "tied"
    )
    found = zoo.outcome(name, zoo.reference(tmp_path / "tied", zoo.inputs(name)))
    expected = zoo.outcome(name, expected_of(name))
    assert (found - expected).abs().max() > VISIBLE * expected.abs().max()


def test_gptj_pairs_neighbours(checkpoint_of, expected_of):
    """Read without reordering, as if its rotary pairs were half a head apart, it is another function."""
    model = Model(checkpoint_of("gptj"))
    plain = tuple(dataclasses.replace(e, layout=Plain()) if e.slots[0] in "qk" else e for e in model.family.block)
    model.family = dataclasses.replace(model.family, block=plain)
    assert changed("gptj", model.load(torch.float64), expected_of("gptj")) > VISIBLE


def test_falcons_one_norm_keeps_its_bias_in_mid_network(checkpoint_of):
    """Readers without biases cannot take the norm's: it stays, divided by the gain, and turns with the stream."""
    weights = canonical(checkpoint_of("falcon-7b"))
    element = random_element(KNOWN["falcon-7b"], weights.spec, 2)
    before, after = weights.blocks[0]["attn_norm_bias"], element.apply(weights).blocks[0]["attn_norm_bias"]
    assert before.abs().max() > 0.1 and torch.allclose(after, element.stream.matrix @ before)
