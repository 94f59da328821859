from fractions import Fraction
from math import factorial

import pytest
import sympy

from lmc_fast.solvers.taylor import SCHEMES, degree_8


def coefficients(scheme, exact=Fraction):
    """p_0, p_1, ... of Σ p_k A^k, by running the scheme on polynomials."""

    def combine(row, terms):
        length = max(len(term) for term in terms)
        return [
            sum((exact(c) * term[k] for c, term in zip(row, terms, strict=False) if k < len(term)), exact(0))
            for k in range(length)
        ]

    terms = [[exact(1)], [exact(0), exact(1)]]
    for left, right in zip(scheme.left, scheme.right, strict=True):
        L, R = combine(left, terms), combine(right, terms)
        product = [exact(0)] * (len(L) + len(R) - 1)
        for i, a in enumerate(L):
            for j, b in enumerate(R):
                product[i + j] += a * b
        terms.append(product)
    return combine(scheme.result, terms)


def test_degree_8_is_exact():
    """p_k k! = 1 symbolically: a wrong x7 passes every numeric test at float32."""
    scheme = degree_8(sympy.sqrt(177), sympy.Rational(2, 3))
    p = [sympy.simplify(c) for c in coefficients(scheme, sympy.sympify)]
    assert [sympy.simplify(c * factorial(k)) for k, c in enumerate(p[:9])] == [1] * 9
    assert all(c == 0 for c in p[9:])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"degree {s.degree}")
def test_coefficients_as_rounded(scheme):
    """The table as the float64 numbers it holds, in exact arithmetic: p_k k! = 1 to within their rounding."""
    p = coefficients(scheme)
    assert max(k for k, c in enumerate(p) if abs(c * factorial(k)) > 1e-9) == scheme.degree
    for k in range(scheme.degree + 1):
        assert abs(p[k] * factorial(k) - 1) < (2e-15 if scheme.degree <= 8 else 5e-13), k


def test_structure_that_the_solvers_rely_on():
    for scheme in SCHEMES:
        assert scheme.left[0] == scheme.right[0] == (0, 1), "the first product is A²"
        assert scheme.result[len(scheme.left) + 1 :] in ((1,), (1 / 2,)), "the last product enters the result alone"
    assert [s.theta32 for s in SCHEMES] == sorted(s.theta32 for s in SCHEMES)
    assert [s.theta64 for s in SCHEMES] == sorted(s.theta64 for s in SCHEMES)
