"""Pictures of a run as SVG text. The same numbers give the same bytes."""
