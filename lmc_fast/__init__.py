"""lmc_fast: align two transformers so that a plain average of their weights is a good model."""

from . import importing  # isort: skip  # noqa: F401  (it takes signals while the rest, which is slow, is imported)
from .alignment import Alignment
from .backends import Backends, backends
from .budget.meter import Meter
from .budget.planner import Plan
from .budget.stages import TooSmall
from .checkpoints import Model
from .data import read_data, read_tokens
from .errors import Cancelled, LmcError
from .evaluation import Curve, Difference
from .examples import Examples
from .images import read_images
from .kernels.interp_linear import interp_linear
from .learning.schedule import Schedule
from .pair import Pair, open_pair
from .pipeline.align import align
from .pipeline.evaluate import barrier, verify
from .pipeline.export import export, merge
from .pipeline.inspection import Inspection, inspect, plan
from .pipeline.progress import Progress
from .pipeline.run import run
from .solvers import cayley, expm, polar
from .symmetry import Group, Transform
from .version import __version__

__all__ = [
    "Alignment",
    "Backends",
    "Cancelled",
    "Curve",
    "Difference",
    "Examples",
    "Group",
    "Inspection",
    "LmcError",
    "Meter",
    "Model",
    "Pair",
    "Plan",
    "Progress",
    "Schedule",
    "TooSmall",
    "Transform",
    "__version__",
    "align",
    "backends",
    "barrier",
    "cayley",
    "expm",
    "export",
    "inspect",
    "interp_linear",
    "merge",
    "open_pair",
    "plan",
    "polar",
    "read_data",
    "read_images",
    "read_tokens",
    "run",
    "verify",
]


def __dir__() -> list[str]:
    """The public names: the modules they come from are no part of the interface."""
    return __all__
