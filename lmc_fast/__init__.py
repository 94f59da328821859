"""lmc_fast: align two transformers so that a plain average of their weights is a good model."""

from . import importing  # isort: skip  # noqa: F401  (it takes signals while the rest, which is slow, is imported)
from .alignment import Alignment
from .backends import Backends, backends
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
from .pipeline.progress import Progress
from .pipeline.run import run
from .solvers import cayley, expm, polar
from .version import __version__

__all__ = [
    "Alignment",
    "Backends",
    "Cancelled",
    "Curve",
    "Difference",
    "Examples",
    "LmcError",
    "Pair",
    "Progress",
    "Schedule",
    "__version__",
    "align",
    "backends",
    "barrier",
    "cayley",
    "expm",
    "export",
    "interp_linear",
    "merge",
    "open_pair",
    "polar",
    "read_data",
    "read_images",
    "read_tokens",
    "run",
    "verify",
]
