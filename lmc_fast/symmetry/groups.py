"""Which symmetries a spec has, and why the others are off: all derived from the spec's features."""

from __future__ import annotations

from dataclasses import dataclass

from ..architectures import Spec

_ALIBI = "ALiBi's slope belongs to the head's index"


@dataclass(frozen=True)
class Group:
    """One factor of the symmetry group.

    Attributes:
        name: of the factor, e.g. "residual rotation".
        legal: whether it may be used.
        what: the group itself, with its sizes.
        why: the reason, above all where it is not legal.

    >>> stream = lmc.inspect("A").groups[1]
    >>> stream.legal, stream.what
    (True, 'O(24) fixing the ones vector')
    """

    name: str
    legal: bool
    what: str
    why: str


# The residual groups, by name:
ORTHOGONAL = "orthogonal"  # O(d)
FIXING_ONES = "orthogonal, fixing the ones vector"  # R 1 = ±1
SIGNED = "signed permutation"
PERMUTATION = "permutation"  # one permutation, or its negative
FIXED = "identity"


def residual_group(spec: Spec) -> str:
    """What may act on the residual stream.

    A norm's gain in the stream's own path cannot be folded away, and only moves with coordinates. One norm of token
    embeddings alone can: the embedding table is solved anew behind it (see canonical).
    """
    if spec.headless:
        return FIXED
    if spec.norms.placement == "pre" and not _stream_is_normed(spec):
        return FIXING_ONES if spec.norms.kind == "layernorm" else ORTHOGONAL
    return PERMUTATION if spec.norms.kind == "layernorm" else SIGNED


def rotates(spec: Spec) -> bool:
    """The residual group is continuous."""
    return residual_group(spec) in (ORTHOGONAL, FIXING_ONES)


def resolves_embedding(spec: Spec) -> bool:
    """Each row of the embedding table is normalised on its own, so that the table can be solved for any outcome."""
    alone = not (spec.position_table or spec.types or spec.image or spec.norms.bare_start)
    norms = spec.norms
    return norms.embedded and norms.parametric and norms.placement == "pre" and norms.kind == "layernorm" and alone


def _stream_is_normed(spec: Spec) -> bool:
    return spec.norms.embedded and spec.norms.parametric and not resolves_embedding(spec)


def heads_move(spec: Spec) -> bool:
    """Heads may be permuted: ALiBi's slopes belong to a head's index."""
    return not spec.attention.alibi


def value_maps(spec: Spec) -> str:
    """'general' (invertible) or 'signed' (permutation with signs) maps between value and output."""
    return "signed" if spec.attention.clip_qkv else "general"


def query_key_maps(spec: Spec) -> str:
    """'general' (commuting with RoPE), 'turns' (also signed permutations) or 'signs' (equal within a rotary pair)."""
    if spec.attention.qk_norm:
        return "signs"
    return "turns" if spec.attention.clip_qkv else "general"


def unit_scale_signs(spec: Spec) -> str:
    """'any' (non-zero), 'positive' or 'none': the legal scales between up and down projection."""
    if spec.ffn.clamped:
        return "none"
    if spec.ffn.gated:
        return "any"
    return "positive" if spec.ffn.activation in ("relu", "leaky_relu") else "none"


def folds_value_bias(spec: Spec) -> bool:
    """Attention rows sum to one: a value bias is an output bias, unless values are clamped, or a sink takes a share."""
    return not (spec.attention.clip_qkv or spec.attention.sinks)


def hides_key_bias(spec: Spec) -> bool:
    """q·b adds the same to every score, which the softmax does not see, unless something nonlinear sees it first.

    Where keys meet a query of their distance, or a sink has a score of its own, it does not add the same.
    """
    att = spec.attention
    return not (att.qk_norm or att.clip_qkv or att.softcap or att.distances or att.sinks)


def hides_head_mean(spec: Spec) -> bool:
    """A common shift of all logits of a token is invisible: not behind a soft cap, nor where logits are used raw."""
    return spec.task in ("causal", "masked") and not spec.head_softcap


def legal_groups(spec: Spec) -> list[Group]:
    """Every symmetry this library knows, legal for `spec` or not, with the reason."""
    return [
        Group("norm absorption", *_absorption(spec)),
        Group("residual rotation", *_residual(spec)),
        Group("residual scale", False, "one factor on the stream", "inexact: the norms' epsilon stays as it is"),
        Group("heads", *_heads(spec)),
        Group("queries", *_queries(spec)),
        Group("value/output maps", True, *_value_maps(spec)),
        Group("query/key maps", True, *_query_key_maps(spec)),
        *_units(spec),
        *_mixture(spec),
    ]


