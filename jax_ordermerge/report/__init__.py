"""Pages about finished runs: reads a run directory through its layout, writes HTML and Markdown."""
