"""lmc_fast: align two transformers so that a plain average of their weights is a good model.

Each name is imported when it is first used: torch and transformers take seconds, which not everything needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import importing  # noqa: F401  (it takes signals while the rest, which is slow, is imported)

if TYPE_CHECKING:
    from .alignment import Alignment
    from .budget.meter import Meter
    from .budget.planner import Plan
    from .budget.stages import TooSmall
    from .checkpoints import Model, Stock
    from .data import read_data, read_tokens
    from .errors import Cancelled, LmcError
    from .evaluation import Curve, Difference, Simplex
    from .evaluation.diagnosis import Diagnosis
    from .examples import Examples
    from .images import read_images
    from .implementations import Backends, backends
    from .kernels.interp_linear import interp_linear
    from .learning.schedule import Schedule
    from .pair import Models, Pair, open_models, open_pair
    from .pipeline.align import align
    from .pipeline.carry import carry
    from .pipeline.diagnose import diagnose
    from .pipeline.evaluate import barrier, verify
    from .pipeline.export import export
    from .pipeline.extend import extend
    from .pipeline.growing import grow
    from .pipeline.heal import heal
    from .pipeline.inspection import Inspection, inspect, plan
    from .pipeline.merge import merge
    from .pipeline.progress import Progress
    from .pipeline.run import run
    from .solvers import cayley, expm, polar
    from .symmetry import Group, Transform
    from .version import __version__

_HOMES = {
    "Alignment": "alignment",
    "Backends": "implementations",
    "Cancelled": "errors",
    "Curve": "evaluation",
    "Diagnosis": "evaluation.diagnosis",
    "Difference": "evaluation",
    "Examples": "examples",
    "Group": "symmetry",
    "Inspection": "pipeline.inspection",
    "LmcError": "errors",
    "Meter": "budget.meter",
    "Model": "checkpoints",
    "Models": "pair",
    "Pair": "pair",
    "Plan": "budget.planner",
    "Progress": "pipeline.progress",
    "Schedule": "learning.schedule",
    "Simplex": "evaluation",
    "Stock": "checkpoints",
    "TooSmall": "budget.stages",
    "Transform": "symmetry",
    "__version__": "version",
    "align": "pipeline.align",
    "backends": "implementations",
    "barrier": "pipeline.evaluate",
    "carry": "pipeline.carry",
    "cayley": "solvers",
    "diagnose": "pipeline.diagnose",
    "expm": "solvers",
    "export": "pipeline.export",
    "extend": "pipeline.extend",
    "grow": "pipeline.growing",
    "heal": "pipeline.heal",
    "inspect": "pipeline.inspection",
    "interp_linear": "kernels.interp_linear",
    "merge": "pipeline.merge",
    "open_models": "pair",
    "open_pair": "pair",
    "plan": "pipeline.inspection",
    "polar": "solvers",
    "read_data": "data",
    "read_images": "images",
    "read_tokens": "data",
    "run": "pipeline.run",
    "verify": "pipeline.evaluate",
}  # where each public name comes from

__all__ = [
    "Alignment",
    "Backends",
    "Cancelled",
    "Curve",
    "Diagnosis",
    "Difference",
    "Examples",
    "Group",
    "Inspection",
    "LmcError",
    "Meter",
    "Model",
    "Models",
    "Pair",
    "Plan",
    "Progress",
    "Schedule",
    "Simplex",
    "Stock",
    "TooSmall",
    "Transform",
    "__version__",
    "align",
    "backends",
    "barrier",
    "carry",
    "cayley",
    "diagnose",
    "expm",
    "export",
    "extend",
    "grow",
    "heal",
    "inspect",
    "interp_linear",
    "merge",
    "open_models",
    "open_pair",
    "plan",
    "polar",
    "read_data",
    "read_images",
    "read_tokens",
    "run",
    "verify",
]


if not TYPE_CHECKING:  # which would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value  # the next time it is found at once
        return value


def __dir__() -> list[str]:
    """The public names: the modules they come from are no part of the interface."""
    return __all__
