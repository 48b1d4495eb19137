"""The choice of a merge: candidates, their losses on validation examples, controls."""
