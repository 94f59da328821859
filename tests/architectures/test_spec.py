"""Spec: its groups, copies with changes, and the flat names under which fields are compared and remembered."""

from dataclasses import fields, is_dataclass

import pytest

from lmc_fast.architectures import FFN, Attention, Experts, ImageInput, Norms, Rope, Spec, flat_fields
from lmc_fast.pair import unlike
from lmc_fast.streaming.packing import fingerprint

MIXTURE = Experts(count=4, per_token=2, width=20)
SPEC = Spec(
    family="llama",
    layers=2,
    width=24,
    vocab=40,
    max_positions=32,
    attention=Attention(heads=4, kv_heads=2, head_dim=8),
    ffn=FFN(width=40, activation="silu", gated=True, experts=MIXTURE),
    norms=Norms(kind="rmsnorm", eps=1e-6),
    rope=Rope((1.0, 0.1, 0.01, 0.001)),
    biases=frozenset("qkv"),
)


def test_every_field_has_a_flat_name_of_its_own():
    def leaves(group):
        values = [getattr(group, f.name) for f in fields(group)]
        return sum(leaves(v) if is_dataclass(v) and not isinstance(v, ImageInput) else 1 for v in values)

    assert leaves(SPEC) == len(flat_fields(SPEC)) >= 50


def test_changed():
    other = SPEC.changed(norms={"eps": 1e-3}, ffn={"experts": Experts()}, rope=Rope(), tied=True)
    assert other.norms == Norms("rmsnorm", 1e-3) and other.tied and not other.rope.rotary_dim
    assert (other.ffn.width, other.ffn.experts.count, other.attention) == (40, 0, SPEC.attention)
    assert SPEC.shape("router") == (4, 24) and other.shape("router") is None
    assert SPEC.norms.eps == 1e-6 and SPEC.rope.rotary_dim == 8
    with pytest.raises(TypeError, match="epsilon"):
        SPEC.changed(norms={"epsilon": 1e-3})


def test_widths_of_heads():
    attention = Attention(heads=6, kv_heads=2, head_dim=8, windows=(0, 5))
    assert (attention.query_width, attention.kv_width, attention.queries_per_group) == (48, 16, 3)
    assert [attention.window(i) for i in range(2)] == [0, 5] and SPEC.attention.window(1) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"tied": True, "max_positions": 64}, None),
        ({"width": 32}, "width differs (24 and 32)"),
        ({"attention": {"kv_heads": 4}}, "kv_heads differs (2 and 4)"),
        ({"attention": {"softcap": 5.0}}, "attn_softcap differs (0.0 and 5.0)"),
        ({"ffn": {"width": 48}}, "ffn_width differs (40 and 48)"),
        ({"ffn": {"experts": Experts(count=8, per_token=2, width=20)}}, "experts differs (4 and 8)"),
        ({"ffn": {"experts": Experts(count=4, per_token=2, width=24)}}, "expert_width differs (20 and 24)"),
        ({"norms": {"kind": "layernorm"}}, "norm differs (rmsnorm and layernorm)"),
        ({"rope": {"scaling": 2.0}}, "rope_scaling differs (1.0 and 2.0)"),
        ({"rope": Rope((1.0, 0.2))}, "their rope settings differ"),
        ({"biases": frozenset()}, "biases differs (k, q, v and none)"),
        ({"family": "olmo"}, "their architectures differ (llama and olmo)"),
    ],
)
def test_what_differs_in_a_pair_is_named(change, words):
    assert unlike(SPEC, SPEC.changed(**change)) == words


def test_stores_that_were_written_before_there_were_groups_still_open():
    assert fingerprint(SPEC) == "8eca12242cbd6a742eb3d541a38de52a"
    image = SPEC.changed(image=ImageInput(8, 4, 3), front=1, tied=True)
    assert fingerprint(image) == "673fc4e8b6fd3e5c075d3d036afd172d"
