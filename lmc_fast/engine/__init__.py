"""The forward pass in normal form, and the interpolation between two endpoints."""
