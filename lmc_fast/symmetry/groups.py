"""Which symmetries a spec has, and why the others are off."""

from __future__ import annotations

from dataclasses import dataclass

from ..architectures import Spec


@dataclass(frozen=True)
class Group:
    """One factor of the symmetry group. `what` names it; `why` gives the reason, above all when it is not legal."""

    name: str
    legal: bool
    what: str
    why: str


def legal_groups(spec: Spec) -> list[Group]:
    """Every symmetry this library knows, legal for `spec` or not, with the reason."""
    layernorm = spec.norm == "layernorm"
    e, rotary = spec.head_dim, spec.rotary_dim
    rest = e - rotary
    qk = " and ".join(([f"{rotary // 2} scaled plane rotations"] if rotary else []) + ([f"GL({rest})"] if rest else []))
    return [
        Group("norm absorption", True, "gains and biases fold into their readers", f"pre-{spec.norm}"),
        Group(
            "residual rotation",
            True,
            f"O({spec.width}) fixing the ones vector" if layernorm else f"O({spec.width})",
            "LayerNorm subtracts the mean, so 1 must stay where it is" if layernorm else "RMSNorm sees only the length",
        ),
        Group("residual scale", False, "one factor on the stream", "inexact: the norms' epsilon stays as it is"),
        Group("heads", True, f"permutations of {spec.kv_heads} key/value groups", "attention sums over heads"),
        Group(
            "queries",
            spec.queries_per_group > 1,
            f"permutations of {spec.queries_per_group} query heads within each group",
            "they share one key and value" if spec.queries_per_group > 1 else "one query head per key head",
        ),
        Group("value/output maps", True, f"GL({e}) per key/value group", "no nonlinearity between value and output"),
        Group(
            "query/key maps",
            True,
            f"{qk} per key/value group",
            f"must commute with RoPE on {rotary} of {e} dimensions"
            if rotary
            else "without RoPE only the product q·k counts",
        ),
        Group("FFN units", True, f"permutations of {spec.ffn_width} units", "the FFN sums over units"),
        Group("FFN scales", *_unit_scales(spec)),
    ]


def unit_scale_signs(spec: Spec) -> str:
    """'any' (non-zero), 'positive' or 'none': the legal scales between up and down projection."""
    if spec.gated:
        return "any"
    return "positive" if spec.activation == "relu" else "none"


def _unit_scales(spec: Spec) -> tuple[bool, str, str]:
    signs = unit_scale_signs(spec)
    if signs == "any":
        return True, "any non-zero factor between up and down", "the up projection meets no nonlinearity before down"
    if signs == "positive":
        return True, "positive factors between up and down", "ReLU is positively homogeneous"
    return False, "factors between up and down", f"{spec.activation} is not homogeneous"
