"""Reading and writing stock checkpoints."""

from .exporting import export
from .lazy import LazyBlocks, Table
from .reader import Checkpoint
from .weights import Model, Slots, Weights, lerp
from .writer import Stored, atomic_directory, check_target, disk_errors, publish, write_checkpoint

__all__ = [
    "Checkpoint",
    "LazyBlocks",
    "Model",
    "Slots",
    "Stored",
    "Table",
    "Weights",
    "atomic_directory",
    "check_target",
    "disk_errors",
    "export",
    "lerp",
    "publish",
    "write_checkpoint",
]
