"""Weights that pass through a ring of buffers, so that memory is bounded by a budget and not by the model."""
