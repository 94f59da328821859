"""Models of the zoo in other sizes."""

from __future__ import annotations

from pathlib import Path

import transformers
import zoo

KEYS = {
    "width": ("hidden_size", "n_embd", "word_embed_proj_dim"),
    "heads": ("num_attention_heads", "n_head"),
    "groups": ("num_key_value_heads", "num_kv_heads"),
    "ffn": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "n_inner"),
    "shared": ("shared_expert_intermediate_size",),
    "depth": ("num_hidden_layers", "n_layer"),
    "experts": ("num_experts", "num_local_experts"),
    "head_dim": ("head_dim",),
}


def enlarge(small: Path, out: Path, changes: dict[str, int | float]) -> None:
    """Random parameters in the shape of `small` with other sizes: numbers, or factors where they are no integers."""
    config = transformers.AutoConfig.from_pretrained(small)
    values, own = config.to_dict(), type(config).__dataclass_fields__
    for what, size in changes.items():
        for key in KEYS[what]:
            if key in own and (values.get(key) is not None or key == "n_inner"):
                values[key] = int(values[key] * size) if isinstance(size, float) else size
    if values.get("layer_types"):
        values["layer_types"] = (values["layer_types"] * 4)[: values["num_hidden_layers"]]
    large = getattr(transformers, config.architectures[0])(type(config).from_dict(values))
    zoo.randomize(large, 2)
    large.save_pretrained(out)
