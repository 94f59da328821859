"""Measuring: loss along the line, sameness of function, pictures."""

from .barrier import Curve, curve_between
from .function import Difference, difference

__all__ = ["Curve", "Difference", "curve_between", "difference"]
