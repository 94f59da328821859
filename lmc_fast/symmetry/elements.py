"""Elements of the group of one space: three atoms, and permutations with something inside.

    Identity                                Dense (M, M⁻¹)
    Scale (s)                               Wreath (places, inner): permute the places, then act inside each of them

Each knows what it does to an index (`act`), its inverse transpose (`dual`), its permutation alone (`order`), its
inverse, and what follows it (`then`). An element may stand for several at once, one in each place of its parent space
(axes.PARENT): its tensors then have one dimension more in front, and `at` reorders them.

`inverse_of` and `compose` are the group laws for {space: element}; a space that is missing stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..architectures.axes import PARENT, Move


class Element(Protocol):
    """What every element knows. `inverse`, `dual` and `order` share tensors with it where they can."""

    @property
    def inverse(self) -> Element: ...

    @property
    def dual(self) -> Element:
        """g⁻ᵀ."""
        ...

    @property
    def order(self) -> Element:
        """The permutation in g."""
        ...

    @property
    def factor(self) -> Tensor | None:
        """What multiplies: (..., n, n), (..., n), or None for nothing. A permutation has none."""
        ...

    def act(self, x: Tensor, dim: int, batch: int | None) -> Tensor:
        """On index `dim` of x; batch: the dimension of the parent's places, for an element that stands for several."""
        ...

    def then(self, g: Element) -> Element:
        """g · self: first this, then g."""
        ...

    def at(self, places: Tensor) -> Element:
        """Of several: the one at places[i] comes to i."""
        ...

    def map(self, function: Callable[[Tensor], Tensor]) -> Element:
        """The same of other tensors."""
        ...


@dataclass(frozen=True)
class Identity:
    """Nothing moves."""

    factor = None

    @property
    def inverse(self) -> Identity:
        return self

    dual = order = inverse

    def act(self, x: Tensor, dim: int, batch: int | None) -> Tensor:
        return x

    def then(self, g: Element) -> Element:
        return g

    def at(self, places: Tensor) -> Identity:
        return self

    def take(self, places: Tensor) -> Identity:
        return self

    def scaled(self, g: Identity | Scale) -> Identity | Scale:
        return g

    def map(self, function: Callable[[Tensor], Tensor]) -> Identity:
        return self


IDENTITY = Identity()


