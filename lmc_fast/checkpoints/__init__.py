"""Reading and writing stock checkpoints."""

from .exporting import export, export_to_memory
from .lazy import LazyBlocks, Slots, Table
from .memory import Stock
from .notes import notes_on
from .reader import Checkpoint
from .weights import Model, Place, Weights, lerp
from .writer import Stored, checkpoint_names, write_checkpoint

__all__ = [
    "Checkpoint",
    "LazyBlocks",
    "Model",
    "Place",
    "Slots",
    "Stock",
    "Stored",
    "Table",
    "Weights",
    "checkpoint_names",
    "export",
    "export_to_memory",
    "lerp",
    "notes_on",
    "write_checkpoint",
]
