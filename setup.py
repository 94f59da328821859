"""Builds the C++ solvers, and takes the demo's models into the wheel. Everything else is in pyproject.toml.

The extension links to neither torch nor BLAS, and is optional: where no compiler works, the package installs without it
and `lmc_fast.backends()` says so.
"""

from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py

PAIR = Path("examples/pair")  # in a wheel: lmc_fast/demo_pair


class WithDemoPair(build_py):
    """Copies PAIR into what is built; an editable installation finds it where it is."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self._pair().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + list(self._pair().values())

    def _pair(self):
        target = Path(self.build_lib, "lmc_fast", "demo_pair")
        return {str(file): str(target / file.relative_to(PAIR)) for file in sorted(PAIR.rglob("*")) if file.is_file()}


extension = Pybind11Extension(
    "lmc_fast._C",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread"],
)
extension.optional = True

setup(ext_modules=[extension], cmdclass={"build_ext": build_ext, "build_py": WithDemoPair})
