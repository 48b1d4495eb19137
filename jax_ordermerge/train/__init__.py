"""The training of a population."""
