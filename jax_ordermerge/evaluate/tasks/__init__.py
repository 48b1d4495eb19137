"""Kinds of tasks: each module registers a family of kinds with its settings."""
