"""Weights that are sparse, low-rank, or both."""
