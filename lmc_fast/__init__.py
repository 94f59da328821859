"""lmc_fast: align two transformers so that a plain average of their weights is a good model."""

from .alignment import Alignment
from .data import read_data, read_tokens
from .errors import LmcError
from .evaluation import Curve, Difference
from .examples import Examples
from .images import read_images
from .kernels.interp_linear import interp_linear
from .matching.learned import Schedule
from .native import Backends, backends
from .pair import Pair, open_pair
from .pipeline.align import align
from .pipeline.evaluate import barrier, verify
from .pipeline.export import export, merge
from .solvers import cayley, expm, polar

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Backends",
    "Curve",
    "Difference",
    "Examples",
    "LmcError",
    "Pair",
    "Schedule",
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
    "verify",
]
