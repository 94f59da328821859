"""lmc_fast: align two transformers so that a plain average of their weights is a good model."""

__version__ = "0.1.0"
