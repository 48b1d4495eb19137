"""The stages of a run, one module each: what a stage does beside what tells that it is complete."""
