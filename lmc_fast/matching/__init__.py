"""Closed-form matching: which transform of one model brings it closest to another."""
