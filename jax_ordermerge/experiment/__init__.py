"""The pipeline of a whole experiment."""
