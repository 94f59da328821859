"""The legal group of each family as it was found by experiment, and random elements of it.

Written down by hand, so that what the library derives from a spec's features is checked against something else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from random_elements import rotation_fixing_ones
from scipy.stats import ortho_group
from torch import Tensor

from lmc_fast.architectures import Spec
from lmc_fast.symmetry import Transform
from lmc_fast.symmetry.elements import Dense, Element, Wreath, orthogonal, units


@dataclass(frozen=True)
class Known:
    residual: str  # "any", "ones", "signed", "plain", "fixed"
    qk: str = "rope"  # "rope" scaled rotations and GL on the rest, "turns", "signs"
    vo: str = "gl"  # or "signed"
    heads: bool = True
    scale: str = "none"  # "any", "positive"


_LLAMA = Known("any", scale="any")
_VIT = Known("ones")

KNOWN = {
    "llama": _LLAMA,
    "llama-tied-biased": _LLAMA,
    "neox": Known("ones"),
    "neox-sequential": Known("ones", scale="positive"),
    "gpt2": Known("ones"),
    "gpt2-tied": Known("ones"),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2-tied-window": _LLAMA,
    "phi3": _LLAMA,
    "phi3-partial": _LLAMA,
    "stablelm": Known("ones", scale="any"),
    "stablelm-parallel-biased": Known("ones", scale="any"),
    "olmo": Known("ones", scale="any"),
    "olmo-clipped": Known("ones", qk="turns", vo="signed", scale="any"),
    "phi": Known("ones"),
    "gptj": Known("ones"),
    "falcon-7b": Known("ones"),
    "falcon-40b": Known("ones"),
    "falcon-rw": Known("ones", heads=False),
    "opt": Known("ones", scale="positive"),
    "opt-tied": Known("ones", scale="positive"),
    "gemma": _LLAMA,
    "qwen3": Known("any", qk="signs", scale="any"),
    "qwen3-tied-biased": Known("any", qk="signs", scale="any"),
    "olmo2": Known("signed", qk="signs", scale="any"),
    "gemma2": Known("signed", scale="any"),
    "gemma3": Known("signed", qk="signs", scale="any"),
    "mixtral": _LLAMA,
    "olmoe": Known("any", qk="signs", scale="any"),
    "qwen2-moe": _LLAMA,
    "qwen3-moe": Known("any", qk="signs", scale="any"),
    "ministral": _LLAMA,
    "cwm": _LLAMA,
    "seed-oss": _LLAMA,
    "smollm3": _LLAMA,
    "helium": _LLAMA,
    "ernie": _LLAMA,
    "arcee": Known("any"),
    "granite": _LLAMA,
    "hyperclovax": Known("signed", scale="any"),
    "hunyuan": Known("any", qk="signs", scale="any"),
    "jais2": Known("ones"),
    "starcoder2": Known("ones"),
    "nemotron": Known("ones"),
    "cohere": Known("ones", scale="any"),
    "cohere2": Known("ones", scale="any"),
    "glm": _LLAMA,
    "glm4": Known("signed", scale="any"),
    "olmo3": Known("signed", qk="signs", scale="any"),
    "exaone4": Known("signed", qk="signs", scale="any"),
    "vaultgemma": _LLAMA,
    "granitemoe": _LLAMA,
    "flex-olmo": Known("signed", qk="signs", scale="any"),
    "gpt-oss": Known("any"),
    "gpt-bigcode": Known("ones"),
    "gpt-bigcode-heads": Known("ones"),
    "codegen": Known("ones"),
    "gpt-neo": Known("ones"),
    "mpt": Known("ones", heads=False),
    "mpt-clipped": Known("ones", qk="turns", vo="signed", heads=False),
    "bloom": Known("ones", heads=False),
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _VIT,
    "dinov2-swiglu": Known("ones", scale="any"),
    "clip-vision": Known("plain"),
    "clip-text": _VIT,
    "clip-text-argmax": _VIT,
    "bert": Known("plain"),
    "bert-pretraining": Known("plain"),
    "roberta": Known("plain"),
    **dict.fromkeys(("ernie-bert", "camembert", "data2vec-text", "electra", "distilbert"), Known("plain")),
    "xlm-roberta": Known("plain", scale="positive"),
    "megatron-bert": Known("ones"),
    "vit-msn": _VIT,
    **dict.fromkeys(("bert-label", "bert-tags", "bert-answers", "bert-score", "xlmr-label"), Known("plain")),
    **dict.fromkeys(("electra-label", "distilbert-label"), Known("plain")),
    "megatron-label": Known("ones"),
    "gpt2-label": Known("ones"),
    **dict.fromkeys(
        ("modernbert", "modernbert-biased", "modernbert-label", "modernbert-tags"), Known("plain", scale="any")
    ),
    **dict.fromkeys(("deberta", "deberta-unbucketed", "deberta-label", "deberta-tags"), Known("plain")),
    "deberta-headless": Known("fixed"),
    "modernbert-headless": Known("fixed", scale="any"),
    "llama-label": _LLAMA,
    "llama-headless": Known("fixed", scale="any"),
    **dict.fromkeys(
        (
            *("bert-headless", "megatron-headless", "xlmr-headless", "electra-headless", "distilbert-headless"),
            *("vit-headless", "deit-headless", "dinov2-headless", "clip-vision-headless", "clip-text-headless"),
        ),
        Known("fixed"),
    ),
}


class Random:
    """Draws float64 matrices of many kinds."""

    def __init__(self, seed: int):
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def signs(self, *shape: int) -> Tensor:
        return torch.randint(2, shape, generator=self.generator).double() * 2 - 1

    def places(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)

    def scales(self, *shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def general(self, n: int) -> Tensor:
        left, right = (torch.linalg.qr(self.normal(n, n))[0] if n else self.normal(0, 0) for _ in range(2))
        return left @ torch.diag(self.scales(n)) @ right

    def signed(self, n: int) -> Tensor:
        return torch.diag(self.signs(n)) @ torch.eye(n, dtype=torch.float64)[self.places(n)]

    def residual(self, kind: str, n: int) -> Tensor:
        if kind == "any":
            return torch.from_numpy(ortho_group.rvs(n, random_state=self.seed))
        if kind == "ones":
            return rotation_fixing_ones(n, self.seed)
        if kind == "signed":
            return self.signed(n)
        if kind == "fixed":
            return torch.eye(n, dtype=torch.float64)
        return self.signs(1) * torch.eye(n, dtype=torch.float64)[self.places(n)]

    def query_key(self, kind: str, e: int, rotary: int) -> Tensor:
        out, half = torch.zeros(e, e, dtype=torch.float64), rotary // 2
        for i in range(half):
            j = i + half
            if kind == "rope":
                c, s = self.normal(2)
            elif kind == "signs":
                c, s = self.signs(1)[0], 0.0
            else:
                c, s = [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)][int(self.places(4)[0])]
            out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
        rest = e - rotary
        if rest:
            make = {"rope": self.general, "turns": self.signed, "signs": lambda n: torch.diag(self.signs(n))}
            out[rotary:, rotary:] = make[kind](rest)
        return out


def random_element(known: Known, spec: Spec, seed: int) -> Transform:
    """An element of the group with nothing left at the identity."""
    draw = Random(seed)
    groups, r, e = spec.attention.kv_heads, spec.attention.queries_per_group, spec.attention.head_dim

    def unit_scale(*shape: int) -> Tensor | None:
        if known.scale == "none" or not all(shape):
            return None
        return draw.scales(*shape) * (draw.signs(*shape) if known.scale == "any" else 1)

    def block() -> dict[str, Element]:
        value = draw.general if known.vo == "gl" else draw.signed
        experts, width = spec.ffn.experts.count, spec.ffn.experts.width
        out: dict[str, Element] = {}
        if known.heads:
            out["heads"] = Wreath(draw.places(groups))
            if r > 1:
                out["queries"] = Wreath(torch.stack([draw.places(r) for _ in range(groups)]))
        out["vo"] = Dense.of(torch.stack([value(e) for _ in range(groups)]))
        out["qk"] = Dense.of(torch.stack([draw.query_key(known.qk, e, spec.rope.rotary_dim) for _ in range(groups)]))
        if spec.ffn.width:
            out["units"] = units(draw.places(spec.ffn.width), unit_scale(spec.ffn.width))
        if experts:
            out["experts"] = Wreath(draw.places(experts))
            places = torch.stack([draw.places(width) for _ in range(experts)])
            out["expert_units"] = units(places, unit_scale(experts, width))
        return out

    model = {"stream": orthogonal(draw.residual(known.residual, spec.width))}
    if spec.head_transform:
        model["head_units"] = Wreath(draw.places(spec.width))
    return Transform(model, [block() for _ in range(spec.layers)])
