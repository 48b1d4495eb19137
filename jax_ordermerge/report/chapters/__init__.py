"""The chapters of the report: each module turns a run, or one file of it, into blocks."""
