"""Merge recipes: a YAML file becomes a plan."""
