"""What each Triton operation competes with: the same result in torch operations, whose products cuBLAS computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lmc_fast.engine.attention import rotate
from lmc_fast.kernels import dual_gemm, head_maps, interpolate_weight, runtime, softmax_loss
from lmc_fast.kernels.activations import ACTIVATIONS
from lmc_fast.kernels.interp_linear import interp_linear
from lmc_fast.kernels.routes import apply_left

LAMBDA = 0.45
MIX = (1 - LAMBDA, LAMBDA)
EPS = 1e-5
CHECKED = 64  # rows of tokens that are compared with float64

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Model:
    """Shapes of a model's layers. rotary: channels of each head that RoPE turns."""

    name: str
    width: int
    ffn: int
    heads: int
    rotary: int
    vocab: int
    activation: str = "gelu"
    rms: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


MODELS = {
    m.name: m
    for m in (
        Model("7B", 4096, 11008, 32, 128, 32000, "silu", True),
        Model("1B", 2048, 8192, 8, 64, 50304),
        Model("13B", 5120, 13824, 40, 128, 32000, "silu", True),
        Model("tiny", 64, 96, 4, 8, 101),
    )
}


@dataclass(frozen=True)
class Contest:
    """One operation at one shape. ours and rivals take inputs of one dtype, truth takes the first rows in float64.

    wanted: inputs that get a gradient; none where a function leaves the gradient in `shown`, as the losses do.
    """

    inputs: Inputs
    ours: Function
    rivals: Mapping[str, Function]
    truth: Function
    wanted: tuple[str, ...]
    rows: tuple[str, ...] = ()  # inputs with a row for each token, cut to CHECKED for `truth`
    forward_only: Mapping[str, Function] = field(default_factory=dict)  # rivals without a backward pass
    kernel: bool = True  # whether ours is a kernel here, not its reference


class Draw:
    """Normal numbers on a device, the same in every dtype but for rounding."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).mul_(scale).to(self.dtype)

    def beside(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """A and B (rows, width), side by side as in a store."""
        both = self(rows, 2, width, scale=width**-0.5)
        return both[:, 0], both[:, 1]

    def labels(self, rows: int, classes: int) -> Tensor:
        return torch.randint(classes, (rows,), generator=self.generator, device=self.device)


def dual_linear(m: Model, tokens: int, draw: Draw, up: bool = False) -> Contest:
    """Two products into one accumulator; up: as many rows as the FFN has units, and its activation in the epilogue."""
    a, b = draw.beside(m.ffn if up else m.width, m.width)
    name = m.activation if up else "none"
    act = ACTIVATIONS[name]
    inputs = {"x": draw(tokens, m.width), "z": draw(tokens, m.width), "a": a, "b": b, "bias": draw(len(a))}

    def by_route(route: str) -> Function:
        return lambda i: act(interp_linear(i["x"], a, b, LAMBDA, bias=i["bias"], turned=i["z"], route=route))

    def reference(i: Inputs) -> Tensor:
        return dual_gemm.reference(i["x"], i["a"], i["z"], i["b"], MIX, i["bias"], activation=name)

    return Contest(
        inputs,
        lambda i: dual_gemm.dual_linear(i["x"], i["a"], i["z"], i["b"], MIX, i["bias"], activation=name),
        {"two products": by_route("fused"), "one product": by_route("concat"), "reference": reference},
        reference,
        ("x", "z"),
        ("x", "z"),
        kernel=runtime.usable(a),
    )


def map_heads(m: Model, tokens: int, draw: Draw) -> Contest:
    positions, e, half = min(tokens, 2048), m.head_dim, m.rotary // 2
    angles = draw(positions, half, scale=3.0).float()
    inputs = {
        "ya": draw(tokens, m.width),
        "yb": draw(tokens, m.width),
        "maps": draw(m.heads, e, e, scale=e**-0.5),
        "bias": draw(m.width),
        "cos": angles.cos().to(draw.dtype),
        "sin": angles.sin().to(draw.dtype),
    }

    def call(function: Callable[..., Tensor]) -> Function:
        return lambda i: function(
            i["ya"], i["yb"], MIX, maps=i["maps"], bias=i["bias"], rope=(i["cos"], i["sin"]), heads=m.heads
        )

    def by_layers(i: Inputs) -> Tensor:
        """As the engine does it today."""
        y = torch.lerp(i["ya"], apply_left(i["yb"], i["maps"]), LAMBDA) + i["bias"]
        y = y.unflatten(0, (-1, len(i["cos"]))).unflatten(-1, (m.heads, e)).transpose(1, 2)
        return rotate(y, (i["cos"], i["sin"])).transpose(1, 2).flatten(2).flatten(0, 1)

    return Contest(
        inputs,
        call(head_maps.head_maps),
        {"layers": by_layers, "reference": call(head_maps.reference)},
        call(head_maps.reference),
        ("ya", "yb", "maps", "bias"),
        ("ya", "yb", "cos", "sin"),
        kernel=runtime.usable(inputs["ya"]) and head_maps.fits(e, inputs["ya"]),
    )


def transient_matrix(m: Model, tokens: int, draw: Draw) -> Contest:
    """Rows of the FFN's up matrix with scales; without them `interpolate` is cuBLAS itself."""
    a, b = draw.beside(m.ffn, m.width)
    inputs = {
        "a": a,
        "b": b,
        "rotation": draw(m.width, m.width, scale=m.width**-0.5),
        "scale": 1 + draw(m.ffn, scale=0.1),
    }

    def reference(i: Inputs) -> Tensor:
        return interpolate_weight.reference(i["a"], i["b"], i["rotation"], MIX, scale=i["scale"])

    def scaled_copy(i: Inputs) -> Tensor:
        return torch.addmm(i["a"], i["b"] * i["scale"][:, None], i["rotation"].mT, beta=MIX[0], alpha=MIX[1])

    return Contest(
        inputs,
        lambda i: interpolate_weight.interpolate(i["a"], i["b"], i["rotation"], MIX, scale=i["scale"]),
        {"scaled copy": scaled_copy, "reference": reference},
        reference,
        ("rotation", "scale"),
        kernel=runtime.usable(a),
    )


