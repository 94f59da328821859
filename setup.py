"""Builds the C++ solvers. Everything else is in pyproject.toml.

The extension links to neither torch nor BLAS, and is optional: where no compiler works, the package installs without it
and `lmc_fast.backends()` says so.
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

extension = Pybind11Extension(
    "lmc_fast._C",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread"],
)
extension.optional = True

setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
