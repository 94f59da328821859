"""Reading and writing stock checkpoints."""

from .exporting import export
from .lazy import LazyBlocks, Table
from .reader import Checkpoint
from .weights import Model, Slots, Weights, lerp
from .writer import Stored, checkpoint_names, write_checkpoint

__all__ = [
    "Checkpoint",
    "LazyBlocks",
    "Model",
    "Slots",
    "Stored",
    "Table",
    "Weights",
    "checkpoint_names",
    "export",
    "lerp",
    "write_checkpoint",
]
