"""Measuring: loss along the line, sameness of function, pictures."""

from .barrier import curve_between
from .curve import Curve
from .function import Difference, difference
from .simplex import Simplex, simplex_between

__all__ = ["Curve", "Difference", "Simplex", "curve_between", "difference", "simplex_between"]
