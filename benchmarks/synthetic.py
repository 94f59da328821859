"""A pair of checkpoints of a real model's shape without its training: random weights, and the same weights moved.

B's weights are A's under a planted element of the symmetry group (rotation, head and unit permutations, maps inside
heads), times (1 + noise). Written block by block; never more than one in memory.

    python -m benchmarks.synthetic OUT --shape pythia-1.4b
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GPTNeoXConfig

from lmc_fast.architectures import FAMILIES, Spec
from lmc_fast.architectures.family import Entry
from lmc_fast.checkpoints.writer import Stored, write_checkpoint
from lmc_fast.symmetry.canonical import Survey, canonical_block, canonical_ends
from lmc_fast.symmetry.charts import Chart
from lmc_fast.symmetry.elements import Dense, Wreath
from lmc_fast.symmetry.transform import apply


class Shape(NamedTuple):
    width: int
    layers: int
    heads: int
    vocab: int = 50304


SHAPES = {
    "tiny": Shape(64, 3, 4, 512),
    "pythia-410m": Shape(1024, 24, 16),
    "pythia-1.4b": Shape(2048, 24, 16),
    "pythia-6.9b": Shape(4096, 32, 32),
    "slice-256": Shape(256, 2, 4),
    "slice-4096": Shape(4096, 2, 32),
}
SHARD_BYTES = 500_000_000


def config_of(shape: str | Shape) -> GPTNeoXConfig:
    """shape: one of SHAPES by name, or any other."""
    width, layers, heads, vocab = SHAPES[shape] if isinstance(shape, str) else shape
    return GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        bos_token_id=0,
        eos_token_id=0,
    )


class Planted:
    """The slots of either endpoint, float32, made again from the seed whenever they are asked for."""

    def __init__(self, spec: Spec, seed: int = 0, size: float = 0.3, noise: float = 0.5):
        self.spec, self.seed, self.noise = spec, seed, noise
        self.chart = Chart(spec, 1)
        generator = torch.Generator().manual_seed(seed)
        for name, t in self.chart.tensors.items():
            scale = 3 * spec.width**-0.5 if name == "rotation" else size * t.shape[-1] ** -0.5
            t.data.copy_(scale * torch.randn(t.shape, generator=generator))
        with torch.no_grad():
            rotations = self.chart.rotations()
        self.model = {"stream": Dense.orthogonal(rotations[0])} if rotations else {}

    def _random(self, unit: int, names: list[str], noisy: bool) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1000 * (unit + 2) + noisy)
        out = {}
        for name in names:
            shape = self.spec.shape(name)
            assert shape is not None
            if noisy:
                out[name] = torch.randn(shape, generator=generator).mul_(self.noise).add_(1)
            elif len(shape) == 1:
                out[name] = torch.full(shape, 1.0 if name.endswith("norm") else 0.0)
            else:
                gain = {"embed": 1.0, "head": 2.0}.get(name, 0.5) * (1.0 if name == "embed" else shape[1] ** -0.5)
                out[name] = torch.randn(shape, generator=generator).mul_(gain)
        return out

    @torch.no_grad()
    def block(self, i: int, moved: bool) -> dict[str, Tensor]:
        names = [n for n in self.spec.shapes if not n.startswith(("embed", "head", "final"))]
        slots = canonical_block(self.spec, self._random(i, names, False))
        if not moved:
            return slots
        generator = torch.Generator().manual_seed(self.seed + i)
        planted = {space: g for space, g in self.chart.blocks(i)[0].items() if space in ("vo", "qk")}
        planted["heads"] = Wreath(torch.randperm(self.spec.attention.kv_heads, generator=generator))
        planted["units"] = Wreath(torch.randperm(self.spec.ffn.width, generator=generator))
        return self._noisy(i, apply(self.spec, self.model | planted, slots))

    @torch.no_grad()
    def ends(self, moved: bool) -> dict[str, Tensor]:
        names = [n for n in self.spec.shapes if n.startswith(("embed", "head", "final"))]
        slots = canonical_ends(self.spec, self._random(-1, names, False), Survey())
        return self._noisy(-1, apply(self.spec, self.model, slots)) if moved else slots

    def _noisy(self, unit: int, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        matrices = [name for name, t in slots.items() if t.dim() == 2]
        for name, factor in self._random(unit, matrices, True).items():
            slots[name] *= factor
        return slots


def write_pair(
    out: Path, shape: str | Shape, dtype: torch.dtype = torch.bfloat16, tokens: int = 2**16
) -> tuple[Path, Path]:
    """out/a, out/b and out/tokens.npy (random ids)."""
    import numpy as np

    config = config_of(shape)
    family = FAMILIES["gpt_neox"]
    spec = family.spec(config)
    planted = Planted(spec)

    def tensors(moved: bool) -> Iterator[Stored]:
        made = lru_cache(1)(lambda index: planted.ends(moved) if index is None else planted.block(index, moved))

        def parts(entry: Entry, index: int | None) -> Iterator[Tensor]:
            slots = made(index)
            yield entry.layout.join([slots[slot] for slot in entry.slots], spec).to(dtype)

        for name, entry, index in family.entries(spec):
            yield Stored(name, dtype, entry.shape(spec), partial(parts, entry, index))

    about = config.to_dict() | {"architectures": ["GPTNeoXForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    for name, moved in (("a", False), ("b", True)):
        write_checkpoint(out / name, tensors(moved), about, out, SHARD_BYTES)
    ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    np.save(out / "tokens.npy", ids.numpy().astype(np.uint16))
    return out / "a", out / "b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to create")
    parser.add_argument("--shape", choices=SHAPES, default="pythia-1.4b")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    write_pair(args.out, args.shape)


if __name__ == "__main__":
    main()
