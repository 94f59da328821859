"""Reading and writing stock checkpoints."""

from .exporting import export
from .lazy import LazyBlocks, Slots, Table
from .notes import notes_on
from .reader import Checkpoint
from .weights import Model, Weights, lerp
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
    "notes_on",
    "write_checkpoint",
]
