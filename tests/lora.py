"""LoRA adapters in peft's format, made and applied without peft and without the library's reader."""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."


def adapted(model: nn.Module, embeddings: bool = True) -> dict[str, nn.Module]:
    """Path -> module of everything that peft adapts by name: linear layers and, if wanted, embeddings."""
    kinds = (nn.Linear, Conv1D, nn.Embedding) if embeddings else (nn.Linear, Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def write_adapter(
    directory: Path, modules: dict[str, nn.Module], seed: int = 3, dtype=torch.float64, **changes
) -> Path:
    """Random factors of rank 3 (of q, query and the like: 2, by a pattern) for modules of a model."""
    generator = torch.Generator().manual_seed(3)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/model",
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {r".*\.(q_proj|query)": 2},
        "alpha_pattern": {"v_proj": 5},
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    } | changes
    tensors = {}
    for name, module in modules.items():
        columns, rows = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        rank = _found(config, "rank_pattern", "r", name)
        one = torch.randn(rank, columns, generator=generator, dtype=torch.float64) * 0.2
        other = torch.randn(rows, rank, generator=generator, dtype=torch.float64) * 0.2
        if isinstance(module, nn.Embedding):
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = other.mT
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = one.mT
        else:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = one
            tensors[f"{PREFIX}{name}.lora_B.weight"] = other
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _found(config: dict, pattern: str, option: str, name: str):
    patterns = config.get(pattern) or {}
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config[option])


@torch.no_grad()
def merge_into(model: nn.Module, directory: Path) -> nn.Module:
    """The model with an adapter's changes in its weights; head and embedding are apart afterwards."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.clone())
    for key, up in tensors.items():
        if not key.endswith((".lora_B.weight", ".lora_embedding_B")):
            continue
        name = key.removeprefix(PREFIX).rpartition(".lora_")[0]
        down = tensors[key.replace("lora_B", "lora_A").replace("embedding_B", "embedding_A")]
        rank, alpha = len(down), _found(config, "alpha_pattern", "lora_alpha", name)
        scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        module = model.get_submodule(name)
        change = scaling * (up.double() @ down.double())
        turned = isinstance(module, (Conv1D, nn.Embedding))
        module.weight += (change.mT if turned else change).to(module.weight)
        bias = tensors.get(f"{PREFIX}{name}.lora_B.bias")
        if bias is not None:
            assert config["lora_bias"] and (module.bias is not None or not bias.any())
            if module.bias is not None:
                module.bias += (scaling * bias.double()).to(module.bias)
    return model