@dataclass(frozen=True)
class Dense:
    """An invertible matrix (..., n, n), kept with its inverse so that nothing is inverted later."""

    matrix: Tensor
    back: Tensor

    @staticmethod
    def of(matrix: Tensor) -> Dense:
        """Inverts (n, n) or (batch, n, n) one by one: torch's batched CPU LU is wrong with several threads."""
        flat = matrix.reshape(-1, *matrix.shape[-2:])
        return Dense(matrix, torch.stack([torch.linalg.inv(m) for m in flat]).view(matrix.shape))

    @staticmethod
    def orthogonal(matrix: Tensor) -> Dense:
        return Dense(matrix, matrix.mT)

    @property
    def inverse(self) -> Dense:
        return Dense(self.back, self.matrix)

    @property
    def dual(self) -> Dense:
        return Dense(self.back.mT, self.matrix.mT)

    @property
    def order(self) -> Identity:
        return IDENTITY

    @property
    def factor(self) -> Tensor:
        return self.matrix

    def act(self, x: Tensor, dim: int, batch: int | None) -> Tensor:
        if batch is None and dim == x.dim() - 1:
            return (x.reshape(-1, x.shape[-1]) @ self.matrix.mT).view(x.shape)
        if batch is None and dim == 0:
            return (self.matrix @ x.flatten(1)).view(x.shape)
        lead = [] if batch is None else [batch]
        others = sorted((d for d in range(x.dim()) if d not in (*lead, dim)), key=lambda d: x.shape[d])
        if not others:
            return (self.matrix @ x[..., None])[..., 0]
        *small, large = others  # the matrix product runs along the longest other index
        first = dim < large  # as it lies in memory
        order = [*lead, *sorted(small), *((dim, large) if first else (large, dim))]
        matrix = self.matrix if batch is None else self.matrix.unflatten(0, (-1, *[1] * len(small)))
        rows = x.permute(order)
        y = matrix @ rows if first else rows @ matrix.mT
        return y.permute(sorted(range(x.dim()), key=order.__getitem__))

    def then(self, g: Element) -> Element:
        if isinstance(g, Identity):
            return self
        other = dense(g, self.matrix.dtype)
        return Dense(other.matrix @ self.matrix, self.back @ other.back)

    def at(self, places: Tensor) -> Dense:
        return Dense(self.matrix[places], self.back[places])

    def map(self, function: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(function(self.matrix), function(self.back))


@dataclass(frozen=True)
class Scale:
    """A factor for each channel, (..., n)."""

    scale: Tensor

    @property
    def inverse(self) -> Scale:
        return Scale(1 / self.scale)

    dual = inverse

    @property
    def order(self) -> Identity:
        return IDENTITY

    @property
    def factor(self) -> Tensor:
        return self.scale

    def act(self, x: Tensor, dim: int, batch: int | None) -> Tensor:
        shape = [n if d in (dim, batch) else 1 for d, n in enumerate(x.shape)]
        scale = self.scale if batch is None or batch < dim else self.scale.mT
        return x * scale.reshape(shape)

    def then(self, g: Element) -> Element:
        if isinstance(g, (Identity, Scale)):
            return self.scaled(g)
        return Wreath(g.places, self.take(g.places).scaled(g.inner)) if isinstance(g, Wreath) else dense(self).then(g)

    def scaled(self, g: Identity | Scale) -> Scale:
        return Scale(g.scale * self.scale) if isinstance(g, Scale) else self

    def at(self, places: Tensor) -> Scale:
        return Scale(self.scale[places])

    def take(self, places: Tensor) -> Scale:
        """The factor at places[i] comes to i."""
        return Scale(self.scale.gather(-1, places))

    def map(self, function: Callable[[Tensor], Tensor]) -> Scale:
        return Scale(function(self.scale))


@dataclass(frozen=True)
class Wreath:
    """What is at places[i] comes to i, for places (..., n) int64; then `inner` scales each. Signs make it signed."""

    places: Tensor
    inner: Identity | Scale = field(default=IDENTITY)

    @property
    def inverse(self) -> Wreath:
        back = torch.argsort(self.places, dim=-1)
        return Wreath(back, self.inner.inverse.take(back))

    @property
    def dual(self) -> Wreath:
        return Wreath(self.places, self.inner.dual)

    @property
    def order(self) -> Wreath:
        return Wreath(self.places)

    @property
    def factor(self) -> Tensor | None:
        raise TypeError("a permutation is no factor: it is applied when weights are loaded")

    def act(self, x: Tensor, dim: int, batch: int | None) -> Tensor:
        if batch is None:
            y = x.index_select(dim, self.places)
        else:
            rows = x.movedim((batch, dim), (0, 1))
            group = torch.arange(len(self.places), device=x.device)[:, None]
            y = rows[group, self.places].movedim((0, 1), (batch, dim))
        return self.inner.act(y, dim, batch)

    def then(self, g: Element) -> Element:
        if isinstance(g, Wreath):
            return Wreath(self.places.gather(-1, g.places), self.inner.take(g.places).scaled(g.inner))
        if isinstance(g, (Identity, Scale)):
            return Wreath(self.places, self.inner.scaled(g))
        return dense(self, g.factor.dtype if g.factor is not None else torch.float64).then(g)

    def at(self, places: Tensor) -> Wreath:
        return Wreath(self.places[places], self.inner.at(places))

    def map(self, function: Callable[[Tensor], Tensor]) -> Wreath:
        return Wreath(function(self.places), self.inner.map(function))


Elements = Mapping[str, Element]


def units(places: Tensor | None, scale: Tensor | None) -> Element:
    """The permutation, then the scale, of which either may be missing."""
    inner: Identity | Scale = IDENTITY if scale is None else Scale(scale)
    return inner if places is None else Wreath(places, inner)


def orthogonal(matrix: Tensor) -> Element:
    """An orthogonal matrix (n, n) as a Wreath where it is exactly a signed permutation, else as Dense."""
    size = matrix.abs()
    ones = size.new_ones(len(size))
    if ((size == 0) | (size == 1)).all() and torch.equal(size.sum(0), ones) and torch.equal(size.sum(1), ones):
        places = size.argmax(1)
        return Wreath(places, Scale(matrix.gather(1, places[:, None])[:, 0]))
    return Dense.orthogonal(matrix)


def dense(g: Element, dtype: torch.dtype = torch.float64) -> Dense:
    """Any element as a matrix; dtype: of a mere permutation. Raises ValueError for Identity, which has no size."""
    if isinstance(g, Dense):
        return g
    if isinstance(g, Scale):
        return Dense(torch.diag_embed(g.scale), torch.diag_embed(1 / g.scale))
    if not isinstance(g, Wreath):
        raise ValueError("the identity has no size")
    scale = g.inner.scale if isinstance(g.inner, Scale) else torch.ones_like(g.places, dtype=dtype)
    eye = torch.eye(g.places.shape[-1], dtype=scale.dtype, device=scale.device)[g.places]
    return Dense(scale[..., None] * eye, (eye / scale[..., None]).mT)


def moved(g: Element, move: Move) -> Element:
    """What g does to an index that moves in this way."""
    if move is Move.CO:
        return g
    return g.dual if move is Move.CONTRA else g.order


def inverse_of(elements: Elements) -> dict[str, Element]:
    """g⁻¹, space by space; what lies inside a place of the parent goes back with that place."""
    return {space: _placed(g.inverse, _parent(elements, space).inverse) for space, g in elements.items()}


def compose(second: Elements, first: Elements) -> dict[str, Element]:
    """second · first: what applying `first` and then `second` does."""
    return {
        space: _placed(first.get(space, IDENTITY), _parent(second, space)).then(second.get(space, IDENTITY))
        for space in dict.fromkeys((*first, *second))
    }


def _parent(elements: Elements, space: str) -> Element:
    return elements.get(PARENT.get(space, ""), IDENTITY)


def _placed(g: Element, parent: Element) -> Element:
    return g.at(parent.places) if isinstance(parent, Wreath) else g
