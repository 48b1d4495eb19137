"""Optimizers: each module registers one with its settings. `train.optimizer` builds on them.

The modules import optax only when an optimizer is built, because reading a config loads them.
"""
