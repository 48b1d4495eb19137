"""Statistics of a run: arrays in, results out. Nothing here reads files or writes sentences."""
