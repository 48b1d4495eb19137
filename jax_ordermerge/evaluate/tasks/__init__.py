"""Kinds of tasks. Each module registers a family of kinds: settings, prompts, scores, summary.

These modules are imported when a config with tasks is read, so they do not import JAX or files
that do. They are given what needs it: an `EvalModel` and `TaskInputs`.
"""
