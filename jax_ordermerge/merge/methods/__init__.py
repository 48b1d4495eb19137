"""Merge methods, and the kernels that they share."""
