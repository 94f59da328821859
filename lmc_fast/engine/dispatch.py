"""Which way to interpolate linear layers."""

import torch


def choose(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    return "fused" if tokens < width else "weight"