def _queries(spec: Spec) -> tuple[bool, str, str]:
    count = spec.attention.queries_per_group
    what = f"permutations of {count} query heads within each group"
    if count == 1:
        return False, what, "one query head per key head"
    if not heads_move(spec):
        return False, what, _ALIBI
    return True, what, "they share one key and value"


def _absorption(spec: Spec) -> tuple[bool, str, str]:
    if not spec.norms.parametric:
        return False, "gains and biases fold into their readers", f"the {spec.norms.kind} has none"
    if spec.norms.placement in ("pre", "sandwich"):
        return True, "gains and biases fold into their readers", f"pre-{spec.norms.kind}"
    what = (
        "the final norm's gain folds into the head"
        if spec.norms.placement == "branch"
        else "the head's norm folds into it"
    )
    return True, what, "the other norms lie in the stream's own path"


def _residual(spec: Spec) -> tuple[bool, str, str]:
    kind, d = residual_group(spec), spec.width
    if kind == FIXED:
        return False, "any change of basis", "the stream is the output: whoever reads it expects this basis"
    if kind == ORTHOGONAL:
        return True, f"O({d})", "RMSNorm sees only the length"
    if kind == FIXING_ONES:
        why = "LayerNorm subtracts the mean, so 1 must stay where it is"
        if resolves_embedding(spec):
            why += "; the embedding table is solved anew behind its norm"
        return True, f"O({d}) fixing the ones vector", why
    gains = (
        "the input's norm has a gain" if spec.norms.placement == "pre" else f"{spec.norms.placement}-norms have gains"
    )
    if kind == SIGNED:
        return True, f"signed permutations of {d} channels", f"{gains} in the stream, which only move with channels"
    return True, f"permutations of {d} channels, or one's negative", f"{gains} and biases in the stream"


def _heads(spec: Spec) -> tuple[bool, str, str]:
    why = "attention sums over heads" if heads_move(spec) else _ALIBI
    return heads_move(spec), f"permutations of {spec.attention.kv_heads} key/value groups", why


def _value_maps(spec: Spec) -> tuple[str, str]:
    if value_maps(spec) == "general":
        return f"GL({spec.attention.head_dim}) per key/value group", "no nonlinearity between value and output"
    return f"signed permutations of {spec.attention.head_dim} per key/value group", "values are clamped"


def _query_key_maps(spec: Spec) -> tuple[str, str]:
    e, rotary = spec.attention.head_dim, spec.rope.rotary_dim
    rest, kind = e - rotary, query_key_maps(spec)
    if kind == "signs":
        pairs = f"{rotary // 2} rotary pairs" + (f" and {rest} channels" if rest else "")
        return f"signs of {pairs} per key/value group", "queries and keys are normalised with a gain"
    if kind == "turns":
        parts = [f"quarter turns of {rotary // 2} planes"] if rotary else []
        parts += [f"signed permutations of {rest}"] if rest else []
        return " and ".join(parts) + " per key/value group", "queries and keys are clamped"
    parts = [f"{rotary // 2} scaled plane rotations"] if rotary else []
    parts += [f"GL({rest})"] if rest else []
    why = f"must commute with RoPE on {rotary} of {e} dimensions" if rotary else "without RoPE only the product counts"
    return " and ".join(parts) + " per key/value group", why


def _units(spec: Spec) -> list[Group]:
    if not spec.ffn.width:
        return []
    return [
        Group("FFN units", True, f"permutations of {spec.ffn.width} units", "the FFN sums over units"),
        Group("FFN scales", *_unit_scales(spec)),
    ]


def _mixture(spec: Spec) -> list[Group]:
    if not spec.ffn.experts.count:
        return []
    scales = ", any non-zero scales" if unit_scale_signs(spec) == "any" else ""
    each = f"in each expert: permutations of {spec.ffn.experts.width} units{scales}"
    return [
        Group("experts", True, f"permutations of {spec.ffn.experts.count} experts", "the router's rows move with them"),
        Group("expert units", True, each, "each expert is a gated FFN"),
        Group("router shift", True, "one vector added to every router row", "the softmax does not see it"),
    ]


def _unit_scales(spec: Spec) -> tuple[bool, str, str]:
    signs = unit_scale_signs(spec)
    if signs == "any":
        return True, "any non-zero factor between up and down", "the up projection meets no nonlinearity before down"
    if signs == "positive":
        return True, "positive factors between up and down", "ReLU is positively homogeneous"
    why = "units are clamped" if spec.ffn.clamped else f"{spec.ffn.activation} is not homogeneous"
    return False, "factors between up and down", why
