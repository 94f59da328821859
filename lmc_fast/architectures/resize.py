"""The sizes of an architecture, and the config of the same architecture with other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from .spec import Spec

Sizes = dict[str, int]

_KEYS = {  # of config.json, as far as the family has them
    "blocks": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "width": ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "key/value groups": ("num_key_value_heads", "num_kv_heads"),
    "FFN units": (
        "intermediate_size",
        "n_inner",
        "hidden_dim",
        "ffn_dim",
        "ffn_hidden_size",
        "shared_expert_intermediate_size",
    ),
    "units of an expert": ("intermediate_size", "moe_intermediate_size"),
}
_RATIOS = range(1, 65)


def sizes_of(spec: Spec) -> Sizes:
    """What may differ between two models of one architecture, by the names that users read."""
    att, ffn = spec.attention, spec.ffn
    return {
        "blocks": spec.layers,
        "width": spec.width,
        "heads": att.heads,
        "key/value groups": att.kv_heads,
        "head_dim": att.head_dim,
        "FFN units": ffn.width,
        "experts": ffn.experts.count,
        "units of an expert": ffn.experts.width,
    }


def common_spec(specs: Sequence[Spec]) -> Spec:
    """The smallest one that has room for models of all these: the largest of each size, with what depends on it."""
    sizes = [sizes_of(spec) for spec in specs]
    most = {name: max(s[name] for s in sizes) for name in sizes[0]}
    found = next((spec for spec, s in zip(specs, sizes, strict=True) if s == most), None)
    if found:
        return found
    groups = most["key/value groups"]
    most["heads"] = groups * max(spec.attention.queries_per_group for spec in specs)
    if all(spec.attention.query_width == spec.width for spec in specs):  # many families take it for granted
        most["width"] = most["heads"] * most["head_dim"]
    if all(spec.ffn.width == 4 * spec.width for spec in specs):  # BLOOM takes it for granted
        most["FFN units"] = 4 * most["width"]
    widest = max(specs, key=attrgetter("width"))
    longest = max(specs, key=attrgetter("attention.head_dim"))
    deepest = max(specs, key=attrgetter("layers"))
    attention = replace(longest.attention, heads=most["heads"], kv_heads=groups, windows=deepest.attention.windows)
    experts = replace(widest.ffn.experts, count=most["experts"], width=most["units of an expert"])
    ffn = replace(widest.ffn, width=most["FFN units"], experts=experts)
    layers, width = most["blocks"], most["width"]
    rope = replace(longest.rope, blocks=deepest.rope.blocks)
    return replace(widest, layers=layers, width=width, attention=attention, ffn=ffn, rope=rope)


def resized(config: dict[str, Any], parsed: Any, spec: Spec) -> dict[str, Any]:
    """A config.json with the sizes of `spec`. parsed: it, as transformers reads it. Whether the family can say these
    sizes shows when the result is read.
    """
    kind, sizes, windows = type(parsed), sizes_of(spec), spec.attention.windows
    own = {name for name in (*kind.__dataclass_fields__, *vars(parsed)) if name not in kind.attribute_map}
    out = {key: value for key, value in config.items() if key not in kind.attribute_map}
    out |= {kind.attribute_map[key]: value for key, value in config.items() if key in kind.attribute_map}
    for name, keys in _KEYS.items():
        if name == "units of an expert" and not sizes["experts"]:
            continue
        if name == "FFN units" and sizes["experts"]:
            keys = ("shared_expert_intermediate_size",)
        if "moe_intermediate_size" in own:
            keys = tuple(key for key in keys if key != "intermediate_size" or not sizes["experts"])
        out |= {key: sizes[name] for key in keys if key in own}
    said = not isinstance(getattr(kind, "head_dim", None), property) and getattr(parsed, "head_dim", None) is not None
    if said or sizes["width"] // sizes["heads"] != sizes["head_dim"]:
        out["head_dim"] = sizes["head_dim"]
    if "mlp_ratio" in own:
        out["mlp_ratio"] = next((r for r in _RATIOS if _units(out, r) == sizes["FFN units"]), out.get("mlp_ratio"))
    slides = [bool(window) for window in windows] or [False] * sizes["blocks"]
    if getattr(parsed, "layer_types", None) is not None:
        out["layer_types"] = ["sliding_attention" if x else "full_attention" for x in slides]
    if "attention_types" in own:  # GPT-Neo
        out["attention_layers"] = ["local" if x else "global" for x in slides]
        out["attention_types"] = [[out["attention_layers"], 1]]
    if "no_rope_layers" in own:
        out["no_rope_layers"] = [int(spec.rope.turns(i)) for i in range(sizes["blocks"])]
    return out


def _units(config: dict[str, Any], ratio: int) -> int:
    """FFN units that a ratio means (DINOv2)."""
    width = int(config["hidden_size"] * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if config.get("use_swiglu_ffn") else width
