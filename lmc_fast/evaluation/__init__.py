"""Measuring: loss along the line, sameness of function, pictures."""

from .barrier import curve_between
from .curve import Curve
from .function import Difference, difference

__all__ = ["Curve", "Difference", "curve_between", "difference"]
