"""Models of the zoo in other sizes."""

from __future__ import annotations

from pathlib import Path

import transformers
import zoo

KEYS = {
    "width": ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "groups": ("num_key_value_heads", "num_kv_heads"),
    "ffn": ("intermediate_size", "hidden_dim", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "n_inner"),
    "shared": ("shared_expert_intermediate_size",),
    "depth": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
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
    for key in ("layer_types", "no_rope_layers"):
        if values.get(key):
            values[key] = (values[key] * 4)[: values["num_hidden_layers"]]
    if "attention_types" in values:
        values["attention_types"] = [[["global", "local"], values["num_layers"] // 2]]
        values["attention_layers"] = ["global", "local"] * (values["num_layers"] // 2)
    large = getattr(transformers, config.architectures[0])(type(config).from_dict(values))
    zoo.randomize(large, 2)
    large.save_pretrained(out)
