"""Elements of the symmetry group of a whole model: {space: element}. What they do to weights is read off axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import PARENT, STREAM, axes_of, size_of, unfolded
from ..checkpoints.lazy import Slots
from ..checkpoints.weights import Weights
from .elements import Element, Elements, compose, inverse_of, moved


@dataclass
class Transform:
    """A group element for a whole model; spaces that are missing stay as they are. The group acts on weights in
    canonical form.

    Attributes:
        model: {space: element}, of the spaces that a model has once: "stream", "head_units".
        blocks: the same for each block's own: "heads", "queries", "vo", "qk", "units", "experts", "expert_units".

    >>> g = lmc.Alignment.load("DIR/alignment.safetensors").a
    >>> sorted(g.compose(g.inverse()).model)
    ['stream']
    """

    model: dict[str, Element]
    blocks: list[dict[str, Element]]

    @staticmethod
    def identity(spec: Spec) -> Transform:
        """The element that changes nothing.

        Args:
            spec: of the model.

        Returns:
            An element without spaces.
        """
        return Transform({}, [{} for _ in range(spec.layers)])

    @property
    def stream(self) -> Element | None:
        """What acts on the residual stream; None where nothing does."""
        return self.model.get(STREAM)

    def map(self, function: Callable[[Tensor], Tensor]) -> Transform:
        """Applies a function to every floating-point tensor, e.g. a change of dtype.

        Args:
            function: what to do to a tensor; its shape must stay.

        Returns:
            The element with the results.
        """

        def change(t: Tensor) -> Tensor:
            return function(t) if t.is_floating_point() else t

        return self._each(lambda g: g.map(change))

    def _each(self, function: Callable[[Element], Element]) -> Transform:
        model, *blocks = ({s: function(g) for s, g in elements.items()} for elements in (self.model, *self.blocks))
        return Transform(model, blocks)

    def to(self, device: torch.device | str) -> Transform:
        """The same on another device, permutations included.

        Args:
            device: where to.

        Returns:
            The element there.
        """
        return self._each(lambda g: g.map(lambda t: t.to(device)))

    def apply(self, weights: Weights) -> Weights:
        """g · weights, block by block in the wider dtype of both; differentiable.

        Args:
            weights: in canonical form, loaded or lazy.

        Returns:
            The moved weights, in the dtype and on the device of `weights`, and lazy where they are.
        """
        spec = weights.spec
        dtype = max((t.dtype for t in self._floats()), key=lambda d: d.itemsize, default=torch.float32)
        device = next((t.device for t in weights.ends.values()), torch.device("cpu"))
        g = self.to(device)
        return weights.in_dtype(
            dtype,
            lambda ends: apply(spec, g.model, ends),
            lambda i, block: apply(spec, g.model | g.blocks[i], block),
        )

    def _floats(self) -> list[Tensor]:
        found: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            found.append(t)
            return t

        self.map(note)
        return found

    def inverse(self) -> Transform:
        """g⁻¹.

        Returns:
            The element that undoes this one.
        """
        return Transform(inverse_of(self.model), [inverse_of(block) for block in self.blocks])

    def compose(self, first: Transform) -> Transform:
        """self · first.

        Args:
            first: an element of the same model.

        Returns:
            What applying `first` and then this one does.
        """
        blocks = [compose(a, b) for a, b in zip(self.blocks, first.blocks, strict=True)]
        return Transform(compose(self.model, first.model), blocks)

    def __repr__(self) -> str:
        spaces = sorted({space for block in self.blocks for space in block})
        return f"Transform({', '.join(self.model) or 'no stream'}; {len(self.blocks)} blocks: {', '.join(spaces)})"


def apply(spec: Spec, elements: Elements, slots: Slots) -> Slots:
    """The action on slots of one block, or on those outside the blocks; differentiable."""
    return {name: apply_to_slot(spec, elements, name, w) for name, w in slots.items()}


def apply_to_slot(spec: Spec, elements: Elements, name: str, w: Tensor) -> Tensor:
    """What the elements of all its spaces make of one slot; itself where none of them acts on it."""
    if not any(index.space in elements for axis in axes_of(spec, name) for index in axis):
        return w
    indices, shape = unfolded(spec, name)
    spaces = [index.space for index in indices]
    x = w.reshape(shape)
    for dim, index in enumerate(indices):
        space = index.space or ""
        if space in elements:
            batch = spaces.index(PARENT[space]) if space in PARENT else None
            x = moved(elements[space], index.move).act(x, dim, batch)
    return x.reshape(w.shape)


def apply_to_axis(spec: Spec, elements: Elements, name: str, axis: int, x: Tensor) -> Tensor:
    """What the elements make of x (n, ...), whose first dimension lies as an axis of a slot does."""
    indices = axes_of(spec, name)[axis] if axes_of(spec, name) else ()
    if not any(index.space in elements for index in indices):
        return x
    known = [size_of(spec, index.space) if index.space else -1 for index in indices]
    y = x.reshape(*known, -1) if -1 not in known else x.reshape(-1, *known[1:], x[0].numel())
    spaces = [index.space for index in indices]
    for dim, index in enumerate(indices):
        space = index.space or ""
        if space in elements:
            batch = spaces.index(PARENT[space]) if PARENT.get(space, "") in spaces else None
            y = moved(elements[space], index.move).act(y, dim, batch)
    return y.reshape(x.shape)


def factor(spec: Spec, elements: Elements, slot: str, axis: int) -> Tensor | None:
    """What multiplies an axis of a matrix, W -> L W Rᵀ: L for axis 0, R for axis 1, as interp_linear takes them."""
    index = axes_of(spec, slot)[axis][-1]
    g = elements.get(index.space or "")
    return None if g is None else moved(g, index.move).factor


def rotary_map(a: Tensor, b: Tensor, rest: Tensor) -> Tensor:
    """Head maps that commute with RoPE: [[a, -b], [b, a]] on pair i = (i, i + p), `rest` on the passing dimensions.

    a, b (..., p), rest (..., e - 2p, e - 2p) -> (..., e, e).
    """
    diag_a, diag_b = torch.diag_embed(a), torch.diag_embed(b)
    turned = torch.cat([torch.cat([diag_a, -diag_b], -1), torch.cat([diag_b, diag_a], -1)], -2)
    n = rest.shape[-1]
    if n == 0:
        return turned
    p = turned.shape[-1]
    upper = torch.cat([turned, turned.new_zeros(*turned.shape[:-1], n)], -1)
    lower = torch.cat([rest.new_zeros(*rest.shape[:-1], p), rest], -1)
    return torch.cat([upper, lower], -2)
