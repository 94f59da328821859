"""Taylor polynomials of exp that need few matrix products, as data.

Bader, Blanes, Casas, "Computing the Matrix Exponential with an Optimized Taylor Polynomial Approximation" (arXiv
1710.10989): degree 8, 12 and 18 with 3, 4 and 5 products. Each is written as a straight-line program over
P = [I, A, P2, P3, ...]: product k multiplies two linear combinations of the terms before it, and the polynomial is a
last combination. The forward pass and its reverse mode are then one loop over this table, in torch and in C++.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch

Row = tuple[float, ...]


@dataclass(frozen=True)
class Scheme:
    """exp(A) ≈ Σ result[i] P[i] with P = [I, A, ...] and P[k + 2] = (Σ left[k][i] P[i]) (Σ right[k][i] P[i]).

    `theta32` and `theta64` bound ‖A‖ for a relative backward error below one rounding of float32 and float64.
    """

    degree: int
    theta32: float
    theta64: float
    left: tuple[Row, ...]
    right: tuple[Row, ...]
    result: Row

    def theta(self, dtype: torch.dtype) -> float:
        return self.theta32 if dtype == torch.float32 else self.theta64


_A: Row = (0, 1)
_A2: Row = (0, 0, 1)
_A3: Row = (0, 0, 0, 1)


def _add(*rows: Row) -> Row:
    """The sum of combinations of different lengths."""
    length = max(map(len, rows))
    return tuple(sum(row[i] for row in rows if i < len(row)) for i in range(length))


def degree_8(q: Any, x3: Any) -> Scheme:
    """Degree 8 with three products, its coefficients in closed form; q = √177, x3 = 2/3, exact or floats."""
    x1, x2 = x3 * (1 + q) / 88, x3 * (1 + q) / 352
    x4, x5 = (-271 + 29 * q) / (315 * x3), 11 * (q - 1) / (1260 * x3)
    x6, x7 = 11 * (q - 9) / (5040 * x3), (89 - q) / (5040 * x3 * x3)
    y2 = (857 - 58 * q) / 630
    return Scheme(
        degree=8,
        theta32=5.800524627688768e-01,
        theta64=4.991228871115323e-02,
        left=(_A, _A2, (0, 0, x3, 1)),
        right=(_A, (0, x1, x2), (x4, x5, x6, x7)),
        result=(1, 1, y2, 0, 1),
    )


def _degree_12() -> Scheme:
    """Degree 12 with four products: P4 = b3², A6 = b2 + P4, T = b0 + (b1 + A6) A6."""
    b0 = (9.0198e-16, 0.46932117595418237389, -0.20099424927047284052, -0.04623946134063071740)
    b1 = (5.31597895759871264183, 1.19926790417132231573, 0.01179296240992997031, 0.01108844528519167989)
    b2 = (0.18188869982170434744, 0.05502798439925399070, 0.09351590770535414968, 0.00610700528898058230)
    b3 = (-2.0861320e-13, -0.13181061013830184015, -0.02027855540589259079, -0.00675951846863086359)
    p4, p5 = (0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 1)
    return Scheme(
        degree=12,
        theta32=1.461661507209034,
        theta64=2.996158913811580e-01,
        left=(_A, _A, b3, _add(b1, b2, p4)),
        right=(_A, _A2, b3, _add(b2, p4)),
        result=_add(b0, p5),
    )


def _degree_18() -> Scheme:
    """Degree 18 with five products: P4 = A6 = (A A2)², P5 = b0 b4, A9 = b3 + P5, T = b1 + (b2 + A9) A9."""
    b0 = (0, -1.00365581030144618291e-01, -8.02924648241156932449e-03, -8.92138498045729985177e-04)
    b1 = (
        0,
        3.97849749499645077844e-01,
        1.36783778460411720168,
        4.98289622525382669416e-01,
        -6.37898194594723280150e-04,
    )
    b2 = (
        -1.09676396052962061844e01,
        1.68015813878906206114,
        5.71779846478865511061e-02,
        -6.98210122488052056106e-03,
        3.34975017086070470649e-05,
    )
    b3 = (
        -9.04316832390810593223e-02,
        -6.76404519071381882256e-02,
        6.75961301770459654925e-02,
        2.95552570429315521194e-02,
        -1.39180257516060693404e-05,
    )
    b4 = (0, 0, -9.23364619367118555360e-02, -1.69364939002081722752e-02, -1.40086798182036094347e-05)
    p5, p6 = (0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 0, 1)
    return Scheme(
        degree=18,
        theta32=3.010066362817634,
        theta64=1.090863719290036,
        left=(_A, _A, _A3, b0, _add(b2, b3, p5)),
        right=(_A, _A2, _A3, b4, _add(b3, p5)),
        result=_add(b1, p6),
    )


SCHEMES: tuple[Scheme, ...] = (
    Scheme(2, 5.978858893805233e-04, 2.580956802971767e-08, (_A,), (_A,), (1, 1, 1 / 2)),
    Scheme(4, 5.116619363445086e-02, 3.397168839976962e-04, (_A, _A2), (_A, (1 / 2, 1 / 6, 1 / 24)), (1, 1, 0, 1)),
    degree_8(sqrt(177), 2 / 3),
    _degree_12(),
    _degree_18(),
)
"""By degree. The last one also serves larger norms, after scaling."""
