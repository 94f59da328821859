"""Random pairs of real shapes, made on the device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.synthetic import SHAPES, config_of
from lmc_fast.architectures import FAMILIES, Spec
from lmc_fast.checkpoints import Weights
from lmc_fast.streaming.layout import slot_shapes
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.charts import Chart

LLAMA = "llama-7b"
SIZE = 0.02  # of a chart's random coordinates


def spec_of(shape: str, layers: int, length: int) -> Spec:
    """A shape of benchmarks.synthetic, or LLAMA, with as many layers as wanted and the real vocabulary."""
    if shape != LLAMA:
        assert shape in SHAPES
        spec = FAMILIES["gpt_neox"].spec(config_of(shape))
    else:
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
        )
        spec = FAMILIES["llama"].spec(config)
    return replace(spec, layers=layers, max_positions=max(length, spec.max_positions))


class Maker:
    """Random slots at a trained model's scale, from a seed."""

    def __init__(self, spec: Spec, seed: int, device: torch.device):
        self.spec, self.device = spec, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def slots(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: self._slot(name, shape) for name, shape in shapes.items()}

    def _slot(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 1.0 if name.endswith("norm") else 0.0, device=self.device)
        return torch.randn(shape, generator=self.generator, device=self.device).mul_(shape[-1] ** -0.5)

    def weights(self, dtype: torch.dtype) -> Weights:
        """In canonical form, then rounded."""
        ends, block = slot_shapes(self.spec)
        blocks = [self.slots(block) for _ in range(self.spec.layers)]
        return canonicalize(Weights(self.spec, self.slots(ends), blocks)).to(dtype)


def random_pair(spec: Spec, dtype: torch.dtype, device: torch.device) -> tuple[Weights, Weights]:
    a, b = (Maker(spec, seed, device).weights(dtype) for seed in (1, 2))
    return a, b


def random_chart(spec: Spec, device: torch.device, sides: int = 2) -> Chart:
    chart = Chart(spec, sides, torch.float32, device)
    generator = torch.Generator(device).manual_seed(3)
    for t in chart.tensors.values():
        t.data.copy_(SIZE * torch.randn(t.shape, generator=generator, device=device))
    return chart


def random_tokens(spec: Spec, count: int, length: int, device: torch.device) -> Tensor:
    """(count / length, length + 1): as many predictions as `count`."""
    generator = torch.Generator(device).manual_seed(4)
    return torch.randint(spec.vocab, (count // length, length + 1), generator=generator, device=device)
