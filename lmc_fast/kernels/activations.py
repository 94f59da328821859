"""Activations inside a product's epilogue, and their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import jit, tl

ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


@jit
def activate(y, NAME: tl.constexpr):
    if NAME == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif NAME == "silu":
        y = y * tl.sigmoid(y)
    elif NAME == "relu":
        y = tl.maximum(y, 0.0)
    return y


def activation_gradient(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, pre)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, pre, 0)
    return torch.ops.aten.gelu_backward(grad, pre, approximate="tanh" if activation == "gelu_tanh" else "none")
