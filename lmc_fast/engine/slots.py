"""The slots that the forward pass reads: one model's tensors, or two models' interpolated on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import BLOCK_READERS, STREAM
from ..kernels.interp_linear import interp_linear
from ..kernels.routes import Rope, apply_right, interpolated, mapped_heads
from ..symmetry.elements import Dense, Elements
from ..symmetry.transform import apply_to_slot, factor

Slots = Mapping[str, Tensor]


def linear(w: Slots, slot: str, x: Tensor) -> Tensor:
    """The linear layer `slot` of x (..., in)."""
    if isinstance(w, LineSlots):
        return w.linear(slot, x)
    return F.linear(x, w[slot], w.get(f"{slot}_bias"))


def linear_with_rope(w: Slots, slot: str, x: Tensor, rope: Rope | None, heads: int) -> Tensor | None:
    """`linear` of x (batch, T, in) with RoPE on each head, in one pass over both products; None where there is none."""
    return w.linear_with_rope(slot, x, rope, heads) if isinstance(w, LineSlots) and rope is not None else None


class LineSlots(Mapping[str, Tensor]):
    """(1 - λ) a + λ g b, one slot at a time, made when it is read.

    a, b: slots of one block, or (maps None) of what lies outside the blocks; frozen. rotation, maps: g's residual
    rotation and its part in this block, without permutations, of leaves that gradients are wanted for. Slots that are
    not large linear layers are made whole. For large ones `route` (kernels.routes.ROUTES) decides.

    once: this object serves one forward pass, whose graph leads back to rotation and maps. Otherwise it serves any
    number: slots that were made are leaves, `collect` adds up their gradients, and `contract` sends them on to
    rotation and maps. So W(λ) is made, and dW contracted, once for all micro-batches of a visit.
    """

    def __init__(
        self,
        spec: Spec,
        a: Slots,
        b: Slots,
        lam: float,
        rotation: Tensor | None,
        maps: Elements | None,
        route: str,
        once: bool,
    ):
        self.spec, self.a, self.b, self.lam = spec, a, b, lam
        self.rotation, self.route, self.once = rotation, route, once
        self.outside = maps is None
        self.elements = dict(maps or {})
        if rotation is not None:
            with torch.enable_grad():  # its transpose belongs to the graph of whatever is made of it later
                self.elements[STREAM] = Dense.orthogonal(rotation)
        self._made: dict[str, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        self._turned: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.a)

    def __len__(self) -> int:
        return len(self.a)

    def __contains__(self, name: object) -> bool:
        return name in self.a

    def __getitem__(self, name: str) -> Tensor:
        a = self.a[name]
        if self.lam == 0:
            return a
        if name not in self._made:
            with torch.set_grad_enabled(torch.is_grad_enabled() or not self.once):
                made = self._make(name, a, self.b[name])
            self._made[name] = made
            if not self.once and made.requires_grad:
                self._leaves[name] = made.detach().requires_grad_()
        return self._leaves.get(name, self._made[name])

    def _make(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        if a.dim() == 2 and not self.outside:
            return interpolated(a, b, self.lam, *self._factors(name))
        return torch.lerp(a, apply_to_slot(self.spec, self.elements, name, b), self.lam)

    def _factors(self, slot: str) -> tuple[Tensor | None, Tensor | None]:
        """L and R of a linear slot, as in interp_linear."""
        return factor(self.spec, self.elements, slot, 0), factor(self.spec, self.elements, slot, 1)

    @property
    def _whole(self) -> bool:
        """Whether layers multiply with W(λ) as made by `__getitem__`."""
        return self.outside or self.lam == 0 or (self.route == "weight" and not self.once)

    def linear(self, slot: str, x: Tensor) -> Tensor:
        """The interpolated linear layer of x (..., in)."""
        bias = self.get(f"{slot}_bias")
        if self._whole:
            return F.linear(x, self[slot], bias)
        left, right = self._factors(slot)
        route = "fused" if self.route == "concat" and left is not None else self.route
        turned = self._turn(x) if route != "weight" and slot in BLOCK_READERS else None
        return interp_linear(
            x, self.a[slot], self.b[slot], self.lam, left=left, right=right, bias=bias, turned=turned, route=route
        )

    def linear_with_rope(self, slot: str, x: Tensor, rope: Rope, heads: int) -> Tensor | None:
        """As the function of this name."""
        if self._whole or self.route == "weight":
            return None
        left, _ = self._factors(slot)
        if self.route == "concat" and left is None:
            return None
        flat, turned = x.flatten(0, -2), self._turn(x).flatten(0, -2)
        bias = self.get(f"{slot}_bias")
        y = mapped_heads(flat, turned, self.a[slot], self.b[slot], self.lam, left, bias, heads, rope)
        return None if y is None else y.view(*x.shape[:-1], -1)

    def _turn(self, x: Tensor) -> Tensor:
        """x R, computed once for all readers of x."""
        if self._turned is None or self._turned[0] is not x:
            self._turned = x, apply_right(x, self.rotation)
        return self._turned[1]

    @property
    def leaves(self) -> list[Tensor]:
        return list(self._leaves.values())

    def collect(self, gradients: list[Tensor | None]) -> None:
        """Adds gradients of `leaves`, in their order."""
        for leaf, gradient in zip(self._leaves.values(), gradients, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)

    def contract(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """What the collected gradients mean for `parameters`; ends this object's life."""
        live = [(self._made[name], leaf.grad) for name, leaf in self._leaves.items() if leaf.grad is not None]
        if not live or not parameters:
            return [None] * len(parameters)
        made, slopes = zip(*live, strict=True)
        return list(torch.autograd.grad(made, parameters, slopes, allow_unused=True))
