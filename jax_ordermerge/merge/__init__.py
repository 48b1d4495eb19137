"""Kernels that merge members, over arrays and over files."""