def cross_entropy(m: Model, tokens: int, draw: Draw) -> Contest:
    inputs = {"logits": draw(tokens, m.vocab, scale=2.0), "target": draw.labels(tokens, m.vocab)}

    def ours(i: Inputs) -> Tensor:
        softmax_loss.cross_entropy_(i["logits"], i["target"])
        return i["logits"]

    def log_softmax(i: Inputs) -> Tensor:
        log_p = i["logits"].float().log_softmax(1)
        label = i["target"][:, None]
        -log_p.gather(1, label)
        return log_p.exp_().scatter_add_(1, label, log_p.new_full(label.shape, -1.0)).to(i["logits"].dtype)

    def autograd(i: Inputs) -> Tensor:
        with torch.enable_grad():
            leaf = i["logits"].detach().requires_grad_()
            loss = F.cross_entropy(leaf, i["target"], reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]

    def reference(i: Inputs) -> Tensor:
        return softmax_loss.reference(i["logits"], i["target"])[1]

    rivals = {"log_softmax": log_softmax, "autograd": autograd, "reference": reference}
    rows = ("logits", "target")
    return Contest(inputs, ours, rivals, reference, (), rows, kernel=runtime.usable(inputs["logits"]))


def divergence(m: Model, tokens: int, draw: Draw) -> Contest:
    inputs = {name: draw(tokens, m.vocab, scale=2.0) for name in ("logits", "one", "two")}

    def teachers(i: Inputs) -> list[tuple[Tensor, float]]:
        return [(i["one"], MIX[0]), (i["two"], MIX[1])]

    def ours(i: Inputs) -> Tensor:
        softmax_loss.divergence_(i["logits"], teachers(i))
        return i["logits"]

    def log_softmax(i: Inputs) -> Tensor:
        """Through the log-probabilities, in float32."""
        log_p = i["logits"].float().log_softmax(1)
        aim = torch.zeros_like(log_p)
        for t, share in teachers(i):
            aim.add_(t.float().softmax(1), alpha=share)
        torch.xlogy(aim, aim).sub_(aim * log_p).sum(1)
        return log_p.exp_().sub_(aim).to(i["logits"].dtype)

    def reference(i: Inputs) -> Tensor:
        return softmax_loss.reference_divergence(i["logits"], teachers(i))[1]

    rivals = {"log_softmax": log_softmax, "reference": reference}
    return Contest(inputs, ours, rivals, reference, (), tuple(inputs), kernel=runtime.usable(inputs["logits"]))


OPERATIONS: dict[str, Callable[[Model, int, Draw], Contest]] = {
    "dual_linear": dual_linear,
    "dual_linear up": lambda m, tokens, draw: dual_linear(m, tokens, draw, up=True),
    "head_maps": map_heads,
    "cross_entropy_": cross_entropy,
    "divergence_": divergence,
}
ONCE = {"interpolate": transient_matrix}  # whose work does not depend on the tokens
