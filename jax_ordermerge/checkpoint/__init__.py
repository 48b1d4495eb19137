"""Hugging Face directories and Orbax checkpoints."""
